"""Everything a request may ask for behaves under bebop as without speculation (model runner V1).

At temperature 0 the two must agree to the letter; what depends on chance is compared as a law in test_lossless.py.
"""

import pytest

from tests.support.engines import BEBOP, accepted_per_position, engine, runner, token_ids
from vllm_bebop.engine.versions import vllm_release

PROMPTS = [
    "import os\n\ndef ",
    "The module provides ",
    "Question: 12 + 7 = ",
    '{"role": "user", "content": "',
    "class Reader:\n    def __init__(self",
    "If the argument is omitted, ",
    "for name in sorted(",
    "Returns a list of ",
    "x = [",
    "raise ValueError(",
]


@pytest.fixture(scope="module")
def pair():
    """The same model served without speculation and with bebop, alive at once in one process."""
    from vllm.config import ReasoningConfig

    options = {
        # Few KV blocks: long batches are preempted and resumed.
        "block_size": 128,
        "num_gpu_blocks_override": 12,
        "reasoning_config": ReasoningConfig(reasoning_start_str="~~", reasoning_end_str="@@"),
    }
    with engine(**options) as stock, engine(BEBOP, **options) as bebop:
        yield stock, bebop


def _both(pair, prompts, params):
    stock, bebop = pair
    return [[output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)] for llm in (stock, bebop)]


def _assert_same_text(pair, prompts, params):
    expected, served = _both(pair, prompts, params)
    each = params if isinstance(params, list) else [params] * len(prompts)
    for asked, want, got in zip(each, expected, served, strict=True):
        assert got.text == want.text
        # Older versions return what a step decided beyond a stop string, under any speculation.
        returned = got.token_ids[: len(want.token_ids)] if asked.stop else got.token_ids
        assert returned == want.token_ids
        assert (got.finish_reason, got.stop_reason) == (want.finish_reason, want.stop_reason)


def _params(**options):
    from vllm import SamplingParams

    return SamplingParams(**{"temperature": 0.0, "max_tokens": 24} | options)


def test_greedy_text_of_fifty_prompts(pair):
    prompts = [prompt + suffix for prompt in PROMPTS for suffix in ("", "a", "the ", "0", "_")]
    assert len(prompts) == 50
    _assert_same_text(pair, prompts, _params(max_tokens=32, ignore_eos=True))


def test_drafts_are_accepted(pair):
    pair[1].generate(PROMPTS, _params(max_tokens=64, ignore_eos=True), use_tqdm=False)
    rounds, accepted = accepted_per_position(pair[1])
    assert rounds > 100 and accepted[0] > rounds / 10


@pytest.mark.parametrize(
    "options",
    [
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.8},
        {"repetition_penalty": 1.3},
        {"bad_words": ["self", " the", "import"]},
        {"stop": ["\n"]},
        {"stop": ["e", "i"], "include_stop_str_in_output": True},
        {"stop_token_ids": [13, 14, 15]},
        {"min_tokens": 12, "stop": ["a"]},
        {"allowed_token_ids": list(range(5, 200))},
        {"max_tokens": 1},
        {"max_tokens": 2},
    ],
    ids=lambda options: "+".join(options),
)
def test_option_behaves_as_without_speculation(pair, options):
    _assert_same_text(pair, PROMPTS, _params(**options))


def test_thinking_ends_within_its_budget(pair):
    """The end is forced token by token, from wherever in a round the budget runs out; some are spent by the prompt."""
    # Until 0.31, upstream's own speculation ends one that the prompt has spent a token late.
    first = 2 if vllm_release() >= (0, 32) else 6
    params = [_params(max_tokens=40, ignore_eos=True, thinking_token_budget=budget) for budget in range(first, 18)]
    _assert_same_text(pair, ["~~import os"] * len(params), params)


@pytest.mark.parametrize(
    "constraint",
    [
        {"choice": ["yes", "no", "perhaps not"]},
        {"regex": r"[0-9]{3}-[a-f]{2,5}"},
        {"json": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}},
    ],
    ids=lambda constraint: next(iter(constraint)),
)
def test_structured_outputs_behave_as_without_speculation(pair, constraint):
    from vllm.sampling_params import StructuredOutputsParams

    params = _params(structured_outputs=StructuredOutputsParams(**constraint), max_tokens=40)
    _assert_same_text(pair, PROMPTS[:4], params)


