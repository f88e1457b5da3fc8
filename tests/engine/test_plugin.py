"""Installed and not asked for, bebop leaves vLLM stock; asked for, it reaches every worker."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.engines import BEBOP, ROOT, TINY_MODEL, engine, runner, token_ids

# Prints, as JSON, seeded output of stock configs and where each symbol that bebop would touch was defined.
_PROBE = """
import json, os
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from tests.support.engines import engine, runner, token_ids

def main():
    from vllm import SamplingParams
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER
    seen = {"outputs": [], "classes": []}
    for config in (None, {"method": "mtp", "num_speculative_tokens": 2}):
        with engine(config, seed=7) as llm:
            params = [SamplingParams(temperature=t, max_tokens=16, seed=s) for t, s in ((0, None), (1, None), (1, 5))]
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
    assert present.pop("engine_modules") == ["vllm_bebop.engine.intake"]
    assert present == absent


def test_register_is_idempotent():
    from vllm.engine.arg_utils import EngineArgs

    from vllm_bebop.plugin import register

    register()
    once = EngineArgs.create_speculative_config
    register()
    assert EngineArgs.create_speculative_config is once


def test_method_reads_mtp_afterwards():
    with engine(BEBOP | {"acceptance": "target_only"}) as llm:
        config = llm.llm_engine.vllm_config
        assert config.speculative_config.method == "mtp"
        assert config.additional_config["bebop"] == {"acceptance": "target_only"}
        assert runner(llm).drafter.one_hot


def test_environment_switch_is_the_same_engine(monkeypatch):
    from vllm import SamplingParams

    params = SamplingParams(temperature=1.0, seed=4, max_tokens=24)
    with engine(BEBOP) as llm:
        by_method = token_ids(llm.generate(["import os"], params, use_tqdm=False))
    monkeypatch.setenv("VLLM_BEBOP", "1")
    with engine({"method": "mtp", "num_speculative_tokens": 3}) as llm:
        assert token_ids(llm.generate(["import os"], params, use_tqdm=False)) == by_method


@pytest.mark.parametrize("executor", ["mp", "ray"])
def test_options_reach_the_workers_of_every_executor(executor):
    """One worker per executor, in a process (mp) or an actor (ray) of its own; asked over collective_rpc."""
    script = f"""
import os
from tests.support.engines import TINY_MODEL
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"

def describe(worker):
    return [worker.model_runner.drafter.one_hot, type(worker).__qualname__, os.getpid()]

def main():
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    from vllm import LLM, SamplingParams
    llm = LLM({str(TINY_MODEL)!r}, dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=4,
              distributed_executor_backend={executor!r},
              speculative_config={{"method": "bebop", "num_speculative_tokens": 2, "acceptance": "target_only"}})
    print("RESULT", llm.collective_rpc(describe)[0][:2], len(llm.generate("x")[0].outputs[0].token_ids))

if __name__ == "__main__":
    main()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert "RESULT [True, 'Worker'] 16" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]
