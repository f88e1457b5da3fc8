"""Fused block verification equals its reference token for token, and its output follows p.

Runs on the GPU where there is one, otherwise on the CPU: see tests/support/kernels.py.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_races import count_mismatches, on_spoiled_scratch
from tests.support.kernels import (
    DEVICE,
    INF,
    RUNS_HERE,
    assert_bitwise_equal,
    assert_no_less_accurate,
    draws_many_samples,
    plants_faults,
    repeats_on_a_gpu,
    run_on_the_cpu,
    runs_kernels,
    smallest_margin,
)
from tests.support.requests import select_output
from tests.support.sampling import arguments as draft_rows
from tests.support.sampling import sample
from tests.support.statistics import assert_fault_is_caught, assert_laws
from tests.support.verification import (
    assert_edge_case,
    case,
    choose_filters,
    edge_case,
    poisoned,
    select,
    with_draft_statistics,
    with_ties,
)
from tests.support.verification import laws as laws_by_any_rule
from tests.support.verification import verify as verify_by_any_rule
from vllm_bebop.kernels import block_reference
from vllm_bebop.kernels.block_reference import verify_block_reference
from vllm_bebop.kernels.reference import Verification, sample_reference
from vllm_bebop.selftest import NUM_SAMPLES

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # log(0) in the interpreter


@pytest.mark.timeout(1200)  # compiles a hundred kernels
@pytest.mark.parametrize("how", ["interpreted", "emulated"])
def test_on_the_cpu(how: str) -> None:
    run_on_the_cpu(__file__, how)


test_on_the_cpu.__test__ = not RUNS_HERE


def verify(*arguments, **options) -> Verification:
    return verify_by_any_rule(*arguments, **options, block=True)


def smallest_margin_of_block(values: dict, **options) -> float:
    """The smallest score gap of any draw, and of any eta to its h times R + 1 - w, that the reference makes."""
    gaps = []
    honest = block_reference._is_reached

    def measured(eta: Tensor, weight: Tensor, residual_sum: Tensor) -> Tensor:
        gaps.extend((eta * (residual_sum + (1 - weight)) - residual_sum).abs().flatten().tolist())
        return honest(eta, weight, residual_sum)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_reference, "_is_reached", measured)
        margin = smallest_margin(lambda: verify_block_reference(**values, **options))
    return min([margin, *(gap for gap in gaps if gap > 0)])


def assert_equals_reference(values: dict, **options) -> Verification:
    ours = verify(**values, **options)
    known = {name: value for name, value in values.items() if name not in ("draft_logsumexp", "draft_argmax")}
    eager = verify_block_reference(**known, **options)
    exact = verify_block_reference(**known, **options, dtype=torch.float64)
    for request in (ours.token_ids != eager.token_ids).any(dim=1).nonzero().flatten().tolist():
        assert smallest_margin_of_block(select(known, [request]), **options) < 1e-5
    assert (ours.num_accepted == exact.num_accepted).float().mean() > 0.9
    # Every row decides: the statistics of all of them are those of the reference.
    assert_no_less_accurate(ours.target_entropy_nats, eager.target_entropy_nats, exact.target_entropy_nats)
    assert torch.equal(ours.num_nan, eager.num_nan) and torch.equal(ours.num_empty_rows, eager.num_empty_rows)
    has_draft = ~ours.overlap.isnan()
    assert not has_draft[eager.overlap.isnan()].any()
    assert ((ours.overlap[has_draft] >= 0) & (ours.overlap[has_draft] <= 1)).all()
    return ours


@runs_kernels
@pytest.mark.parametrize(
    ("batch", "max_drafts", "vocab_size", "dtype"),
    [
        (64, 1, 1, torch.float32),
        (64, 3, 63, torch.float16),
        (64, 0, 100, torch.float32),
        (18, 16, 100, torch.float32),
        (64, 4, 513, torch.bfloat16),
        (16, 3, 8192 + 17, torch.float32),
        (2, 1, 151_936, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("keeps_draft_statistics", [False, True])
def test_verify_block_equals_reference(batch, max_drafts, vocab_size, dtype, keeps_draft_statistics: bool) -> None:
    values = case(batch, max_drafts, vocab_size, dtype)
    if keeps_draft_statistics:
        values = with_draft_statistics(values)
    out = assert_equals_reference(values)
    if batch >= 18 and max_drafts > 1:
        assert out.num_accepted.unique().numel() >= 3
        assert not torch.equal(out.token_ids, verify_by_any_rule(**values).token_ids)


@runs_kernels
@pytest.mark.parametrize("no_draft_logits", [False, True])
def test_verify_block_equals_reference_on_processed_logits_and_ties(no_draft_logits: bool) -> None:
    assert_equals_reference(with_ties(case(64, 3, 600), no_draft_logits=no_draft_logits), target_is_processed=True)


@runs_kernels
@pytest.mark.parametrize(
    ("batch", "vocab_size", "dtype", "filters"),
    [
        (64, 63, torch.float32, ["bitmask", "min_p", "top_k", "top_p"]),
        (64, 1100, torch.float16, ["bitmask"]),
        (8, 8192 + 17, torch.bfloat16, ["top_k", "top_p"]),
    ],
)
def test_verify_block_equals_reference_with_filters(batch: int, vocab_size: int, dtype, filters: list[str]) -> None:
    values = with_draft_statistics(case(batch, 3, vocab_size, dtype))
    out = assert_equals_reference(choose_filters(values, filters))
    assert not torch.equal(out.token_ids, verify(**values).token_ids)


@runs_kernels
def test_verify_block_equals_reference_on_filtered_drafts() -> None:
    """q is what a threshold left of the draft rows, where the drafts were drawn from."""
    values = case(64, 3, 600)
    thresholds = values["draft_logits"].topk(20, dim=2).values[:, :, -1].contiguous()
    filtered = values["draft_logits"].masked_fill(values["draft_logits"] < thresholds[:, :, None], -INF)
    kept = with_draft_statistics(values | {"draft_logits": filtered})
    out = assert_equals_reference(kept | {"draft_logits": values["draft_logits"], "draft_threshold": thresholds})
    assert torch.equal(out.token_ids, verify(**kept).token_ids)


@runs_kernels
def test_verify_block_edge_cases() -> None:
    assert_edge_case(assert_equals_reference(edge_case(3, 1)), 3, 1)


@runs_kernels
def test_verify_block_has_one_form() -> None:
    values = with_draft_statistics(case(8, 2, 700, torch.bfloat16))
    assert_bitwise_equal(verify(**values, single_launch=True), verify(**values))


@runs_kernels
def test_verify_block_reuses_a_workspace() -> None:
    """Also after and before the other rule."""
    workspace = poisoned(24, 3, 600)
    for batch, max_drafts in ((24, 3), (3, 2)):
        values = case(batch, max_drafts, 600, seed=batch)
        expected, expected_one_by_one = verify(**values), verify_by_any_rule(**values)
        assert_bitwise_equal(verify(**values, workspace=workspace), expected)
        assert not workspace.row_tickets.any() and not workspace.request_tickets.any()
        assert (workspace.first_rejected == 2**30).all()
        assert_bitwise_equal(verify_by_any_rule(**values, workspace=workspace), expected_one_by_one)


@repeats_on_a_gpu
def test_verify_block_in_a_graph_has_no_races() -> None:
    values = with_draft_statistics(case(64, 3, 151_936, torch.bfloat16))
    workspace = poisoned(64, 3, 151_936)
    run = on_spoiled_scratch(lambda: verify(**values, workspace=workspace), [workspace])
    assert count_mismatches(run, run(), 20_000) == 0


@runs_kernels
def test_verify_block_reads_only_rows_that_it_needs(monkeypatch) -> None:
    """Greedy requests, and those whose drafts are all accepted, sum no residual."""
    values = case(32, 3, 700)
    values["temperature"][:16] = 0.0
    values["target_logits"] = torch.zeros_like(values["target_logits"])
    values["draft_logits"] = torch.zeros_like(values["draft_logits"])
    del values["one_hot"]
    workspace = poisoned(32, 3, 700)
    verify(**values, workspace=workspace)
    assert workspace.residual_sums.isnan().all()
    verify(**values | {"draft_logits": case(32, 3, 700)["draft_logits"]}, workspace=workspace)
    of_requests = workspace.residual_sums.view(32, -1)
    assert of_requests[:16].isnan().all() and not of_requests[16:].isnan().all()


@runs_kernels
@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_verify_block_by_slot(integers: torch.dtype) -> None:
    """Per-slot tensors, rows in any place, other integer types, padding rows, and slots past the draft's cache."""
    from vllm_bebop.kernels import fallback

    values = with_draft_statistics(case(16, 3, 513))
    values["one_hot"] = torch.arange(16, device=DEVICE) >= 10
    out = verify(**values)
    slots = torch.randperm(10, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    slots = torch.cat([slots, torch.arange(10, 16, device=DEVICE), torch.full((2,), -1, device=DEVICE)])
    by_slot = {}
    for name in ("temperature", "seeds", "draft_logits", "draft_logsumexp", "draft_argmax"):
        value = values[name]
        by_slot[name] = torch.zeros_like(value)
        by_slot[name][slots[:16]] = value
        if name.startswith("draft"):
            by_slot[name] = by_slot[name][:10]
    shared = {
        "target_logits": values["target_logits"],
        "draft_token_ids": F.pad(values["draft_token_ids"], (0, 0, 0, 2)).to(integers),
        "num_draft_tokens": F.pad(values["num_draft_tokens"], (0, 2), value=3).to(integers),
        "positions": F.pad(values["positions"], (0, 2)).to(integers),
        "slots": slots.to(integers),
        **by_slot,
    }
    first_rows = F.pad((values["num_draft_tokens"] + 1).cumsum(0), (1, 1))[:18].to(integers)
    padded = verify(**shared, first_rows=first_rows)
    assert_bitwise_equal(select_output(padded, list(range(16))), out)
    assert padded.num_accepted[16:].tolist() == [0, 0] and padded.token_ids[16:, 0].tolist() == [0, 0]

    for name in ("draft_token_ids", "num_draft_tokens", "positions", "slots"):
        shared[name] = shared[name][:16]
    eager = fallback.verify(**shared, block=True)
    assert torch.equal(eager.token_ids, out.token_ids) and torch.equal(eager.num_accepted, out.num_accepted)


@runs_kernels
def test_verify_block_names_the_wrong_argument() -> None:
    from vllm_bebop.kernels.draft_sampling import sample
    from vllm_bebop.kernels.verification import verify

    with pytest.raises(ValueError, match="workspace"):
        verify(**case(4, 2, 100), workspace=poisoned(4, 1, 100), block=True)
    with pytest.raises(ValueError, match="rounds"):
        sample(**draft_rows(4, 100), rounds=torch.zeros(3, dtype=torch.int64, device=DEVICE))


@runs_kernels
@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_sample_with_rounds_equals_reference(integers: torch.dtype) -> None:
    from vllm_bebop.kernels import fallback

    values = draft_rows(32, 700)
    values["temperature"] = torch.full_like(values["temperature"], 1.3)
    rounds = values["positions"] - torch.arange(32, device=DEVICE) % 3
    expected = sample_reference(**values, rounds=rounds).token_ids
    assert torch.equal(sample(*values.values(), rounds=rounds.to(integers)).token_ids, expected)
    slots = torch.arange(32, device=DEVICE)
    assert torch.equal(fallback.sample(**values, slots=slots, rounds=rounds.to(integers)).token_ids, expected)
    without = sample(*values.values()).token_ids
    assert (without != expected).float().mean() > 0.5


# --- Laws -----------------------------------------------------------------------------------------------------------


def laws(num_samples: int, first_seed: int, **options: bool) -> dict[str, float]:
    return laws_by_any_rule(num_samples, first_seed, **options, block=True)


@draws_many_samples
@pytest.mark.parametrize("one_hot", [False, True])
def test_verify_block_laws(one_hot: bool) -> None:
    assert_laws(lambda n, first: laws(n, first, one_hot=one_hot), NUM_SAMPLES)


def plant_biased_uniform(patch: pytest.MonkeyPatch) -> None:
    """The uniforms of acceptance are 10 % too small."""
    from vllm_bebop.kernels import block_kernel, device

    patch.setattr(block_kernel, "uniform", lambda *arguments: 0.9 * device.uniform(*arguments))


def plant_weight_for_its_chance(patch: pytest.MonkeyPatch) -> None:
    """A draft is reached with probability w instead of h."""
    from vllm_bebop.kernels import block_kernel

    patch.setattr(block_kernel, "is_reached", lambda eta, weight, residual_sum: eta <= weight)


def plant_forgotten_weight(patch: pytest.MonkeyPatch) -> None:
    """Residuals are max(0, p - q)."""
    import triton.language as tl

    from vllm_bebop.kernels import verification_kernel

    honest = verification_kernel.weigh_block

    def planted(*arguments):
        end, log_weight, eta, needs_sum = honest(*arguments)
        return end, tl.maximum(log_weight, -1.0) * 0.0, eta, needs_sum

    patch.setattr(verification_kernel, "weigh_block", planted)


@plants_faults
@pytest.mark.parametrize("plant", [plant_biased_uniform, plant_weight_for_its_chance, plant_forgotten_weight])
def test_planted_faults_are_caught(monkeypatch, plant) -> None:
    plant(monkeypatch)
    assert_fault_is_caught(laws, NUM_SAMPLES)
