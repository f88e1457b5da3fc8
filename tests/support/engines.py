"""Real vLLM engines for tests: in this process, small enough for two cores."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Read when vLLM is imported; on a GPU those that concern the CPU are ignored.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

ROOT = Path(__file__).parent.parent.parent
TINY_MODEL = ROOT / "tiny_model" / "checkpoint"
BEBOP = {"method": "bebop", "num_speculative_tokens": 3}


def environment_for_every_family() -> dict[str, str]:
    """This process's environment, and the torchvision that vLLM's Qwen3.5 imports.

    Without a GPU, scripts/setup_venv.sh puts it beside the environment, since Transformers fails to import with it.
    """
    search = [ROOT / "tests" / "cpu_support", ROOT / ".venv" / "torchvision", os.environ.get("PYTHONPATH")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(str(path) for path in search if path)}


@contextmanager
def engine(speculative_config: dict[str, Any] | None = None, **options: Any) -> Iterator[Any]:
    """An offline `LLM` whose engine core and worker live in this process, so that tests can look inside."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    options = {
        "model": str(TINY_MODEL),
        "dtype": "float32",
        "enforce_eager": True,
        "max_num_seqs": 64,
        "max_model_len": 512,
        "disable_log_stats": False,
    } | options
    llm = LLM(speculative_config=speculative_config, **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def runner(llm: Any) -> Any:
    """The model runner inside an `engine`."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


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
