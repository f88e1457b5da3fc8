"""Fused verification equals the reference token for token, in both of its forms."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from benchmarks.kernel_races import as_integers, count_mismatches, on_spoiled_scratch
from tests.support.kernels import (
    DEVICE,
    INF,
    NAN,
    RUNS_HERE,
    assert_bitwise_equal,
    assert_equal_from_both_forms,
    assert_no_less_accurate,
    plants_faults,
    repeats_on_a_gpu,
    run_on_the_cpu,
    runs_kernels,
    smallest_margin,
)
from tests.support.requests import select_output
from tests.support.verification import (
    assert_edge_case,
    case,
    choose_filters,
    edge_case,
    in_every_form,
    poisoned,
    select,
    verify,
    with_draft_statistics,
    with_filters,
    with_ties,
)
from vllm_bebop.kernels import reference
from vllm_bebop.kernels.block_reference import accept_block
from vllm_bebop.kernels.filters import Filters
from vllm_bebop.kernels.reference import Verification, verify_reference

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # log(0) in the interpreter


@pytest.mark.timeout(1200)  # compiles a hundred kernels
@pytest.mark.parametrize("how", ["interpreted", "emulated"])
def test_on_the_cpu(how: str) -> None:
    run_on_the_cpu(__file__, how)


test_on_the_cpu.__test__ = not RUNS_HERE


def assert_equals_reference(values: dict, **options) -> Verification:
    """Both forms, where there are two, against the reference; returns the output of the two-launch form."""
    ours = verify(**values, **options)
    if "filters" not in values:
        assert_equal_from_both_forms(verify(**values, **options, single_launch=True), ours)

    known = {name: value for name, value in values.items() if name not in ("draft_logsumexp", "draft_argmax")}
    eager = verify_reference(**known, **options)
    exact = verify_reference(**known, **options, dtype=torch.float64)
    for request in (ours.token_ids != eager.token_ids).any(dim=1).nonzero().flatten().tolist():
        one = select(known, [request])
        assert smallest_margin(lambda one=one: verify_reference(**one, **options)) < 1e-5
    same = ours.num_accepted == exact.num_accepted
    assert same.float().mean() > 0.9

    # Rows that decide something; the others are NaN.
    steps = torch.arange(values["draft_token_ids"].shape[1] + 1, device=DEVICE)
    is_used = steps <= ours.num_accepted[:, None]
    assert torch.equal(ours.target_entropy_nats.isnan(), ~is_used)
    entropies = (out.target_entropy_nats[is_used] for out in (ours, eager, exact))
    assert_no_less_accurate(*entropies)
    has_draft = is_used[:, :-1] & (steps[:-1] < values["num_draft_tokens"][:, None])
    assert ours.overlap[~has_draft].isnan().all() and ours.draft_argmax_prob[~has_draft].isnan().all()
    estimated = has_draft & ~ours.overlap.isnan()
    assert not estimated.any() or ((ours.overlap[estimated] >= 0) & (ours.overlap[estimated] <= 1)).all()
    known_argmax = has_draft & ~ours.draft_argmax_prob.isnan()
    torch.testing.assert_close(
        ours.draft_argmax_prob[known_argmax].double(), exact.draft_argmax_prob[known_argmax], rtol=1e-4, atol=1e-6
    )
    point_mass = values["temperature"] < 1e-5
    if "one_hot" in values:
        point_mass = point_mass | values["one_hot"]
    if values["draft_logits"] is None:
        point_mass = torch.ones_like(point_mass)
    is_exact = estimated & point_mass[:, None]
    for name in ("overlap", "draft_argmax_prob"):
        a, b = (getattr(out, name)[is_exact].double() for out in (ours, exact))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    return ours


@runs_kernels
@pytest.mark.parametrize(
    ("batch", "max_drafts", "vocab_size", "dtype"),
    [
        (64, 1, 1, torch.float32),
        (64, 3, 63, torch.float16),
        (64, 0, 100, torch.float32),
        (64, 5, 100, torch.bfloat16),
        (34, 16, 100, torch.float32),
        (64, 3, 513, torch.bfloat16),
        (32, 3, 8192 + 17, torch.float32),
        (4, 1, 151_936, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("keeps_draft_statistics", [False, True])
def test_verify_equals_reference(batch, max_drafts, vocab_size, dtype, keeps_draft_statistics: bool) -> None:
    values = case(batch, max_drafts, vocab_size, dtype)
    if keeps_draft_statistics:
        values = with_draft_statistics(values)
    out = assert_equals_reference(values)
    if batch >= 34 and max_drafts > 1 and vocab_size > 1:
        assert out.num_accepted.unique().numel() >= 3
    sampled = (values["num_draft_tokens"] > 0) & (values["temperature"] > 0) & ~values["one_hot"]
    if keeps_draft_statistics and sampled.any():
        assert not out.draft_argmax_prob[sampled, 0].isnan().all()


@runs_kernels
@pytest.mark.parametrize("thinning_rounds", [0, 1, 6])
@pytest.mark.parametrize("vocab_size", [100, 8192 + 17])
def test_verify_equals_reference_when_thinning_gives_up(monkeypatch, vocab_size: int, thinning_rounds: int) -> None:
    monkeypatch.setattr(reference, "NUM_THINNING_ROUNDS", thinning_rounds)
    values = case(64 if vocab_size == 100 else 16, 2, vocab_size)
    values["temperature"][values["temperature"] == 0] = 0.9
    out = assert_equals_reference(with_draft_statistics(values))
    assert (out.num_accepted < values["num_draft_tokens"]).sum() >= 5


@runs_kernels
@pytest.mark.parametrize("no_draft_logits", [False, True])
def test_verify_equals_reference_on_processed_logits_and_ties(no_draft_logits: bool) -> None:
    assert_equals_reference(with_ties(case(64, 3, 600), no_draft_logits=no_draft_logits), target_is_processed=True)


@runs_kernels
@pytest.mark.parametrize(
    ("batch", "vocab_size", "dtype", "filters", "thinning_rounds"),
    [
        (64, 63, torch.float32, ["bitmask", "min_p", "top_k", "top_p"], 8),
        (64, 1100, torch.float16, ["bitmask"], 8),
        (64, 1100, torch.bfloat16, ["min_p"], 8),
        (64, 1100, torch.bfloat16, ["top_k"], 8),
        (64, 1100, torch.float32, ["top_p"], 8),
        (64, 1100, torch.float32, ["bitmask", "min_p", "top_k"], 0),
        (16, 8192 + 17, torch.bfloat16, ["bitmask", "top_k", "top_p"], 8),
    ],
)
def test_verify_equals_reference_with_filters(
    monkeypatch, batch: int, vocab_size: int, dtype: torch.dtype, filters: list[str], thinning_rounds: int
) -> None:
    monkeypatch.setattr(reference, "NUM_THINNING_ROUNDS", thinning_rounds)
    values = with_draft_statistics(case(batch, 3, vocab_size, dtype))
    chosen = choose_filters(values, filters)
    out = assert_equals_reference(chosen)
    assert not torch.equal(out.token_ids, verify(**values).token_ids)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(1)).tolist()
    assert_bitwise_equal(verify(**select(chosen, order), single_launch=True), select_output(out, order))


@runs_kernels
def test_verify_draws_only_kept_tokens() -> None:
    """An independent check of the filters' meaning, on the tokens that came from p or from the residual."""
    values = with_filters(case(64, 3, 600))
    out = verify(**choose_filters(case(64, 3, 600), ["bitmask", "min_p", "top_k", "top_p"]))
    counts = values["num_draft_tokens"] + 1
    first_rows = counts.cumsum(0) - counts
    for request in range(64):
        row = int(first_rows[request] + out.num_accepted[request])
        token = int(out.token_ids[request, out.num_accepted[request]])
        allowed = (values["bitmask"][row].cpu().repeat_interleave(32) >> torch.arange(32).repeat(19)) & 1 == 1
        logits = values["target_logits"][row].cpu().masked_fill(~allowed[:600], -INF)
        if logits.max() == -INF:
            assert token == 0
            continue
        temperature = float(values["temperature"][request])
        if temperature == 0:
            assert token == int(logits.argmax())
            continue
        kept = (logits.double() / temperature).softmax(0)
        kept[kept < (1 - 1e-4) * float(values["min_p"][request]) * kept.max()] = 0
        if 0 < (k := int(values["top_k"][request])) < 600:
            kept[kept < kept.sort(descending=True).values[k - 1]] = 0
        before = kept.sort(descending=True).values.cumsum(0) / kept.sum()
        larger = (kept > kept[token]).sum()
        assert kept[token] > 0
        assert larger == 0 or before[larger - 1] < float(values["top_p"][request]) + 1e-6


