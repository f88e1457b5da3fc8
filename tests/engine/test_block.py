"""Acceptance "block" in a real engine: the law of the target, stock greedy text, both model runners alike."""

import pytest

from tests.support import laws
from tests.support.engines import HOWS, TINY_MODEL, accepted_per_position, engine, probe, runner, token_ids
from tests.support.statistics import assert_fault_is_caught, assert_laws
from tests.support.v2_block_probe import BLOCK, GREEDY, PROMPTS, SEEDED
from vllm_bebop.kernels import block_reference

LAW_PROMPT = "   +-----------+"  # as in test_lossless: a fault of the sampler shows here in few samples
NUM_SAMPLES = 800


@pytest.fixture(scope="module")
def llm():
    with engine(BLOCK, max_num_seqs=256) as llm:
        yield llm


@pytest.fixture(scope="module")
def served(llm):
    """Its tokens, before any other engine of a test takes over the process."""
    assert runner(llm).rejection_sampler.in_blocks
    return {"seeded": _tokens(llm, SEEDED), "greedy": _tokens(llm, GREEDY)}


def _tokens(llm, params):
    from vllm import SamplingParams

    return [list(ids) for ids in token_ids(llm.generate(PROMPTS, SamplingParams(**params), use_tqdm=False))]


def _experiment(llm):
    prompt = llm.get_tokenizer().encode(LAW_PROMPT)

    def run(num_samples, first_seed):
        drawn = laws.sample(llm, prompt, num_samples, first_seed, temperature=1.0)
        return laws.p_values(drawn, TINY_MODEL, prompt)

    return run


def test_first_tokens_follow_the_target(llm, served):
    assert_laws(_experiment(llm), NUM_SAMPLES)
    rounds, accepted = accepted_per_position(llm)
    assert accepted[0] > 0.1 * rounds


def test_reaching_drafts_too_often_is_caught(llm, monkeypatch):
    monkeypatch.setattr(block_reference, "_is_reached", lambda eta, weight, residual_sum: eta <= weight.sqrt())
    assert_fault_is_caught(_experiment(llm), NUM_SAMPLES)


def test_greedy_tokens_are_stock_without_speculation(served):
    with engine() as stock:
        assert served["greedy"] == _tokens(stock, GREEDY)


def test_both_model_runners_serve_the_same_seeded_and_greedy_tokens(served):
    v2 = probe("tests.support.v2_block_probe", use_v2=True, how=HOWS[-1])
    assert v2["class"] == "BebopRejectionSampler" and v2["in_blocks"]
    assert {name: v2[name] for name in served} == served
