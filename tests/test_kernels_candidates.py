"""Drafts restricted to the largest few logits of each stretch: the kernel, and verification of such drafts.

Runs on the GPU where there is one, otherwise on the CPU: see tests/support/kernels.py.
"""

import pytest
import torch
from torch import Tensor

from tests.support.kernels import (
    DEVICE,
    RUNS_HERE,
    assert_equal_from_both_forms,
    draws_many_samples,
    run_on_the_cpu,
    runs_kernels,
)
from tests.support.statistics import assert_law
from tests.support.verification import case, verify
from vllm_bebop.kernels import fallback
from vllm_bebop.kernels.draft_sampling import sample
from vllm_bebop.kernels.filters import Filters
from vllm_bebop.kernels.reference import verify_reference

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # log(0) in the interpreter
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("how", ["interpreted", "emulated"])
def test_on_the_cpu(how: str) -> None:
    run_on_the_cpu(__file__, how)


test_on_the_cpu.__test__ = not RUNS_HERE


@runs_kernels
@pytest.mark.parametrize(
    ("batch", "vocab_size", "dtype"), [(3, 5, torch.float16), (5, 2048, torch.bfloat16), (4, 5000, torch.float32)]
)
def test_find_candidates_equals_reference(batch: int, vocab_size: int, dtype: torch.dtype) -> None:
    from vllm_bebop.kernels.candidate_kernel import find_candidates
    from vllm_bebop.kernels.candidates import NUM_KEPT, find_candidates_reference

    logits = (torch.randn(batch, vocab_size, generator=torch.Generator().manual_seed(0)) * 2).to(DEVICE, dtype)
    logits[0, :3], logits[1, 1:] = NAN, -INF
    logits[2] = logits[2].round()  # ties: the lowest ids
    ours, eager = find_candidates(logits), find_candidates_reference(logits)
    assert torch.equal(ours.ids, eager.ids) and torch.equal(ours.logits, eager.logits)
    largest = logits[2].float().cpu()[:2048].sort(descending=True, stable=True).indices[:NUM_KEPT]
    assert torch.equal(ours.ids[2, : len(largest)].cpu().long(), largest)


def by_candidates(values: dict) -> dict:
    """The same case, its drafts drawn from candidates and cached as such, by slot."""
    from vllm_bebop.kernels.candidate_kernel import find_candidates
    from vllm_bebop.kernels.candidates import num_candidates

    batch, max_drafts, vocab_size = values["draft_logits"].shape
    shape = (batch, max_drafts, num_candidates(vocab_size))
    slots = torch.arange(batch, device=DEVICE)
    ids = torch.zeros(shape, dtype=torch.int32, device=DEVICE)
    logits = torch.zeros(shape, dtype=values["draft_logits"].dtype, device=DEVICE)
    kept = {
        "draft_logsumexp": torch.zeros(batch, max_drafts, device=DEVICE),
        "draft_argmax": torch.zeros(batch, max_drafts, dtype=torch.int64, device=DEVICE),
        "draft_threshold": torch.zeros(batch, max_drafts, device=DEVICE),
    }
    tokens = values["draft_token_ids"].clone()
    shared = values["temperature"], values["seeds"]
    filters = values.get("filters", Filters())
    for i in range(max_drafts):
        step = torch.tensor(i, device=DEVICE)
        found = find_candidates(values["draft_logits"][:, i], slots=slots, cache_ids=ids, step=step)
        out = sample(
            found.logits, *shared, values["positions"] + i, slots=slots, filters=filters, ids=found.ids, cache=logits,
            step=step, **{name.replace("draft", "cache"): cache for name, cache in kept.items()},
        )  # fmt: skip
        tokens[:, i] = torch.where(tokens[:, i] >= 0, out.token_ids, tokens[:, i])
    return values | kept | {"draft_token_ids": tokens, "draft_logits": logits, "draft_ids": ids, "slots": slots}


