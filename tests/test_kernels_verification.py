"""Fused verification equals the reference token for token, in both of its forms, and its output follows p.

Runs on the GPU where there is one, otherwise in Triton's interpreter: see test_kernels_sampling.
"""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.statistics import assert_fault_is_caught, assert_laws, g_test, independence_test
from tests.test_kernels_sampling import (
    DEVICE,
    INF,
    NAN,
    RUNS_HERE,
    TEMPERATURES,
    assert_bitwise_equal,
    assert_no_less_accurate,
    count_mismatches,
    plants_faults,
    repeats_on_a_gpu,
    run_in_the_interpreter,
    runs_kernels,
    smallest_margin,
)
from vllm_bebop.kernels import reference
from vllm_bebop.kernels.reference import Verification, sample_reference, verify_reference

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # log(0) in the interpreter


def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


test_in_the_interpreter.__test__ = not RUNS_HERE


def case(batch: int, max_drafts: int, vocab_size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict:
    """Requests with 0 .. max_drafts drafts: sampled, greedy and one-hot, some without a token or without a q."""
    generator = torch.Generator().manual_seed(seed)
    requests = torch.arange(batch)
    num_draft_tokens = (requests * 7 + max_drafts) % (max_drafts + 1)
    draft_logits = torch.randn(batch, max_drafts, vocab_size, generator=generator) * 3
    temperature = torch.tensor(TEMPERATURES)[requests // 2 % 4]
    seeds = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator)
    positions = torch.randint(0, 2**31 - 100, (batch,), generator=generator)
    rows = [
        F.pad(draft_logits[r, :n], (0, 0, 0, 1)) + 0.7 * torch.randn(n + 1, vocab_size, generator=generator)
        for r, n in enumerate(num_draft_tokens.tolist())
    ]
    draft_logits = draft_logits.to(dtype)
    steps = [
        sample_reference(draft_logits[:, i], temperature, seeds, positions + i).token_ids for i in range(max_drafts)
    ]
    token_ids = torch.stack(steps, dim=1) if steps else torch.empty(batch, 0, dtype=torch.int64)
    token_ids[torch.arange(max_drafts) >= num_draft_tokens[:, None]] = -1
    token_ids[11::16, :1] = -1
    token_ids[13::16, 1:2] = vocab_size
    draft_logits[14::16, :1] = -INF
    values = {
        "target_logits": torch.cat([*rows, torch.empty(0, vocab_size)]).to(dtype),
        "draft_token_ids": token_ids,
        "draft_logits": draft_logits,
        "num_draft_tokens": num_draft_tokens,
        "temperature": temperature,
        "seeds": seeds,
        "positions": positions,
        "one_hot": requests % 5 == 2,
    }
    return {name: value.to(DEVICE) for name, value in values.items()}


def with_draft_statistics(values: dict) -> dict:
    """The same case with what `sample` would have kept of q."""
    batch, max_drafts, vocab_size = values["draft_logits"].shape
    logits = values["draft_logits"].flatten(0, 1)
    temperature = values["temperature"].repeat_interleave(max_drafts)
    zeros = torch.zeros(batch * max_drafts, dtype=torch.int64, device=DEVICE)
    out = sample_reference(logits, temperature, zeros, zeros)
    return values | {
        "draft_logsumexp": out.logsumexp.view(batch, max_drafts),
        "draft_argmax": logits.argmax(dim=1).view(batch, max_drafts),
    }


def select(values: dict, order: list[int]) -> dict:
    """The same requests in another order, or a part of them."""
    rows = values["target_logits"].split((values["num_draft_tokens"] + 1).tolist())
    chosen = {
        name: value[order] if isinstance(value, Tensor) and name != "target_logits" else value
        for name, value in values.items()
    }
    return chosen | {"target_logits": torch.cat([rows[r] for r in order])}


def select_output(out: Verification, order: list[int]) -> Verification:
    return Verification(**{field.name: getattr(out, field.name)[order] for field in dataclasses.fields(out)})


def poisoned(batch: int, max_drafts: int, vocab_size: int, **options):
    from vllm_bebop.kernels.verification import VerificationWorkspace

    workspace = VerificationWorkspace(batch, max_drafts, vocab_size, DEVICE, **options)
    for name, value in vars(workspace).items():
        if isinstance(value, Tensor) and name not in ("row_tickets", "request_tickets", "first_rejected"):
            value.fill_(NAN if value.is_floating_point() else -7)
    return workspace


def verify(target_logits, draft_token_ids, draft_logits, *others, workspace=None, **options) -> Verification:
    """`verification.verify` with poisoned scratch."""
    from vllm_bebop.kernels.verification import verify

    workspace = workspace or poisoned(*draft_token_ids.shape, target_logits.shape[1])
    return verify(target_logits, draft_token_ids, draft_logits, *others, workspace=workspace, **options)


def assert_equals_reference(values: dict, **options) -> Verification:
    """Both forms against the reference; returns the output of the two-launch form."""
    ours = verify(**values, **options)
    assert_bitwise_equal(verify(**values, **options, single_launch=True), ours)

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
    is_exact = estimated & point_mass[:, None]
    torch.testing.assert_close(ours.overlap[is_exact].double(), exact.overlap[is_exact], rtol=1e-4, atol=1e-6)
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
@pytest.mark.parametrize("thinning_rounds", [0, 1])
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
    values = case(64, 3, 600)
    values["target_logits"] = values["target_logits"].round().masked_fill(values["target_logits"] < -2, -INF)
    if no_draft_logits:
        del values["one_hot"]
        values["draft_logits"] = None
    assert_equals_reference(values, target_is_processed=True)


@runs_kernels
def test_verify_reads_rows_at_any_stride() -> None:
    values = case(32, 3, 700)
    whole = verify(**values)
    wide = torch.full((values["target_logits"].shape[0], 1001), NAN, device=DEVICE)
    wide[:, 3:703] = values["target_logits"]
    cache = torch.full((32, 5, 911), NAN, device=DEVICE)
    cache[:, 1:4, 7:707] = values["draft_logits"]
    strided = values | {"target_logits": wide[:, 3:703], "draft_logits": cache[:, 1:4, 7:707]}
    assert_bitwise_equal(verify(**strided), whole)
    assert_bitwise_equal(verify(**strided, single_launch=True), whole)


@runs_kernels
def test_verify_edge_cases() -> None:
    """NaN, infinities and empty rows; p equal to q; tokens that p or q excludes."""
    vocab_size, batch = 600, 16
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(batch, 2, vocab_size, generator=generator) * 2
    draft_logits = logits[:, :1].clone()
    token_ids = draft_logits.argmax(dim=2)
    logits[0:2, 0] = -INF  # an empty row rejects, and gives token 0
    logits[2:4, 0, 1::2] = NAN
    logits[4:6, 0, 5] = INF
    logits[6, 0].scatter_(0, token_ids[6], -INF)  # p(y) = 0
    draft_logits[7, 0].scatter_(0, token_ids[7], -INF)  # q(y) = 0: from p
    draft_logits[8, 0] = NAN  # no q: from p
    values = {
        "target_logits": logits.flatten(0, 1).to(DEVICE),
        "draft_token_ids": token_ids.to(DEVICE),
        "draft_logits": draft_logits.to(DEVICE),
        "num_draft_tokens": torch.ones(batch, dtype=torch.int64, device=DEVICE),
        "temperature": torch.full((batch,), 0.8, device=DEVICE),
        "seeds": torch.arange(batch, device=DEVICE),
        "positions": torch.full((batch,), 9, device=DEVICE),
    }
    out = assert_equals_reference(values)
    assert out.num_accepted[9:].tolist() == [1] * 7  # p equal to q always accepts
    assert out.num_accepted[[0, 1, 6, 7, 8]].tolist() == [0] * 5
    assert out.token_ids[:2, 0].tolist() == [0, 0] and out.num_empty_rows.tolist() == [1, 1] + [0] * 14
    assert out.num_nan[2:4].tolist() == [300, 300]


@runs_kernels
def test_verify_of_nothing() -> None:
    out = verify(**case(0, 3, 100))
    assert out.token_ids.shape == (0, 4) and out.num_accepted.shape == (0,)


@runs_kernels
@pytest.mark.parametrize("single_launch", [False, True])
def test_verify_does_not_depend_on_the_batch(monkeypatch, single_launch: bool) -> None:
    from vllm_bebop.kernels import draft_sampling

    values = with_draft_statistics(case(8, 2, 700, torch.bfloat16))
    out = verify(**values, single_launch=single_launch)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1)).tolist()
    assert_bitwise_equal(verify(**select(values, order), single_launch=single_launch), select_output(out, order))
    part = list(range(3, 6))
    assert_bitwise_equal(verify(**select(values, part), single_launch=single_launch), select_output(out, part))
    monkeypatch.setattr(draft_sampling, "INTERPRETER_ELEMENTS", 1)  # one request per program, so that tiles exit early
    assert_bitwise_equal(verify(**values, single_launch=single_launch), out)