@runs_kernels
@in_every_form
def test_verify_reads_rows_at_any_stride(form: dict) -> None:
    values = case(32, 3, 700)
    wide = torch.full((values["target_logits"].shape[0], 1001), NAN, device=DEVICE)
    wide[:, 3:703] = values["target_logits"]
    cache = torch.full((32, 5, 911), NAN, device=DEVICE)
    cache[:, 1:4, 7:707] = values["draft_logits"]
    strided = values | {"target_logits": wide[:, 3:703], "draft_logits": cache[:, 1:4, 7:707]}
    assert_bitwise_equal(verify(**strided, **form), verify(**values, **form))


@runs_kernels
@pytest.mark.parametrize(("max_drafts", "step"), [(2, 0), (3, 1)])
def test_verify_edge_cases(max_drafts: int, step: int) -> None:
    assert_edge_case(assert_equals_reference(edge_case(max_drafts, step)), max_drafts, step)


@runs_kernels
@in_every_form
def test_verify_of_nothing(form: dict) -> None:
    out = verify(**case(0, 3, 100), **form)
    assert out.token_ids.shape == (0, 4) and out.num_accepted.shape == (0,)


@runs_kernels
@pytest.mark.parametrize("single_launch", [False, True])
def test_verify_reuses_a_workspace(single_launch: bool) -> None:
    workspace = poisoned(40, 3, 100)
    for batch, max_drafts in ((24, 3), (40, 3), (3, 2)):
        values = case(batch, max_drafts, 100, seed=batch)
        reused = verify(**values, workspace=workspace, single_launch=single_launch)
        assert not workspace.row_tickets.any() and not workspace.request_tickets.any()
        assert (workspace.first_rejected == 2**30).all()
        assert_bitwise_equal(reused, verify(**values))


