"""Real vLLM engines for tests: in this process, small enough for two cores."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.without_a_gpu import ENVIRONMENTS
from vllm_bebop.bench.conditions import on_cpu

# Read when vLLM is imported; on a GPU those that concern the CPU are ignored.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# Whether there is a GPU is asked without waking its driver, after which a forked engine could not use it.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

ROOT = Path(__file__).parent.parent.parent
TINY_MODEL = ROOT / "tiny_model" / "checkpoint"
BEBOP = {"method": "bebop", "num_speculative_tokens": 3}
# How `probe` runs Triton's kernels, ours and those of model runner V2: on the GPU; or without one twice, in Triton's
# interpreter, and compiled for a GPU that tests/ptx emulates.
HOWS = tuple(ENVIRONMENTS) if on_cpu() else ("compiled",)
# A test may hold three engines at once.
SHARED_GPU = {} if on_cpu() else {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 2**30}


def environment_for_every_family() -> dict[str, str]:
    """This process's environment, and the torchvision that vLLM's Qwen3.5 imports.

    Without a GPU, scripts/setup_venv.sh puts it beside the environment, since Transformers fails to import with it.
    """
    search = [ROOT / "tests" / "cpu_support", ROOT / ".venv" / "torchvision", os.environ.get("PYTHONPATH")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(str(path) for path in search if path)}


def replace_what_cannot_run_without_a_gpu() -> None:
    """Pinned memory; and, in the interpreter, vLLM's top-k/top-p kernel, which it has in PyTorch too.

    An emulated engine also schedules asynchronously, as on a GPU; an interpreted one waits for each step, as on a CPU.
    """
    if not on_cpu():
        return
    from vllm.v1.sample.ops import topk_topp_sampler
    from vllm.v1.worker.gpu import structured_outputs

    if os.environ.get("TRITON_INTERPRET") == "1":
        in_torch = topk_topp_sampler.apply_top_k_top_p_pytorch
        topk_topp_sampler.apply_top_k_top_p_triton = lambda logits, k, p, **_hints: in_torch(logits, k, p)
    elif can_schedule_asynchronously():
        leave_asynchronous_scheduling_on()

    # Asked for by vLLM until 0.28. In that module alone: PyTorch knows `torch.tensor` by identity elsewhere.
    def unpinned(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return torch.tensor(*args, **kwargs)

    structured_outputs.torch = SimpleNamespace(**vars(torch) | {"tensor": unpinned})


def can_schedule_asynchronously() -> bool:
    """Until 0.24 vLLM's CPU runner has no streams to wait for."""
    from vllm_bebop.engine.versions import vllm_release

    return not on_cpu() or vllm_release() >= (0, 25)


def leave_asynchronous_scheduling_on() -> None:
    """As on a GPU; vLLM turns it off on a CPU."""
    from vllm.platforms.cpu import CpuPlatform

    update = CpuPlatform.check_and_update_config.__func__

    def update_the_rest(platform: Any, vllm_config: Any) -> None:
        asynchronous = vllm_config.scheduler_config.async_scheduling
        update(platform, vllm_config)
        vllm_config.scheduler_config.async_scheduling = asynchronous

    CpuPlatform.check_and_update_config = classmethod(update_the_rest)


SMALL_EXPERTS = "this vLLM's experts on a CPU are larger than those of tests.support.tiny_heads"


def unsupported_families() -> dict[str, str]:
    """Families that the installed vLLM cannot serve as these tests need it, and why; a matter of its version."""
    vllm = Path(find_spec("vllm").origin).parent
    reasons = {}
    if not (vllm / "v1/attention/backends/mla/cpu_mla.py").exists():
        reasons["deepseek_v3"] = "this vLLM has no MLA on a CPU: 0.29 is the first tested that does"
    if not on_cpu():
        reasons["deepseek_v3"] = "vLLM has no MLA in fp32 on a GPU"
    if "qwen3_5_text" not in (vllm / "config/speculative.py").read_text():
        reason = "before 0.29, vLLM speculates only with those Qwen3.5 that also see images"
        reasons |= {"qwen3_5": reason, "qwen3_5_moe": reason}
    if on_cpu() and version("vllm").startswith(("0.24", "0.25", "0.26")):
        reasons["glm4_moe"] = SMALL_EXPERTS
    return reasons


@contextmanager
def engine(speculative_config: dict[str, Any] | None = None, **options: Any) -> Iterator[Any]:
    """An offline `LLM` whose engine core and worker live in this process, so that tests can look inside.

    Model runner V1, which is all that a CPU has, unless the environment names another.
    """
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        environment.setenv("VLLM_USE_V2_MODEL_RUNNER", os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "0"))
        yield from _engine(speculative_config, options)


def _engine(speculative_config: dict[str, Any] | None, options: dict[str, Any]) -> Iterator[Any]:
    from vllm import LLM

    options = {
        "model": str(TINY_MODEL),
        "dtype": "float32",
        "enforce_eager": True,
        "max_num_seqs": 64,
        "max_model_len": 512,
        "disable_log_stats": False,
        **SHARED_GPU,
    } | options
    llm = LLM(speculative_config=speculative_config, **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        torch.cuda.empty_cache()  # without a GPU, nothing


def runner(llm: Any) -> Any:
    """The model runner inside an `engine`."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def probe(module: str, use_v2: bool, how: str) -> dict[str, Any]:
    """What `python -m module` prints behind RESULT: fused kernels in an engine. how: one of `HOWS`."""
    from vllm_bebop.engine.versions import has_usable_v2

    if use_v2 and not has_usable_v2():
        pytest.skip("bebop does not take this vLLM's model runner V2")
    environ = {"VLLM_USE_V2_MODEL_RUNNER": str(int(use_v2))}
    if how != "compiled":
        environ |= ENVIRONMENTS[how] | {"PYTHONPATH": f"{ROOT / 'tests/cpu_support'}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", module], cwd=ROOT, env=os.environ | environ, capture_output=True, text=True, timeout=580
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(lines[-1].removeprefix("RESULT "))


def token_ids(outputs: list[Any]) -> list[tuple[int, ...]]:
    """Generated ids of every completion, requests first."""
    return [tuple(completion.token_ids) for output in outputs for completion in output.outputs]


def accepted_per_position(llm: Any) -> tuple[int, list[int]]:
    """(drafting rounds, drafts accepted at each position) since the engine started, as vLLM counts them."""
    rounds, accepted = 0, []
    for metric in llm.get_metrics():
        if metric.name == "vllm:spec_decode_num_drafts":
            rounds = metric.value
        elif metric.name == "vllm:spec_decode_num_accepted_tokens_per_pos":
            accepted = list(metric.values)
    return rounds, accepted


def num_finished(llm: Any) -> int:
    """Requests that have ended since the engine started."""
    return int(sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:request_success"))
