"""Structured outputs follow the target's law under the grammar, whatever the scheduler drops (model runner V1).

It drops a draft that breaks the grammar, and all after it; every draft for which it has no room; and, scheduling
asynchronously, the drafts of a request that sat out a step, which it never saw.
"""

import pytest

from tests.support import grammar, laws
from tests.support.engines import (
    BEBOP,
    TINY_MODEL,
    can_schedule_asynchronously,
    engine,
    leave_asynchronous_scheduling_on,
)
from tests.support.statistics import assert_laws
from vllm_bebop.bench.conditions import on_cpu

PROMPT = "   +-----------+"
NUM_SAMPLES = 1000
CASES = {
    "drafts_dropped_by_the_grammar": {},
    # No step takes more than two tokens of a request: prompts come in chunks, and there is room for one draft only.
    "drafts_dropped_for_room": {"long_prefill_token_threshold": 2},
    # A step has room for the prompts of all requests, but for the drafts of half of them.
    "drafts_never_seen": {"max_num_batched_tokens": 512},
}


@pytest.fixture
def asynchronous(monkeypatch):
    if not can_schedule_asynchronously():
        pytest.skip("this vLLM cannot schedule asynchronously on a CPU")
    if on_cpu():
        from vllm.platforms.cpu import CpuPlatform

        monkeypatch.setattr(CpuPlatform, "check_and_update_config", CpuPlatform.check_and_update_config)
        leave_asynchronous_scheduling_on()


@pytest.mark.parametrize("case", CASES)
def test_first_tokens_follow_the_target_under_a_grammar(case, request):
    if case == "drafts_never_seen":
        request.getfixturevalue("asynchronous")
    with engine(BEBOP, max_num_seqs=256, **CASES[case]) as llm:
        prompt, allowed = llm.get_tokenizer().encode(PROMPT)[-2:], grammar.allowed_tokens(llm)

        def run(num_samples, first_seed):
            drawn = grammar.sample(llm, prompt, num_samples, first_seed)
            return laws.p_values(drawn, TINY_MODEL, prompt, temperature=grammar.TEMPERATURE, allowed=allowed)

        with grammar.unsuited_head(llm, prompt):
            assert_laws(run, NUM_SAMPLES)
