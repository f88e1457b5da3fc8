"""Model runner V2, the one GPUs use: the tokens of V1 by the same seeds, the law of the target, stock greedy text."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.engines import BEBOP, ROOT, engine, token_ids
from tests.support.statistics import HONEST_P_VALUE, RERUN_P_VALUE, bonferroni
from tests.support.v2_probe import MAX_TOKENS, NUM_CACHED, PROMPTS


@pytest.fixture(scope="module")
def v2():
    environ = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "tests/cpu_support")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.v2_probe"],
        cwd=ROOT,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=580,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(lines[-1].removeprefix("RESULT "))


def _v1(config, temperature, prompts=PROMPTS):
    from vllm import SamplingParams

    with engine(config, max_model_len=64) as llm:
        params = SamplingParams(temperature=temperature, seed=3, max_tokens=MAX_TOKENS, ignore_eos=True)
        return [list(ids) for ids in token_ids(llm.generate(prompts, params, use_tqdm=False))]


def test_v2_is_what_ran(v2):
    names = ["MTPSpeculator", "Sampler", "SamplingStates", "RejectionSampler"]
    assert v2["classes"] == [f"Bebop{name}" for name in names]
    assert v2["backend"].startswith("Triton kernels")
    assert v2["accepted"][0] > 0.1 * v2["rounds"]


def test_greedy_tokens_of_fifty_prompts_are_stock_without_speculation(v2):
    assert len(PROMPTS) == 50
    assert v2["greedy"] == _v1(None, temperature=0.0)


def test_seeded_tokens_are_those_of_runner_v1(v2):
    assert v2["seeded"] == _v1(BEBOP, 1.0, PROMPTS[:20])


def test_kernels_and_reference_serve_the_same_tokens(v2):
    """Greedy and sampled requests side by side, on raw logits and on logits that vLLM has processed."""
    assert len(v2["kernels"]) == 26
    for ours, eager in zip(v2["kernels"], v2["reference"], strict=True):
        assert [token for token, _ in ours] == [token for token, _ in eager]
        assert [logprob for _, logprob in ours] == pytest.approx([logprob for _, logprob in eager], abs=1e-4)


def test_half_of_the_requests_have_no_cached_drafts(v2):
    assert v2["num_cached"] == NUM_CACHED < len(PROMPTS)


def test_first_tokens_follow_the_target(v2):
    assert bonferroni(v2["honest"]) > HONEST_P_VALUE, v2["honest"]


def test_accepting_every_draft_is_caught(v2):
    assert bonferroni(v2["faulty"]) < RERUN_P_VALUE, v2["faulty"]
