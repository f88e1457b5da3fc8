"""Requests to verify, of every kind at once, and the fused verifier on poisoned scratch."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_races import spoil
from tests.support.kernels import (
    DEVICE,
    INF,
    NAN,
    TEMPERATURES,
)
from vllm_bebop.kernels.filters import Filters
from vllm_bebop.kernels.reference import Verification, sample_reference


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
    by_row = {"target_logits": torch.cat([rows[r] for r in order])}
    if "bitmask" in values:
        masks = values["bitmask"].split((values["num_draft_tokens"] + 1).tolist())
        by_row["bitmask"] = torch.cat([masks[r] for r in order])
    if "filters" in values:
        by_row["filters"] = values["filters"].of(torch.tensor(order, device=DEVICE))
    return {name: value[order] if isinstance(value, Tensor) else value for name, value in values.items()} | by_row


in_every_form = pytest.mark.parametrize(
    "form", [{}, {"single_launch": True}, {"block": True}], ids=["two launches", "single launch", "block"]
)


def poisoned(batch: int, max_drafts: int, vocab_size: int, **options):
    from vllm_bebop.kernels.verification import VerificationWorkspace

    workspace = VerificationWorkspace(batch, max_drafts, vocab_size, DEVICE, **options)
    spoil(workspace)
    return workspace


def verify(target_logits, draft_token_ids, draft_logits, *others, workspace=None, **options) -> Verification:
    """`verification.verify` with poisoned scratch."""
    from vllm_bebop.kernels.verification import verify

    workspace = workspace or poisoned(*draft_token_ids.shape, target_logits.shape[1])
    return verify(target_logits, draft_token_ids, draft_logits, *others, workspace=workspace, **options)


def with_ties(values: dict, *, no_draft_logits: bool) -> dict:
    """The case with target logits that are whole numbers, or -inf."""
    values["target_logits"] = values["target_logits"].round().masked_fill(values["target_logits"] < -2, -INF)
    if no_draft_logits:
        del values["one_hot"]
        values["draft_logits"] = None
    return values


def with_filters(values: dict, seed: int = 0) -> dict:
    """The same case with a grammar that allows each third token or so, min-p, top-k and top-p; some have none."""
    generator = torch.Generator().manual_seed(seed)
    num_rows, vocab_size = values["target_logits"].shape
    allowed = torch.rand(num_rows, vocab_size, generator=generator) < 0.3
    allowed[::5] = True
    allowed[7] = False  # nothing is allowed: token 0
    bits = F.pad(allowed, (0, -vocab_size % 32)).unflatten(1, (-1, 32)).long() << torch.arange(32)
    batch = len(values["seeds"])

    def each(choices: list, dtype: torch.dtype) -> Tensor:
        return torch.tensor(choices, dtype=dtype, device=DEVICE).repeat(batch)[:batch]

    return values | {
        "bitmask": bits.sum(2).to(torch.int32).to(DEVICE),
        "min_p": each([0.0, 0.05, 0.3, 1.0], torch.float32),
        "top_k": each([0, 20, 3, vocab_size, 1, 7, vocab_size - 1], torch.int32),
        "top_p": each([0.9, 1.0, 0.5, 0.1, 1.0], torch.float32),
    }


def choose_filters(values: dict, names: list[str]) -> dict:
    """The case with these filters alone, as `verify` takes them."""
    filtered = with_filters(values)
    chosen = {"bitmask": filtered["bitmask"]} if "bitmask" in names else {}
    return values | chosen | {"filters": Filters(**{name: filtered[name] for name in names if name != "bitmask"})}


def edge_case(max_drafts: int, step: int) -> dict:
    """NaN, infinities and empty rows; p equal to q; tokens that p or q excludes, at one of the steps."""
    vocab_size, batch = 600, 16
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(batch, max_drafts + 1, vocab_size, generator=generator) * 2
    draft_logits = logits[:, :-1].clone()
    token_ids = draft_logits.argmax(dim=2)
    logits[0:2, step] = -INF  # an empty row rejects, or ends the block, and gives token 0
    logits[2:4, step, 1::2] = NAN
    logits[4:6, step, 5] = INF
    logits[6, step, token_ids[6, step]] = -INF  # p(y) = 0
    draft_logits[7, step, token_ids[7, step]] = -INF  # q(y) = 0: from p
    draft_logits[8, step] = NAN  # no q: from p
    token_ids[9, step] = -1
    return {
        "target_logits": logits.flatten(0, 1).to(DEVICE),
        "draft_token_ids": token_ids.to(DEVICE),
        "draft_logits": draft_logits.to(DEVICE),
        "num_draft_tokens": torch.full((batch,), max_drafts, device=DEVICE),
        "temperature": torch.full((batch,), 0.8, device=DEVICE),
        "seeds": torch.arange(batch, device=DEVICE),
        "positions": torch.full((batch,), 9, device=DEVICE),
        "one_hot": torch.zeros(batch, dtype=torch.bool, device=DEVICE),
    }


def assert_edge_case(out: Verification, max_drafts: int, step: int) -> None:
    assert out.num_accepted[10:].tolist() == [max_drafts] * 6  # p equal to q always accepts
    assert out.num_accepted[[0, 1, 6, 7, 8, 9]].tolist() == [step] * 6
    assert out.token_ids[:2, step].tolist() == [0, 0] and out.num_empty_rows.tolist() == [1, 1] + [0] * 14
    assert out.num_nan[2:4].tolist() == [300, 300]


def laws(num_samples: int, first_seed: int, **options: bool) -> dict[str, float]:
    from vllm_bebop import selftest
    from vllm_bebop.kernels.backend import fused

    return selftest.laws(fused(), num_samples, first_seed, DEVICE, **options)