@runs_kernels
@pytest.mark.parametrize("single_launch", [False, True])
def test_verify_reuses_a_workspace(single_launch: bool) -> None:
    workspace = poisoned(40, 4, 300)
    for batch, max_drafts in ((24, 3), (40, 4), (3, 1)):
        values = case(batch, max_drafts, 300, seed=batch)
        reused = verify(**values, workspace=workspace, single_launch=single_launch)
        assert not workspace.row_tickets.any() and not workspace.request_tickets.any()
        assert (workspace.first_rejected == 2**30).all()
        assert_bitwise_equal(reused, verify(**values))


@repeats_on_a_gpu
@pytest.mark.parametrize("vocab_size", [20_000, 151_936])
def test_verify_in_a_graph_has_no_races(vocab_size: int) -> None:
    """Both forms, over and over, against the first result of the two-launch form."""
    values = with_draft_statistics(case(64, 3, vocab_size, torch.bfloat16))
    workspace = poisoned(64, 3, vocab_size)
    tokens = verify(**values).token_ids
    for single_launch in (False, True):

        def run(single_launch=single_launch) -> Tensor:
            return verify(**values, workspace=workspace, single_launch=single_launch).token_ids

        assert torch.equal(run(), tokens)
        assert count_mismatches(run, 20_000) == 0


