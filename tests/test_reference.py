"""The reference sampler's batches: what a request gets depends on itself alone; its statistics are exact."""

import dataclasses

import pytest
import torch

from tests.support.requests import (
    INF,
    NAN,
    assert_bitwise_equal,
    mixed_batch,
    requests,
    select,
    select_output,
    verify_one,
)
from vllm_bebop.kernels.philox import Stream
from vllm_bebop.kernels.reference import sample_reference, verify_reference

TARGET_STREAMS = (Stream.TARGET_BLOCK, Stream.TARGET_TOKEN)


@pytest.mark.parametrize("vocab_size", [100, 513, 700])
def test_verify_does_not_depend_on_the_batch(vocab_size: int) -> None:
    arguments = mixed_batch(vocab_size)
    out = verify_reference(**arguments)
    assert out.num_accepted.unique().numel() >= 3
    permutation = torch.randperm(12, generator=torch.Generator().manual_seed(3)).tolist()
    assert_bitwise_equal(verify_reference(**select(arguments, permutation)), select_output(out, permutation))
    for r in range(12):
        assert_bitwise_equal(verify_reference(**select(arguments, [r])), select_output(out, [r]))


def test_verify_does_not_read_padding() -> None:
    arguments = mixed_batch()
    out = verify_reference(**arguments)
    past_the_end = torch.arange(3) >= arguments["num_draft_tokens"][:, None]
    padded = arguments | {
        "draft_logits": torch.cat(
            [arguments["draft_logits"].masked_fill(past_the_end[:, :, None], NAN), torch.full((12, 2, 700), NAN)], dim=1
        ),
        "draft_token_ids": torch.cat(
            [arguments["draft_token_ids"].masked_fill(past_the_end, 5), torch.full((12, 2), 7)], dim=1
        ),
    }
    wide = verify_reference(**padded)
    assert (wide.token_ids[:, 4:] == -1).all() and wide.overlap[:, 3:].isnan().all()
    narrow = dataclasses.replace(
        wide,
        token_ids=wide.token_ids[:, :4],
        target_entropy_nats=wide.target_entropy_nats[:, :4],
        overlap=wide.overlap[:, :3],
        draft_argmax_prob=wide.draft_argmax_prob[:, :3],
    )
    assert_bitwise_equal(narrow, out)


def test_sample_does_not_depend_on_the_batch() -> None:
    logits = torch.randn(9, 700, generator=torch.Generator().manual_seed(0))
    shared = requests(9, 0.8)
    out = sample_reference(logits, **shared)
    for r in range(9):
        alone = sample_reference(logits[r : r + 1], **{name: value[r : r + 1] for name, value in shared.items()})
        part = {field.name: getattr(out, field.name)[r : r + 1] for field in dataclasses.fields(out)}
        assert_bitwise_equal(alone, type(out)(**part))


def test_verify_mixed_batch_equals_uniform_batches() -> None:
    """Greedy, one-hot and sampled requests in one call give what separate calls give."""
    arguments = mixed_batch()
    out = verify_reference(**arguments)
    for r in range(12):
        alone = select(arguments, [r])
        if alone.pop("one_hot").item():
            alone["draft_logits"] = None
        assert_bitwise_equal(verify_reference(**alone), select_output(out, [r]))


def test_verify_single_and_double_precision_agree() -> None:
    arguments = mixed_batch(vocab_size=100, batch=2000)
    single, double = (verify_reference(**arguments, dtype=dtype) for dtype in (torch.float32, torch.float64))
    assert (single.token_ids != double.token_ids).any(dim=1).sum() <= 2
    for name in ("target_entropy_nats", "overlap", "draft_argmax_prob"):
        a, b = getattr(single, name).double(), getattr(double, name)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("vocab_size", [1, 63, 100, 513, 151_936])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_verify_any_vocabulary(vocab_size: int, dtype: torch.dtype) -> None:
    batch = 4 if vocab_size > 1000 else 12
    arguments = mixed_batch(vocab_size, batch)
    arguments |= {name: arguments[name].to(dtype) for name in ("target_logits", "draft_logits")}
    out = verify_reference(**arguments)
    step = torch.arange(4)
    assert (out.num_accepted <= arguments["num_draft_tokens"]).all()
    assert ((out.token_ids >= 0) == (step <= out.num_accepted[:, None])).all()
    assert (out.token_ids < vocab_size).all()
    accepted = step[:3] < out.num_accepted[:, None]
    assert (out.token_ids[:, :3] == arguments["draft_token_ids"])[accepted].all()
    has_row = step <= arguments["num_draft_tokens"][:, None]
    assert (out.target_entropy_nats.isnan() == ~has_row).all()
    assert (out.overlap.isnan() == ~has_row[:, 1:]).all() and (out.draft_argmax_prob.isnan() == ~has_row[:, 1:]).all()
    assert (out.num_nan == 0).all() and (out.num_empty_rows == 0).all()


def test_last_token_of_an_odd_vocabulary() -> None:
    for vocab_size in (63, 100, 513, 151_936):
        logits = torch.full((2, vocab_size), -INF)
        logits[:, -1] = -3.0
        assert sample_reference(logits, **requests(2)).token_ids.tolist() == [vocab_size - 1] * 2
        assert verify_one(logits, [0], logits[:1] * 0).token_ids.tolist() == [[vocab_size - 1, -1]]


def test_sample_statistics() -> None:
    logits = torch.randn(5, 700, generator=torch.Generator().manual_seed(0)) * 5
    out = sample_reference(logits, **requests(5, 0.6))
    scaled = logits.double() / 0.6
    torch.testing.assert_close(out.logsumexp.double(), scaled.logsumexp(1), rtol=1e-6, atol=1e-5)
    expected = scaled.log_softmax(1).gather(1, out.token_ids[:, None]).squeeze(1)
    torch.testing.assert_close(out.log_prob.double(), expected, rtol=1e-6, atol=1e-5)
    entropy = torch.distributions.Categorical(logits=scaled).entropy()
    torch.testing.assert_close(out.entropy_nats.double(), entropy, rtol=1e-5, atol=1e-5)


def test_verify_statistics() -> None:
    generator = torch.Generator().manual_seed(0)
    target, draft_logits = torch.randn(3, 50, generator=generator), torch.randn(2, 50, generator=generator)
    p, q = (target.double() / 0.8).softmax(1), (draft_logits.double() / 0.8).softmax(1)
    out = verify_one(target, [3, 4], draft_logits, temperature=0.8, dtype=torch.float64)
    torch.testing.assert_close(out.target_entropy_nats[0], torch.special.entr(p).sum(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.overlap[0], torch.minimum(p[:2], q).sum(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.draft_argmax_prob[0], p[[0, 1], q.argmax(1)], rtol=1e-6, atol=1e-6)
    flag = torch.tensor([True])
    for one_hot in (verify_one(target, [3, 4], None, 0.8), verify_one(target, [3, 4], draft_logits, 0.8, one_hot=flag)):
        torch.testing.assert_close(one_hot.overlap[0].double(), p[[0, 1], [3, 4]], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one_hot.draft_argmax_prob[0].double(), p[[0, 1], [3, 4]], rtol=1e-5, atol=1e-6)
