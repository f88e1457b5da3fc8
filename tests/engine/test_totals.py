"""`collective_rpc("bebop_totals")`: what drafting is worth and the policy's entropy, counted as requests are served."""

import pytest
import torch

from tests.support import target
from tests.support.engines import BEBOP, HOWS, TINY_MODEL, accepted_per_position, engine, probe
from tests.support.totals import assert_totals

PROMPT, NUM_TOKENS, TEMPERATURE = "The module provides ", 52, 1.3  # at 52, a round of this seed ends


@pytest.fixture(scope="module")
def served():
    """Totals before and after a few requests, vLLM's own count, and the text of the first request."""
    from vllm import SamplingParams

    with engine(BEBOP) as llm:
        before = llm.collective_rpc("bebop_totals")
        params = SamplingParams(temperature=TEMPERATURE, seed=1, max_tokens=NUM_TOKENS, ignore_eos=True)
        (output,) = llm.generate([PROMPT], params, use_tqdm=False)
        alone = llm.collective_rpc("bebop_totals")[0]
        params = SamplingParams(temperature=1.0, max_tokens=NUM_TOKENS, ignore_eos=True, n=16)
        llm.generate([PROMPT, "import os"], params, use_tqdm=False)
        yield before, alone, llm.collective_rpc("bebop_totals")[0], accepted_per_position(llm)[1], output


def test_totals_begin_at_zero(served):
    before = served[0]
    assert len(before) == 1 and {sum(row) for row in before[0].values()} == {0.0}


def test_totals_begin_at_zero_without_a_draft_cache():
    """Model runner V2 compiles ahead by verifying made-up drafts, which count if any draft may."""
    totals = probe("tests.support.v2_target_only_probe", use_v2=True, how=HOWS[0])
    assert {sum(row) for row in totals["before"].values()} == {0.0}
    assert sum(totals["after"]["tokens"]) >= 11  # of 12; the first comes from no drafting round


def test_totals_agree_with_vllm_and_with_themselves(served):
    _, _, totals, accepted, _ = served
    assert_totals(totals, accepted)
    assert totals["tokens"][:3] == totals["drafts"] and totals["tokens"][1:] == totals["accepted"]
    assert all(0 < greedy < drafts for greedy, drafts in zip(totals["target_only"], totals["drafts"], strict=True))


def test_entropy_is_that_of_the_laws_the_tokens_came_from(served):
    """Of every token but the first, which no drafting round gives."""
    alone, output = served[1], served[-1]
    tokens = list(output.outputs[0].token_ids)
    logits = target.all_logits(TINY_MODEL, [*output.prompt_token_ids, *tokens])
    laws = target.filtered(logits[len(output.prompt_token_ids) - 1 : -1], temperature=TEMPERATURE)
    entropies = torch.special.entr(laws).sum(-1)[1:]
    assert sum(alone["tokens"]) == len(entropies)
    assert sum(alone["entropy_nats"]) == pytest.approx(float(entropies.sum()), rel=1e-4)
