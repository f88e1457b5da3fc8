"""Model runner V2, with interpreted and with compiled kernels: the law of the target, and stock greedy text."""

import inspect

import pytest

from tests.support.engines import HOWS, engine, probe, token_ids
from tests.support.statistics import HONEST_P_VALUE, RERUN_P_VALUE, bonferroni
from tests.support.totals import assert_totals
from tests.support.v2_law_probe import NUM_CACHED
from tests.support.v2_probe import MAX_TOKENS, PROMPTS, assert_crowd_was_served


@pytest.fixture(scope="module", params=HOWS)
def v2(request):
    return probe("tests.support.v2_law_probe", use_v2=True, how=request.param)


@pytest.fixture(scope="module")
def stock():
    """Greedy tokens of stock vLLM without speculation."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
    with engine(max_model_len=64) as llm:
        return [list(ids) for ids in token_ids(llm.generate(PROMPTS, params, use_tqdm=False))]


def test_kernels_draft_and_verify(v2):
    assert v2["backend"].startswith("Triton kernels")
    assert v2["accepted"][0] > 0.1 * v2["rounds"]


def test_totals_agree_with_vllm_and_with_themselves(v2):
    assert_totals(v2["totals"], v2["accepted"], v2["num_finished"] if v2["crowd"]["is_asynchronous"] else 0)


def test_greedy_tokens_of_fifty_prompts_are_stock_without_speculation(v2, stock):
    assert len(PROMPTS) == 50
    assert v2["greedy"] == stock


def test_one_draft_a_round_gives_stock_greedy_tokens_too(v2, stock):
    rounds, accepted = v2["one_draft"]["accepted"]
    assert len(accepted) == 1 and accepted[0] > 0.1 * rounds
    assert v2["one_draft"]["greedy"] == stock[: len(v2["one_draft"]["greedy"])]


def test_half_of_the_requests_have_no_cached_drafts(v2):
    assert v2["num_cached"] == NUM_CACHED < len(PROMPTS)


def test_first_tokens_follow_the_target(v2):
    assert bonferroni(v2["honest"]) > HONEST_P_VALUE, v2["honest"]


def test_accepting_every_draft_is_caught(v2):
    assert bonferroni(v2["faulty"]) < RERUN_P_VALUE, v2["faulty"]


def tells_unseen_drafts() -> bool:
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

    return "verify_draft_sampled" in inspect.signature(RejectionSampler._verify).parameters


def test_no_token_breaks_the_grammar_where_drafts_have_to_wait(v2):
    """A draft that the scheduler has not seen may be accepted, but the row behind it has no mask."""
    if v2["crowd"]["is_asynchronous"] and not tells_unseen_drafts():
        pytest.skip("this vLLM does not tell which drafts its scheduler has not seen, and forgets the grammar itself")
    assert v2["crowd"]["is_asynchronous"] or "interpreted" in v2["backend"]
    assert_crowd_was_served(v2["crowd"])
