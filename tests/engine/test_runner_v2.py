"""Model runner V2, the one GPUs use: the tokens of V1 by the same seeds, the law of the target, stock greedy text."""

import inspect
import json
import math

import pytest
from transformers import AutoTokenizer

from tests.support import target
from tests.support.engines import BEBOP, HOWS, TINY_MODEL, engine, probe, token_ids
from tests.support.statistics import HONEST_P_VALUE, RERUN_P_VALUE, bonferroni
from tests.support.totals import assert_totals
from tests.support.v2_probe import (
    FILTERS,
    KINDS,
    MAX_TOKENS,
    NUM_CACHED,
    OPTIONS,
    PROMPTS,
    SCORED_IDS,
    SCORED_PROMPTS,
    answers,
    assert_crowd_was_served,
    scored,
)
from vllm_bebop.engine.versions import installed_vllm


@pytest.fixture(scope="module", params=HOWS)
def v2(request):
    return probe("tests.support.v2_probe", use_v2=True, how=request.param)


@pytest.fixture(scope="module")
def v1():
    with engine(BEBOP, **OPTIONS) as llm:
        return json.loads(json.dumps(answers(llm)))


@pytest.fixture(scope="module")
def both(v2, v1):
    """What V2 answers, and what V1 does."""
    return v2["answers"], v1


def test_v2_is_what_ran(v2):
    names = ["MTPSpeculator", "Sampler", "SamplingStates", "RejectionSampler"]
    assert v2["classes"] == [f"Bebop{name}" for name in names]
    assert v2["backend"].startswith("Triton kernels")
    assert v2["accepted"][0] > 0.1 * v2["rounds"]


def test_nothing_is_compiled_while_serving(v2):
    at_the_start, while_serving = v2["compiled"].values()
    kernels = {"sample_kernel", "verify_kernel", "gather_kernel", "residual_kernel"}
    assert set(at_the_start) == (set() if "interpreted" in v2["backend"] else kernels)
    assert while_serving == []


def tells_unseen_drafts() -> bool:
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

    return "verify_draft_sampled" in inspect.signature(RejectionSampler._verify).parameters


def test_totals_agree_with_vllm_and_with_themselves(v2):
    assert_totals(v2["totals"], v2["accepted"], v2["num_finished"] if v2["crowd"]["is_asynchronous"] else 0)