@runs_kernels
@pytest.mark.parametrize("single_launch", [False, True])
@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
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
def test_verify_stays_inside_its_tensors_on_wrong_counts() -> None:
    """Counts are not checked on the device, so they are clamped: more rows than there are read as empty."""
    values = case(4, 2, 100)
    values["num_draft_tokens"] = torch.tensor([99, -5, 2, 2], device=DEVICE)
    values["target_logits"] = values["target_logits"][:5]
    out = verify(**values)
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
        ("slots", torch.zeros(3, dtype=torch.int64)),
        ("first_rows", torch.zeros(4)),
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


# --- Laws -----------------------------------------------------------------------------------------------------------

P = torch.tensor(
    [[0.25, 0.14, 0.18, 0.13, 0.00, 0.30], [0.10, 0.25, 0.15, 0.25, 0.15, 0.10], [0.25, 0.15, 0.20, 0.05, 0.30, 0.05]]
)
Q = torch.tensor([[0.10, 0.20, 0.25, 0.20, 0.10, 0.15], [0.15, 0.10, 0.25, 0.10, 0.25, 0.15]])
NUM_SAMPLES = 40_000


def laws(num_samples: int, first_seed: int, *, one_hot: bool = False, single_launch: bool = False) -> dict[str, float]:
    """P-values of low-dimensional laws of two drafts, drawn by the fused sampler, and a bonus."""
    from vllm_bebop.kernels.draft_sampling import sample

    vocab_size = P.shape[1]
    seeds = torch.arange(first_seed, first_seed + num_samples, device=DEVICE)
    positions, temperature = torch.full_like(seeds, 100), torch.ones(num_samples, device=DEVICE)
    q = torch.eye(vocab_size)[Q.argmax(1)] if one_hot else Q
    draft_logits = q.log().to(DEVICE).expand(num_samples, 2, vocab_size)
    draws = [sample(draft_logits[:, i], temperature, seeds, positions + i) for i in range(2)]
    token_ids = torch.stack([draw.token_ids for draw in draws], dim=1)
    out = verify(
        P.log().repeat(num_samples, 1).to(DEVICE),
        token_ids,
        None if one_hot else draft_logits,
        torch.full_like(seeds, 2),
        temperature,
        seeds,
        positions,
        draft_logsumexp=None if one_hot else torch.stack([draw.logsumexp for draw in draws], dim=1),
        single_launch=single_launch,
    )
    first, second, third = out.token_ids.cpu().unbind(1)
    token_ids, num_accepted = token_ids.cpu(), out.num_accepted.cpu()
    rejected, one, two = (num_accepted == k for k in range(3))
    overlap = torch.minimum(P[:2], q).sum(1)
    residual = (P[:2] - q).clamp(min=0)

    def count(tokens: Tensor) -> np.ndarray:
        return tokens.bincount(minlength=vocab_size).numpy()

    def table(rows: Tensor, columns: Tensor) -> np.ndarray:
        return (rows * vocab_size + columns).bincount(minlength=vocab_size**2).view(vocab_size, vocab_size).numpy()

    # The estimate of the overlap: mean of min(1, p(y) / q(y)), within five standard errors.
    estimate = out.overlap[:, 0].cpu().double()
    error = (estimate.mean() - overlap[0]).abs().item()
    assert error <= 5 * estimate.std().item() / num_samples**0.5 + 1e-6
    return {
        "accepted count": g_test(
            num_accepted.bincount(minlength=3).numpy(), [1 - overlap[0], overlap[0] * (1 - overlap[1]), overlap.prod()]
        ),
        "token 1": g_test(count(first), P[0].numpy()),
        "token 2 given one accepted": g_test(count(second[~rejected]), P[1].numpy()),
        "bonus": g_test(count(third[two]), P[2].numpy()),
        "residual 1": g_test(count(first[rejected]), residual[0].numpy()),
        "residual 2": g_test(count(second[one]), residual[1].numpy()),
        "rejected x recovered": independence_test(table(token_ids[rejected, 0], first[rejected])),
        "token 1 x token 2": independence_test(table(first[~rejected], second[~rejected])),
        "token 2 x bonus": independence_test(table(second[two], third[two])),
    }