@runs_kernels
@pytest.mark.parametrize("filters", [Filters(), Filters(top_k=torch.full((5,), 3, dtype=torch.int32, device=DEVICE))])
def test_sample_of_candidates_draws_their_tokens(filters: Filters) -> None:
    """By the kernel and by the fallback; from a row without candidates, token 0."""
    from vllm_bebop.kernels import fallback
    from vllm_bebop.kernels.candidate_kernel import find_candidates

    logits = torch.randn(5, 4100, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    logits[2] = NAN
    found = find_candidates(logits)
    found.ids[2] = -1
    temperature, seeds = torch.tensor([1.0, 0.0, 1.0, 0.5, 2.0], device=DEVICE), torch.arange(5, device=DEVICE)
    given = found.logits, temperature, seeds, seeds + 7
    slots = torch.arange(5, device=DEVICE)
    index = sample(*given, slots=slots, filters=filters).token_ids
    expected = found.ids.gather(1, index[:, None]).squeeze(1).long().clamp(min=0)
    assert expected[1] == logits[1].argmax() and expected[2] == 0
    for run in (sample, fallback.sample):
        assert torch.equal(run(*given, slots=slots, filters=filters, ids=found.ids).token_ids, expected)


@runs_kernels
@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("vocab_size", [100, 4100])
def test_verify_of_candidates_equals_the_reference_on_full_rows(vocab_size: int, filtered: bool, block: bool) -> None:
    """A row of candidates stands for a full row that is -inf elsewhere."""
    from vllm_bebop.kernels.candidates import expand_candidates

    values = case(32, 3, vocab_size)
    del values["one_hot"]
    if filtered:
        top_k = torch.tensor([0, 5, 1, 40], dtype=torch.int32, device=DEVICE).repeat(8)
        values["filters"] = Filters(top_k=top_k, top_p=torch.full((32,), 0.9, device=DEVICE))
    values = by_candidates(values)
    out = verify(**values, block=block)
    full = expand_candidates(values["draft_ids"], values["draft_logits"], vocab_size)
    whole = {k: v for k, v in values.items() if k not in ("slots", "draft_ids", "draft_argmax", "draft_logsumexp")}
    if block:
        from vllm_bebop.kernels.block_reference import verify_block_reference as reference
    else:
        reference = verify_reference
    eager = reference(**whole | {"draft_logits": full})
    assert torch.equal(out.token_ids, eager.token_ids)
    assert (out.num_accepted > 0).any() and (out.num_accepted < values["num_draft_tokens"]).any()
    known = ~out.draft_argmax_prob.isnan()
    assert known.any()
    torch.testing.assert_close(out.draft_argmax_prob[known], eager.draft_argmax_prob[known], rtol=1e-4, atol=1e-6)
    if not block:
        assert_equal_from_both_forms(verify(**values, single_launch=True), out)
    plain = fallback.verify(**values, block=block)
    assert torch.equal(plain.token_ids, out.token_ids)


def first_token(num_samples: int, first_seed: int, *, forgets_candidates: bool = False) -> Tensor:
    """Counts of the first output token of requests whose drafts come from 8 of 12 tokens."""
    logits_p = torch.linspace(0.5, 1.8, 12, device=DEVICE)
    logits_q = torch.linspace(1.6, 0.2, 12, device=DEVICE)
    seeds = torch.arange(first_seed, first_seed + num_samples, device=DEVICE)
    values = {
        "target_logits": logits_p.expand(2 * num_samples, -1),
        "draft_token_ids": torch.zeros(num_samples, 1, dtype=torch.int64, device=DEVICE),
        "draft_logits": logits_q.expand(num_samples, 1, -1),
        "num_draft_tokens": torch.ones_like(seeds),
        "temperature": torch.ones(num_samples, device=DEVICE),
        "seeds": seeds,
        "positions": torch.full_like(seeds, 5),
    }
    drafted = by_candidates(values)
    if forgets_candidates:  # verification takes q for the whole row
        drafted = values | {"draft_token_ids": drafted["draft_token_ids"]}
    return verify(**drafted).token_ids[:, 0].bincount(minlength=12).cpu().numpy()


@draws_many_samples
def test_output_of_candidates_follows_the_target() -> None:
    law = torch.linspace(0.5, 1.8, 12).double().softmax(0).tolist()
    assert_law(first_token, law, 20_000)


@draws_many_samples
def test_forgetting_the_candidates_is_caught() -> None:
    from vllm_bebop.statistics import RERUN_P_VALUE, g_test

    law = torch.linspace(0.5, 1.8, 12).double().softmax(0)
    counts = torch.from_numpy(first_token(20_000, 0, forgets_candidates=True))
    assert g_test(counts, law) < RERUN_P_VALUE


@runs_kernels
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("draft_ids", torch.zeros(4, 2, 9, dtype=torch.int32)),
        ("draft_logsumexp", None),
        ("draft_logits", torch.zeros(4, 2, 9)),
    ],
)
def test_verify_names_what_is_wrong_about_candidates(name: str, wrong) -> None:
    values = by_candidates(case(4, 2, 100))
    values |= {name: None if wrong is None else wrong.to(DEVICE)}
    if wrong is None:
        values["draft_threshold"] = None
    with pytest.raises(ValueError, match=name):
        verify(**values)