@repeats_on_a_gpu
@pytest.mark.parametrize("vocab_size", [20_000, 151_936])
def test_verify_in_a_graph_has_no_races(vocab_size: int) -> None:
    """Both forms, over and over, against their first results, whose tokens are the same."""
    values = with_draft_statistics(case(64, 3, vocab_size, torch.bfloat16))
    workspace = poisoned(64, 3, vocab_size)
    tokens = verify(**values).token_ids
    for single_launch in (False, True):

        def run(single_launch=single_launch) -> Verification:
            return verify(**values, workspace=workspace, single_launch=single_launch)

        assert torch.equal(run().token_ids, tokens)
        bits = on_spoiled_scratch(run, [workspace])
        assert count_mismatches(bits, bits(), 20_000) == 0


@plants_faults
@pytest.mark.parametrize(
    "number", [lambda workspace: workspace.target_statistics[3], lambda workspace: workspace.verdicts]
)
def test_looking_for_races_finds_numbers_that_come_too_late(monkeypatch, number) -> None:
    """One number is never written again, so that each repeat reads the one before's: the right one, but for `spoil`."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    values = with_draft_statistics(case(8, 3, 9000, torch.bfloat16))
    workspace = poisoned(8, 3, 9000)

    def run() -> Verification:
        return verify(**values, workspace=workspace)

    expected = as_integers(run())
    row = 4 * 4  # the first of a request that is sampled; greedy rows need less of what they keep
    store, late = InterpreterBuilder.create_masked_store, number(workspace).view(32, -1)[row].data_ptr()

    def store_all_but_one(builder, pointers, value, mask, *others):
        return store(builder, pointers, value, TensorHandle(mask.data & (pointers.data != late), mask.dtype), *others)

    assert count_mismatches(on_spoiled_scratch(run, [workspace]), expected, 2) == 0
    run()
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", store_all_but_one)
    assert count_mismatches(lambda: as_integers(run()), expected, 2) == 0
    assert count_mismatches(on_spoiled_scratch(run, [workspace]), expected, 2) > 0


@runs_kernels
@pytest.mark.parametrize(("integers", "single_launch"), [(torch.int32, False), (torch.int64, True)])
def test_verify_by_slot(integers: torch.dtype, single_launch: bool) -> None:
    """Per-slot tensors, rows in any place, other integer types, and padding rows."""
    values = with_draft_statistics(case(16, 3, 513))
    out = verify(**values)
    slots = torch.randperm(20, generator=torch.Generator().manual_seed(1))[:18].to(DEVICE)
    slots[16:] = -1
    by_slot = {}
    for name in ("temperature", "seeds", "draft_logits", "draft_logsumexp", "draft_argmax"):
        value = values[name]
        num_rows = 21 if name.startswith("draft") else 20  # the caches have a spare row
        by_slot[name] = torch.full((num_rows, *value.shape[1:]), 0, dtype=value.dtype, device=DEVICE)
        by_slot[name][slots[:16]] = value
    num_draft_tokens = F.pad(values["num_draft_tokens"], (0, 2), value=3)
    first_rows = F.pad((values["num_draft_tokens"] + 1).cumsum(0), (1, 1))[:18]
    padded = verify(
        values["target_logits"],
        F.pad(values["draft_token_ids"], (0, 0, 0, 2)).to(integers),
        by_slot.pop("draft_logits"),
        num_draft_tokens.to(integers),
        by_slot.pop("temperature"),
        by_slot.pop("seeds"),
        F.pad(values["positions"], (0, 2)).to(integers),
        one_hot=F.pad(values["one_hot"], (0, 2)),
        slots=slots.to(integers),
        first_rows=first_rows.to(integers),
        single_launch=single_launch,
        **by_slot,
    )
    assert_bitwise_equal(select_output(padded, list(range(16))), out)
    assert padded.num_accepted[16:].tolist() == [0, 0] and padded.token_ids[16:, 0].tolist() == [0, 0]


@runs_kernels
def test_verify_past_the_cache_is_one_hot() -> None:
    """Slots without a row in the draft tensors; the same from the fallback."""
    from vllm_bebop.kernels import fallback

    values = with_draft_statistics(case(32, 3, 100))
    out = verify(**values | {"one_hot": values["one_hot"] | (torch.arange(32, device=DEVICE) >= 12)})
    for name in ("draft_logits", "draft_logsumexp", "draft_argmax"):
        values[name] = values[name][:12]
    slots = torch.arange(32, device=DEVICE)
    assert_bitwise_equal(verify(**values, slots=slots), out)
    eager = fallback.verify(**values, slots=slots)
    assert torch.equal(eager.token_ids, out.token_ids) and torch.equal(eager.num_accepted, out.num_accepted)
    assert (out.num_accepted[12:] > 0).any() and (out.num_accepted[:12] > 0).any()


@plants_faults
@pytest.mark.parametrize("block", [False, True])
def test_verify_reads_no_row_past_the_cache(block: bool, monkeypatch) -> None:
    """By the addresses that are loaded: what is read there would change nothing, but need not be readable."""
    from triton.runtime.interpreter import InterpreterBuilder

    values = with_draft_statistics(case(32, 3, 100))
    values["draft_threshold"] = torch.full_like(values["draft_logsumexp"], -INF)
    beyond = []
    for name in ("draft_logits", "draft_logsumexp", "draft_argmax", "draft_threshold"):
        whole = values[name]
        values[name] = whole[:12]
        beyond.append((whole[12].data_ptr(), whole.data_ptr() + whole.nbytes))
    load, num_loads = InterpreterBuilder.create_masked_load, 0

    def watched_load(builder, pointers, mask, *others):
        nonlocal num_loads
        addresses = pointers.data[mask.data]
        num_loads += addresses.size
        assert not any(((addresses >= start) & (addresses < end)).any() for start, end in beyond)
        return load(builder, pointers, mask, *others)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", watched_load)
    verify(**values, slots=torch.arange(32, device=DEVICE), block=block)
    assert num_loads > 0


@runs_kernels
@in_every_form
def test_verify_counts_tokens_of_what_was_scheduled(form: dict) -> None:
    """Where more drafts are accepted, the first that was not scheduled is the last token; else nothing changes."""
    values = case(64, 3, 100)
    out = verify(**values, **form)
    assert torch.equal(out.num_tokens, (out.num_accepted + 1).int())
    scheduled = (values["num_draft_tokens"] - torch.arange(64, device=DEVICE) % 2).clamp(min=0)
    expected = torch.minimum(out.num_accepted, scheduled) + 1
    assert (expected <= out.num_accepted).sum() >= 5
    cut = verify(**values, **form, num_scheduled=scheduled.to(torch.int64 if form else torch.int32))
    assert_bitwise_equal(cut, dataclasses.replace(out, num_tokens=expected.int()))
    if "single_launch" not in form:
        rule = {"rule": accept_block} if form else {}
        eager = verify_reference(**values, **rule, num_scheduled=scheduled)
        assert torch.equal(eager.num_tokens, expected.int())


@runs_kernels
@in_every_form
@pytest.mark.parametrize("counts", [[99, -5, 2, 2], [-5, 99, 2, 2]])
def test_verify_stays_inside_its_tensors_on_wrong_counts(counts: list[int], form: dict) -> None:
    """Counts are not checked on the device, so they are clamped: rows that are not there read as empty."""
    values = case(4, 2, 100)
    values["num_draft_tokens"] = torch.tensor(counts, device=DEVICE)
    values["target_logits"] = F.pad(values["target_logits"][:5], (0, 0, 10, 200), value=NAN)[10:15]
    out = verify(**values, **form)
    assert not out.num_nan.any()
    assert ((out.num_accepted >= 0) & (out.num_accepted <= 2)).all()
    assert (out.token_ids < 100).all()


@runs_kernels
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("target_logits", torch.zeros(4)),
        ("target_logits", torch.zeros(8, 100, dtype=torch.float64)),
        ("draft_token_ids", torch.zeros(4, 2)),
        ("draft_logits", torch.zeros(4, 3, 100)),
        ("draft_logits", torch.zeros(4, 2, 99)),
        ("num_draft_tokens", torch.zeros(3, dtype=torch.int64)),
        ("temperature", torch.zeros(5)),
        ("seeds", torch.zeros(4, dtype=torch.int32)),
        ("positions", torch.zeros(4)),
        ("one_hot", torch.zeros(4, dtype=torch.int64)),
        ("bitmask", torch.zeros(4, 4, dtype=torch.int32)),
        ("bitmask", torch.zeros(8, 3, dtype=torch.int32)),
        ("draft_threshold", torch.zeros(4, 2)),
        ("slots", torch.zeros(3, dtype=torch.int64)),
        ("first_rows", torch.zeros(4)),
        ("num_scheduled", torch.zeros(4)),
        ("totals", torch.zeros(6, 4, dtype=torch.float64)),
        ("draft_logsumexp", torch.zeros(4, 3)),
        ("draft_argmax", torch.zeros(4, 2)),
        ("workspace", (2, 2, 100)),
        ("workspace", (4, 1, 100)),
        ("workspace", (4, 2, 101)),
    ],
)
def test_verify_names_the_wrong_argument(name: str, wrong) -> None:
    from vllm_bebop.kernels import verification

    wrong = poisoned(*wrong) if isinstance(wrong, tuple) else wrong.to(DEVICE)
    with pytest.raises(ValueError, match=name):
        verification.verify(**case(4, 2, 100) | {name: wrong})


@runs_kernels
@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p"])
def test_verify_names_the_wrong_filter(name: str) -> None:
    from vllm_bebop.kernels import verification

    with pytest.raises(ValueError, match=name):
        verification.verify(**case(4, 2, 100), filters=Filters(**{name: torch.zeros(4, dtype=torch.float64)}))