def test_structured_output_holds_when_sampled(pair):
    from vllm.sampling_params import StructuredOutputsParams

    params = _params(temperature=1.0, structured_outputs=StructuredOutputsParams(choice=["yes", "no"]), max_tokens=8)
    texts = {output.outputs[0].text for output in pair[1].generate(PROMPTS[:1] * 40, params, use_tqdm=False)}
    assert texts <= {"yes", "no"}


def test_logprobs_and_ranks_are_those_without_speculation(pair):
    expected, served = _both(pair, PROMPTS, _params(logprobs=3))
    for want, got in zip(expected, served, strict=True):
        for at_want, at_got in zip(want.logprobs, got.logprobs, strict=True):
            assert list(at_got) == list(at_want)
            for token, entry in at_want.items():
                assert at_got[token].logprob == pytest.approx(entry.logprob, abs=1e-3)
                assert at_got[token].rank == entry.rank


def test_text_ends_at_max_model_len(pair):
    """Near the end the drafter has no room; vLLM then schedules empty drafts, which must all be rejected."""
    prompt = {"prompt_token_ids": list(range(5, 505))}
    for temperature in (0.0, 1.0):
        expected, served = _both(pair, [prompt], _params(max_tokens=200, ignore_eos=True, temperature=temperature))
        assert len(served[0].token_ids) == len(expected[0].token_ids) == 12
        assert served[0].finish_reason == expected[0].finish_reason == "length"
    _assert_same_text(pair, [prompt, *PROMPTS], _params(max_tokens=200, ignore_eos=True))


def test_preempted_requests_resume_the_same(pair):
    """More KV cache is asked for than there is."""
    prompts = [{"prompt_token_ids": [5 + i, *range(20, 80)]} for i in range(16)]
    _assert_same_text(pair, prompts, _params(max_tokens=150, ignore_eos=True))
    stock, bebop = (
        next(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions") for llm in pair
    )
    if not stock:
        pytest.skip("this vLLM preempts nothing without speculation either")
    assert bebop > 0


def test_prefix_cache_does_not_change_the_text(pair):
    prompt = {"prompt_token_ids": list(range(30, 430))}
    (_, stock), (first, second) = (
        [llm.generate([prompt], _params(), use_tqdm=False)[0] for _ in range(2)] for llm in pair
    )
    assert second.outputs[0].token_ids == first.outputs[0].token_ids
    if not stock.num_cached_tokens:
        pytest.skip("this vLLM caches no prefix of this model without speculation either")
    assert second.num_cached_tokens > 0


def test_refused_options_stay_refused(pair):
    for options in ({"min_p": 0.1}, {"logit_bias": {5: 1.0}}):
        with pytest.raises(Exception, match="not .*supported with speculative decoding"):
            pair[1].generate(PROMPTS[:1], _params(temperature=1.0, **options), use_tqdm=False)


def test_request_facts_are_forgotten_when_requests_end(pair):
    """A long-lived server must not grow: drafts of finished requests go with the next proposal."""
    requests = runner(pair[1]).drafter.requests
    pair[1].generate(PROMPTS, _params(max_tokens=8), use_tqdm=False)
    pair[1].generate(PROMPTS[:1], _params(max_tokens=8), use_tqdm=False)
    assert len(requests._drafts) <= 1


def test_engines_in_one_process_share_no_state(pair):
    """Last in the file: when vLLM shuts the third engine down, it takes the process's parallel state along."""
    stock, bebop = (runner(llm) for llm in pair)
    assert type(stock.sampler).__module__.startswith("vllm.")
    assert type(bebop.sampler).__module__.startswith("vllm_bebop.")
    with engine(BEBOP | {"acceptance": "target_only"}) as other:
        params = _params(temperature=1.0, seed=2, max_tokens=32)
        before = token_ids(pair[1].generate(PROMPTS, params, use_tqdm=False))
        other.generate(PROMPTS, params, use_tqdm=False)
        assert token_ids(pair[1].generate(PROMPTS, params, use_tqdm=False)) == before
        assert runner(other).drafter.requests is not bebop.drafter.requests
