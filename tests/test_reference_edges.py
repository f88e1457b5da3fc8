"""What the reference sampler does where a definition leaves room, and with arguments that are wrong."""

import dataclasses
import math

import pytest
import torch

from tests.support.requests import (
    INF,
    NAN,
    assert_bitwise_equal,
    mixed_batch,
    requests,
    verify_one,
)
from tests.support.statistics import g_test
from vllm_bebop.kernels import reference
from vllm_bebop.kernels.philox import Stream
from vllm_bebop.kernels.reference import sample_reference, verify_reference

TARGET_STREAMS = (Stream.TARGET_BLOCK, Stream.TARGET_TOKEN)


def test_empty_batch() -> None:
    empty = requests(0)
    assert sample_reference(torch.empty(0, 5), **empty).token_ids.shape == (0,)
    for draft_logits in (torch.empty(0, 3, 5), None):
        none = torch.empty(0, dtype=torch.int64)
        out = verify_reference(torch.empty(0, 5), none.view(0, 3), draft_logits, none, **empty)
        assert out.token_ids.shape == (0, 4) and out.overlap.shape == (0, 3)


def test_no_drafts_draws_the_bonus_from_row_0() -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    shared = requests(6)
    plain = sample_reference(logits, **shared, streams=TARGET_STREAMS)
    for width, draft_logits in ((0, None), (0, torch.empty(6, 0, 40)), (2, torch.full((6, 2, 40), NAN))):
        no_drafts = torch.full((6, width), -1)
        out = verify_reference(logits, no_drafts, draft_logits, torch.zeros(6, dtype=torch.int64), **shared)
        assert torch.equal(out.token_ids[:, 0], plain.token_ids)
        assert (out.num_accepted == 0).all() and (out.token_ids[:, 1:] == -1).all()


def test_greedy_takes_the_lowest_argmax_and_accepts_only_it() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0]] * 3)
    for temperature in (0.0, 9e-6):
        out = sample_reference(logits, **requests(3, temperature))
        assert out.token_ids.tolist() == [1, 1, 1]
        assert out.log_prob.tolist() == [0, 0, 0] and out.entropy_nats.tolist() == [0, 0, 0]
        assert out.logsumexp.tolist() == [2, 2, 2]
        for draft_logits in (None, torch.zeros(2, 4)):  # what q was does not matter
            assert verify_one(logits, [1, 1], draft_logits, temperature).token_ids.tolist() == [[1, 1, 1]]
            rejected = verify_one(logits, [1, 3], draft_logits, temperature)  # 3 ties with 1, which has the lower id
            assert rejected.token_ids.tolist() == [[1, 1, -1]] and rejected.num_accepted.tolist() == [1]
            assert rejected.target_entropy_nats.tolist() == [[0, 0, 0]]
            assert rejected.overlap.tolist() == [[1, 0]] and rejected.draft_argmax_prob.tolist() == [[1, 0]]


def test_greedy_ties_across_sub_blocks() -> None:
    logits = torch.zeros(1, 1500)
    logits[0, [600, 700, 1400]] = 1.0
    assert sample_reference(logits, **requests(1, 0.0)).token_ids.tolist() == [600]


def test_token_of_zero_target_probability_is_rejected_and_never_emitted() -> None:
    target = torch.tensor([[-INF, 0.0, 0.0], [0.0, 0.0, 0.0]])
    n = 1000
    draft_logits = torch.tensor([5.0, 0.0, 0.0]).expand(n, 1, 3)
    one, zero = torch.ones(n, dtype=torch.int64), torch.zeros(n, 1, dtype=torch.int64)
    out = verify_reference(target.repeat(n, 1), zero, draft_logits, one, **requests(n))
    assert (out.num_accepted == 0).all() and set(out.token_ids[:, 0].tolist()) == {1, 2}


