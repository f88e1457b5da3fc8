"""A framework's own worker and worker extension are composed with; tensor parallelism works."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.support.engines import BEBOP, ROOT, TINY_MODEL, engine, runner, token_ids


def test_framework_worker_and_extension_compose():
    from vllm import SamplingParams

    options = {
        "worker_cls": "tests.support.framework.FrameworkWorker",
        "worker_extension_cls": "tests.support.framework.FrameworkExtension",
    }
    with engine(BEBOP, **options) as llm:
        assert llm.collective_rpc("framework_ping") == ["pong from rank 0"]
        assert llm.collective_rpc("extension_ping") == ["pong from the extension"]
        assert type(runner(llm).rejection_sampler).__name__ == "BebopRejectionSampler"
        params = SamplingParams(max_tokens=8, ignore_eos=True)
        assert len(token_ids(llm.generate(["x = "], params, use_tqdm=False))[0]) == 8


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs two GPUs, or none: two ranks share a CPU")
def test_tensor_parallel_ranks_agree():
    """Every rank samples for itself, so they must draw the same noise, seeded or not. Their head is the file's."""
    script = f"""
import json, os
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
from tests.support.engines import SHARED_GPU, accepted_per_position, token_ids

def main():
    from vllm import LLM, SamplingParams
    llm = LLM({str(TINY_MODEL)!r}, dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=8,
              tensor_parallel_size=2, speculative_config={BEBOP}, disable_log_stats=False, **SHARED_GPU)
    params = [SamplingParams(temperature=t, seed=s, max_tokens=24, ignore_eos=True)
              for t, s in ((0, None), (1, 5), (1, None), (1, None))]
    print("RESULT", json.dumps(token_ids(llm.generate(["import os"] * 4, params, use_tqdm=False))))
    rounds, accepted = accepted_per_position(llm)
    assert accepted[0] > 0.1 * rounds, (rounds, accepted)

if __name__ == "__main__":
    main()
"""
    environ = os.environ | {"VLLM_LOGGING_LEVEL": "INFO"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=500)
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert done.returncode == 0 and results, done.stdout[-2000:] + done.stderr[-4000:]
    assert (done.stdout + done.stderr).count("equals the file's") == 2, "the ranks' checksum was not compared"
    parallel = [tuple(ids) for ids in json.loads(results[0].removeprefix("RESULT "))]

    from vllm import SamplingParams

    with engine(BEBOP) as llm:
        params = [SamplingParams(temperature=t, seed=s, max_tokens=24, ignore_eos=True) for t, s in ((0, None), (1, 5))]
        assert token_ids(llm.generate(["import os"] * 2, params, use_tqdm=False)) == parallel[:2]
