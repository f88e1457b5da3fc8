"""Structured outputs follow the target's law under the grammar, whatever the scheduler drops (model runner V1).

It drops a draft that breaks the grammar, and all after it; and every draft for which it has no room.
"""

import pytest

from tests.support import grammar, laws
from tests.support.engines import BEBOP, TINY_MODEL, engine
from tests.support.statistics import assert_laws

PROMPT = "   +-----------+"
NUM_SAMPLES = 1000
# No step takes more than two tokens of a request: prompts come in chunks, and there is room for one draft only.
CASES = {"drafts_dropped_by_the_grammar": {}, "drafts_dropped_for_room": {"long_prefill_token_threshold": 2}}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_first_tokens_follow_the_target_under_a_grammar(options):
    with engine(BEBOP, max_num_seqs=256, **options) as llm:
        prompt, allowed = llm.get_tokenizer().encode(PROMPT), grammar.allowed_tokens(llm)

        def run(num_samples, first_seed):
            drawn = grammar.sample(llm, prompt, num_samples, first_seed)
            return laws.p_values(drawn, TINY_MODEL, prompt, temperature=grammar.TEMPERATURE, allowed=allowed)

        with grammar.unsuited_head(llm, prompt):
            assert_laws(run, NUM_SAMPLES)