@pytest.fixture(scope="module")
def stock():
    """Greedy tokens of stock vLLM without speculation."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
    with engine(max_model_len=64) as llm:
        return [list(ids) for ids in token_ids(llm.generate(PROMPTS, params, use_tqdm=False))]


def test_greedy_tokens_of_fifty_prompts_are_stock_without_speculation(v2, stock):
    assert len(PROMPTS) == 50
    assert v2["greedy"] == stock


def test_one_draft_a_round_gives_stock_greedy_tokens_too(v2, stock):
    rounds, accepted = v2["one_draft"]["accepted"]
    assert len(accepted) == 1 and accepted[0] > 0.1 * rounds
    assert v2["one_draft"]["greedy"] == stock[: len(v2["one_draft"]["greedy"])]


def test_seeded_tokens_are_those_of_runner_v1(both):
    """Half of them with top-k and top-p, which V2 takes from raw logits and V1 has vLLM apply."""
    v2, v1 = both
    assert len(v2["seeded"]) == 20
    assert v2["seeded"] == v1["seeded"]


def test_tokens_under_a_grammar_that_drops_many_drafts_are_those_of_runner_v1(both):
    v2, v1 = both
    assert len(v2["grammar"]) == 20
    assert v2["grammar"] == v1["grammar"]


def test_no_token_breaks_the_grammar_where_drafts_have_to_wait(v2):
    """A draft that the scheduler has not seen may be accepted, but the row behind it has no mask."""
    if v2["crowd"]["is_asynchronous"] and not tells_unseen_drafts():
        pytest.skip("this vLLM does not tell which drafts its scheduler has not seen, and forgets the grammar itself")
    assert v2["crowd"]["is_asynchronous"] or "interpreted" in v2["backend"]
    assert_crowd_was_served(v2["crowd"])


@pytest.mark.parametrize("kind", KINDS)
def test_option_gives_the_seeded_tokens_of_runner_v1(both, kind):
    if kind == "bad_words" and installed_vllm().startswith("0.27"):
        pytest.skip("there, V2 compares a bad word of several tokens with the drafts one place too early")
    v2, v1 = both
    assert v2["kinds"][kind] == v1["kinds"][kind]
    assert kind == "nothing" or v1["kinds"][kind] != v1["kinds"]["nothing"]


def test_text_ends_at_max_model_len(both):
    """The runners cut the last rounds differently, so that only greedy tokens must agree."""
    (v2_greedy, v2_sampled), (v1_greedy, v1_sampled) = (answered["max_model_len"] for answered in both)
    assert v2_greedy == v1_greedy
    for _, tokens, *reasons in (v1_greedy, v1_sampled, v2_sampled):
        assert len(tokens) == 6
        assert reasons == ["length", None]


def test_prefix_cache_does_not_change_the_text(both):
    v2, v1 = both
    assert v2["prefix_cache"] == v1["prefix_cache"]
    (first, second), (_, num_cached_tokens) = v2["prefix_cache"]
    assert first == second
    if not num_cached_tokens:
        pytest.skip("this vLLM caches no prefix of this model")


def test_preempted_requests_resume_the_same(both):
    v2, v1 = both
    if v1["num_preemptions"][1] == 0:
        pytest.skip("this vLLM's scheduler makes the crowd wait instead")
    before, after = v2["num_preemptions"]
    assert after > before == 0
    assert v2["preemption"] == v1["preemption"]


@pytest.mark.parametrize("half", range(len(SCORED_PROMPTS)), ids=["raw", "processed"])
def test_returned_logprobs_are_the_targets(v2, half):
    """At every temperature, with and without top-k and top-p; a penalty is left to the comparison of samplers."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    for i, (prompt, returned) in enumerate(zip(SCORED_PROMPTS[half], v2["kernels"][half], strict=True)):
        params = scored(half, i)
        if "repetition_penalty" in params:
            continue
        policy = {name: params[name] for name in ("temperature", "top_k", "top_p") if name in params}
        policy["temperature"] = policy["temperature"] or 1.0  # a greedy request's logits are not divided
        prompt, tokens = tokenizer.encode(prompt), [token for token, _ in returned]
        logits = target.all_logits(TINY_MODEL, [*prompt, *tokens])[len(prompt) - 1 : -1]
        exact = target.filtered(logits, **policy).log()
        expected = [float(row[token]) for row, token in zip(exact, tokens, strict=True)]
        assert [logprob for _, logprob in returned] == pytest.approx(expected, abs=1e-3), params


def test_logprobs_of_given_ids_are_those_of_what_top_k_and_top_p_leave(v2):
    logits = target.next_logits(TINY_MODEL, [AutoTokenizer.from_pretrained(TINY_MODEL).encode(PROMPTS[0])])
    exact = target.filtered(logits, temperature=1.0, **FILTERS).log()[0, list(SCORED_IDS)].tolist()
    assert 0 < sum(math.isfinite(score) for score in exact) < len(exact)
    assert v2["scored_ids"] == pytest.approx(exact, abs=1e-3)


def test_kernels_and_reference_serve_the_same_tokens(v2):
    """Greedy and sampled requests side by side, on raw logits and on logits that vLLM has processed."""
    ours, eager = ([each for half in v2[name] for each in half] for name in ("kernels", "reference"))
    assert len(ours) == 26
    for fused, plain in zip(ours, eager, strict=True):
        assert [token for token, _ in fused] == [token for token, _ in plain]
        assert [logprob for _, logprob in fused] == pytest.approx([logprob for _, logprob in plain], abs=1e-4)


def test_half_of_the_requests_have_no_cached_drafts(v2):
    assert v2["num_cached"] == NUM_CACHED < len(PROMPTS)


def test_first_tokens_follow_the_target(v2):
    assert bonferroni(v2["honest"]) > HONEST_P_VALUE, v2["honest"]


def test_accepting_every_draft_is_caught(v2):
    assert bonferroni(v2["faulty"]) < RERUN_P_VALUE, v2["faulty"]