@runs_kernels
@pytest.mark.parametrize("single_launch", [False, True])
def test_verify_laws(single_launch: bool) -> None:
    assert_laws(lambda n, first: laws(n, first, single_launch=single_launch), NUM_SAMPLES)


@runs_kernels
def test_verify_laws_one_hot() -> None:
    assert_laws(lambda n, first: laws(n, first, one_hot=True), NUM_SAMPLES)


@runs_kernels
@pytest.mark.parametrize("thinning_rounds", [0, 1])
def test_verify_laws_when_thinning_gives_up(monkeypatch, thinning_rounds: int) -> None:
    monkeypatch.setattr(reference, "NUM_THINNING_ROUNDS", thinning_rounds)
    assert_laws(laws, NUM_SAMPLES)


def plant_residual_from_p(uniform):
    """Thinning keeps every draw, so that the recovered token follows p."""
    return lambda seed, position, stream, index, attempt: (
        uniform(seed, position, stream, index, attempt) + (2.0**60 if int(stream) == 7 else 0.0)
    )


def plant_shared_accept_noise(uniform):
    """Thinning reuses the accept uniform, which is known to be large after a rejection."""
    return lambda seed, position, stream, index, attempt: uniform(seed, position, 2, index, 0)


def plant_biased_uniform(uniform):
    """The accept uniform is 3 % too small."""
    return lambda seed, position, stream, index, attempt: (
        uniform(seed, position, stream, index, attempt) * (0.97 if int(stream) == 2 else 1.0)
    )


@plants_faults
@pytest.mark.parametrize("plant", [plant_residual_from_p, plant_shared_accept_noise, plant_biased_uniform])
def test_planted_faults_are_caught(monkeypatch, plant) -> None:
    from vllm_bebop.kernels import verification

    monkeypatch.setattr(verification, "uniform", plant(verification.uniform))
    assert_fault_is_caught(laws, 2 * NUM_SAMPLES)