@pytest.mark.parametrize("case", ["q(y) = 0", "empty q", "padding", "id past the vocabulary", "one-hot padding"])
def test_missing_draft_is_rejected_and_p_is_sampled(case: str) -> None:
    """The token is the one that p gives on the target streams, not a residual."""
    n, vocab_size = 300, 5
    target = torch.randn(2, vocab_size, generator=torch.Generator().manual_seed(0))
    token = {"padding": -1, "one-hot padding": -1, "id past the vocabulary": vocab_size}.get(case, 2)
    q_logits = torch.zeros(vocab_size)
    if case == "q(y) = 0":
        q_logits[2] = -INF
    if case == "empty q":
        q_logits[:] = -INF
    shared = requests(n)
    out = verify_reference(
        target.repeat(n, 1),
        torch.full((n, 1), token),
        None if case == "one-hot padding" else q_logits.expand(n, 1, vocab_size),
        torch.ones(n, dtype=torch.int64),
        **shared,
    )
    plain = sample_reference(target[:1].expand(n, -1), **shared, streams=TARGET_STREAMS)
    assert (out.num_accepted == 0).all()
    assert torch.equal(out.token_ids[:, 0], plain.token_ids)
    assert out.overlap.isnan().all() == (case in ("empty q", "one-hot padding"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_p_equal_to_q_always_accepts(monkeypatch, dtype: torch.dtype) -> None:
    largest = torch.tensor(1 - 2.0**-24)
    monkeypatch.setattr(reference, "uniform", lambda seeds, positions, *_, **__: largest.expand_as(seeds + positions))
    vocab_size, batch = 5000, 20
    draft_logits = torch.randn(batch, 2, vocab_size, generator=torch.Generator().manual_seed(0)) * 8
    shared = requests(batch, 0.9)
    target = torch.cat([draft_logits, torch.zeros(batch, 1, vocab_size)], dim=1).flatten(0, 1)
    # Any token, however unlikely: its log-probability is large, and rounding must not decide.
    token_ids = torch.randint(vocab_size, (batch, 2), generator=torch.Generator().manual_seed(1))
    out = verify_reference(target, token_ids, draft_logits, torch.full((batch,), 2), **shared, dtype=dtype)
    assert (out.num_accepted == 2).all()


def test_zero_residual_keeps_the_last_draw_from_p() -> None:
    log_p = torch.tensor([[0.1, 0.2, 0.7]]).log().expand(500, 3)
    rows = reference._Rows.from_scores(log_p)
    shared = requests(500)
    tokens = reference._sample_residual(rows, rows.log_probs(), shared["seeds"], shared["positions"])
    last = rows.draw(
        shared["seeds"],
        shared["positions"],
        (Stream.THINNING_BLOCK, Stream.THINNING_TOKEN),
        reference.NUM_THINNING_ROUNDS - 1,
    )
    assert torch.equal(tokens, last)
    assert g_test(tokens.bincount(minlength=3).numpy(), [0.1, 0.2, 0.7]) > 1e-4


def test_residual_never_gives_a_token_outside_its_support() -> None:
    """q covers all of p but one rare token: thinning almost always gives up, and only that token may come out."""
    p = torch.tensor([0.5 - 1e-4, 1e-4, 0.5])
    q = torch.tensor([0.5, 0.0, 0.5])
    rows = reference._Rows.from_scores(p.log().expand(2000, 3))
    shared = requests(2000)
    log_q = q.log().expand(2000, 3)
    tokens = reference._sample_residual(rows, log_q, shared["seeds"], shared["positions"])
    assert (tokens == 1).float().mean() > 0.99  # 0.5 - 1e-4 and 0.5 differ from q by rounding only
    assert (tokens != 0).all()


def test_nan_is_minus_infinity_and_counted() -> None:
    clean = torch.randn(3, 600, generator=torch.Generator().manual_seed(0))
    clean[1, 10:20] = -INF
    dirty = clean.clone()
    dirty[1, 10:20] = NAN
    expected, out = (sample_reference(logits, **requests(3)) for logits in (clean, dirty))
    assert out.num_nan.tolist() == [0, 10, 0] and expected.num_nan.tolist() == [0, 0, 0]
    assert_bitwise_equal(dataclasses.replace(out, num_nan=expected.num_nan), expected)
    for temperature in (0.0, 1.0):
        expected, out = (verify_one(rows, [1, 2], clean[:2], temperature) for rows in (clean, dirty))
        assert out.num_nan.tolist() == [10]
        assert_bitwise_equal(dataclasses.replace(out, num_nan=expected.num_nan), expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_plus_infinity_is_clamped_and_wins(temperature: float) -> None:
    logits = torch.zeros(3, 600)
    logits[:, 550] = INF
    logits[0, 580] = INF  # a tie: the lowest id
    out = sample_reference(logits, **requests(3, temperature))
    assert out.token_ids.tolist() == [550] * 3
    assert out.log_prob.isfinite().all() and out.entropy_nats.isfinite().all()
    assert verify_one(logits, [1, 2], None, temperature).token_ids.tolist() == [[550, -1, -1]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("fill", [-INF, NAN])
def test_empty_row_gives_token_0_and_is_counted(temperature: float, fill: float) -> None:
    empty = torch.full((1, 600), fill)
    sample = sample_reference(empty, **requests(1, temperature))
    assert sample.token_ids.tolist() == [0] and sample.is_empty.tolist() == [True]
    assert sample.log_prob.tolist() == [-INF] and sample.entropy_nats.tolist() == [0]
    for token in (0, 5):
        for draft_logits in (None, torch.zeros(2, 600)):
            target = torch.cat([empty, torch.zeros(1, 600), empty])
            out = verify_one(target, [token, 1], draft_logits, temperature)
            assert out.token_ids.tolist() == [[0, -1, -1]] and out.num_accepted.tolist() == [0]
            assert out.num_empty_rows.tolist() == [2]


def test_processed_target_keeps_its_temperature_and_masks() -> None:
    """Processed rows equal raw rows whose temperature and top-k mask the caller applied; greedy still means argmax."""
    arguments = mixed_batch()
    temperature_of_row = arguments["temperature"].repeat_interleave(arguments["num_draft_tokens"] + 1)
    divisor = torch.where(temperature_of_row < 1e-5, 1.0, temperature_of_row)[:, None]
    masked = arguments["target_logits"].clone()
    masked[masked < masked.topk(20).values[:, -1:]] = -INF
    raw = verify_reference(**arguments | {"target_logits": masked})
    processed = verify_reference(**arguments | {"target_logits": masked / divisor}, target_is_processed=True)
    assert_bitwise_equal(processed, raw)


@pytest.mark.parametrize(
    "name, value",
    [
        ("target_logits", torch.zeros(3, 8)),
        ("target_logits", torch.zeros(4, 8, dtype=torch.int64)),
        ("target_logits", torch.zeros(4, 0)),
        ("target_logits", torch.zeros(4, 8, 1)),
        ("draft_token_ids", torch.zeros(2, dtype=torch.int64)),
        ("draft_token_ids", torch.zeros(2, 2, dtype=torch.int32)),
        ("draft_logits", torch.zeros(2, 2, 7)),
        ("draft_logits", torch.zeros(2, 2, 8, device="meta")),
        ("num_draft_tokens", torch.tensor([1, 1, 0])),
        ("num_draft_tokens", torch.tensor([-1, 3])),
        ("num_draft_tokens", torch.tensor([3, -1])),
        ("temperature", torch.ones(2, dtype=torch.float64)),
        ("seeds", torch.zeros(3, dtype=torch.int64)),
        ("positions", torch.zeros(2)),
        ("one_hot", torch.zeros(2, dtype=torch.int64)),
        ("dtype", torch.bfloat16),
    ],
)
def test_verify_names_the_wrong_argument(name: str, value) -> None:
    arguments = {
        "target_logits": torch.zeros(4, 8),
        "draft_token_ids": torch.zeros(2, 2, dtype=torch.int64),
        "draft_logits": torch.zeros(2, 2, 8),
        "num_draft_tokens": torch.tensor([1, 1]),
        **requests(2),
    }
    verify_reference(**arguments)
    with pytest.raises(ValueError, match=f"^{name} "):
        verify_reference(**arguments | {name: value})


@pytest.mark.parametrize(
    "name, value",
    [
        ("logits", torch.zeros(8)),
        ("logits", torch.zeros(2, 8, dtype=torch.int32)),
        ("temperature", torch.ones(3)),
        ("seeds", torch.zeros(2)),
        ("positions", torch.zeros(2, dtype=torch.int32)),
        ("dtype", torch.float16),
    ],
)
def test_sample_names_the_wrong_argument(name: str, value) -> None:
    with pytest.raises(ValueError, match=f"^{name} "):
        sample_reference(**{"logits": torch.zeros(2, 8), **requests(2)} | {name: value})


def test_entropy_of_a_uniform_row() -> None:
    out = sample_reference(torch.zeros(1, 600), **requests(1))
    assert out.entropy_nats.item() == pytest.approx(math.log(600), rel=1e-6)
