"""Installed and not asked for, bebop leaves vLLM stock; asked for, it reaches every worker."""

import functools
import json
import os
import subprocess
import sys

import pytest
import torch

from tests.support.engines import BEBOP, ROOT, TINY_MODEL, engine, runner, token_ids
from vllm_bebop.bench.conditions import on_cpu

# Prints, as JSON, seeded output of stock configs and where each symbol that bebop would touch was defined.
_PROBE = """
import json, os
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from tests.support.engines import engine, runner, token_ids

def main():
    from vllm import SamplingParams
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER
    seen = {"outputs": [], "classes": []}
    # Stock MTP on a CPU samples from uninitialised temperatures (vLLM issue #55005): only its greedy text repeats.
    for config, sampled in ((None, 1), ({"method": "mtp", "num_speculative_tokens": 2}, 0)):
        with engine(config, seed=7) as llm:
            kinds = ((0, None), (sampled, None), (sampled, 5))
            params = [SamplingParams(temperature=t, max_tokens=16, seed=s) for t, s in kinds]
            seen["outputs"].append(token_ids(llm.generate(["import os", "x = 1", "The "], params, use_tqdm=False)))
            inside = runner(llm)
            objects = [inside] + [getattr(inside, n, None) for n in ("sampler", "drafter", "rejection_sampler")]
            seen["classes"].append([f"{type(o).__module__}.{type(o).__qualname__}" for o in objects])
            seen["worker_cls"] = llm.llm_engine.vllm_config.parallel_config.worker_cls
            seen["additional_config"] = llm.llm_engine.vllm_config.additional_config
    from vllm.v1.sample import rejection_sampler
    seen["expand"] = rejection_sampler.expand_batch_to_tokens.__module__
    seen["load_formats"] = sorted(_LOAD_FORMAT_TO_MODEL_LOADER)
    import sys
    seen["engine_modules"] = sorted(name for name in sys.modules if name.startswith("vllm_bebop.engine."))
    print("RESULT", json.dumps(seen))

if __name__ == "__main__":
    main()
"""


def _probe(**environ):
    done = subprocess.run(
        [sys.executable, "-c", _PROBE], cwd=ROOT, env=os.environ | environ, capture_output=True, text=True, timeout=400
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(lines[-1].removeprefix("RESULT "))


def test_not_asked_for_vllm_is_stock():
    """VLLM_PLUGINS is an allow-list: naming another plugin keeps ours out altogether."""
    absent, present = _probe(VLLM_PLUGINS="none_of_ours"), _probe()
    assert absent.pop("engine_modules") == []
    assert present.pop("engine_modules") == ["vllm_bebop.engine.intake", "vllm_bebop.engine.lifeline"]
    assert present == absent


def test_register_is_idempotent():
    from vllm.engine.arg_utils import EngineArgs

    from vllm_bebop.plugin import register

    register()
    once = EngineArgs.create_speculative_config
    register()
    assert EngineArgs.create_speculative_config is once


@pytest.mark.skipif(not on_cpu(), reason="a GPU needs no mend")
def test_mend_is_installed_once_over_whatever_stands_there(monkeypatch):
    """Another plugin may have wrapped the function before."""
    from vllm.v1.sample import rejection_sampler
    from vllm.v1.sample.ops import topk_topp_sampler

    from vllm_bebop.engine import cpu_mend

    @functools.wraps(topk_topp_sampler.apply_top_k_only)
    def of_another_plugin(logits, k):
        raise AssertionError("asked about no logits")

    monkeypatch.setattr(topk_topp_sampler, "apply_top_k_only", of_another_plugin)
    monkeypatch.setattr(rejection_sampler, "expand_batch_to_tokens", None)
    cpu_mend.install()
    mended = topk_topp_sampler.apply_top_k_only
    assert mended(torch.empty(0, 4), torch.empty(0)).shape == (0, 4)
    assert rejection_sampler.expand_batch_to_tokens is cpu_mend.expand_batch_to_tokens
    cpu_mend.install()
    assert topk_topp_sampler.apply_top_k_only is mended


def test_method_reads_mtp_afterwards():
    with engine(BEBOP | {"acceptance": "target_only"}) as llm:
        config = llm.llm_engine.vllm_config
        assert config.speculative_config.method == "mtp"
        assert config.additional_config["bebop"]["acceptance"] == "target_only"
        assert runner(llm).drafter.one_hot


def test_environment_switch_is_the_same_engine(monkeypatch):
    from vllm import SamplingParams

    params = SamplingParams(temperature=1.0, seed=4, max_tokens=24)
    with engine(BEBOP) as llm:
        by_method = token_ids(llm.generate(["import os"], params, use_tqdm=False))
    monkeypatch.setenv("VLLM_BEBOP", "1")
    with engine({"method": "mtp", "num_speculative_tokens": 3}) as llm:
        assert token_ids(llm.generate(["import os"], params, use_tqdm=False)) == by_method


def test_options_reach_worker_processes():
    """The multiprocessing executor: a worker in a process of its own, asked over collective_rpc."""
    script = f"""
import os
from tests.support.engines import SHARED_GPU
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"

def describe(wrapper):
    return wrapper.worker.model_runner.drafter.one_hot, type(wrapper.worker).__qualname__

def main():
    from vllm import LLM
    llm = LLM({str(TINY_MODEL)!r}, dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=4,
              distributed_executor_backend="mp", **SHARED_GPU,
              speculative_config={{"method": "bebop", "num_speculative_tokens": 2, "acceptance": "target_only"}})
    print("RESULT", llm.collective_rpc(describe), len(llm.generate("x")[0].outputs[0].token_ids))

if __name__ == "__main__":
    main()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert "RESULT [(True, 'Worker')] 16" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]


def test_options_reach_ray_workers():
    """The Ray executor. vLLM has none on a CPU, where this lends it two GPUs that Ray only counts."""
    num_ranks = 1 if torch.cuda.device_count() == 1 else 2
    script = f"""
import os
from tests.support.engines import SHARED_GPU
from vllm_bebop.bench.conditions import on_cpu
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"

def lend_gpus():
    from vllm.platforms.cpu import CpuPlatform
    CpuPlatform.ray_device_key = "GPU"

def describe(wrapper):
    return wrapper.worker.model_runner.drafter.one_hot, type(wrapper.worker).__qualname__

def main():
    import ray
    lent = {{}}
    if on_cpu():
        lend_gpus()
        lent = {{"num_gpus": 2, "runtime_env": {{"worker_process_setup_hook": lend_gpus}}}}
    ray.init(num_cpus=2, include_dashboard=False, **lent)
    from vllm import LLM
    llm = LLM({str(TINY_MODEL)!r}, dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=4,
              distributed_executor_backend="ray", tensor_parallel_size={num_ranks},
              speculative_config={BEBOP | {"acceptance": "target_only"}}, **SHARED_GPU)
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    num_tokens = len(llm.generate("x")[0].outputs[0].token_ids)
    print("RESULT", executor.uses_ray, set(llm.collective_rpc(describe)), num_tokens)

if __name__ == "__main__":
    main()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert "RESULT True {(True, 'Worker')} 16" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]
