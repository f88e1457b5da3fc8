"""Requests for the reference sampler, and how its outputs are compared."""

import dataclasses
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_bebop.kernels.reference import Verification, sample_reference, verify_reference

NAN, INF = float("nan"), float("inf")


def logits_of(probs) -> Tensor:
    return torch.as_tensor(probs, dtype=torch.float64).log()


def requests(batch: int, temperature: float = 1.0, first_seed: int = 0, position: int = 100) -> dict[str, Tensor]:
    """The per-request arguments that both functions share."""
    return {
        "temperature": torch.full((batch,), temperature),
        "seeds": torch.arange(first_seed, first_seed + batch),
        "positions": torch.full((batch,), position),
    }


def draft(draft_logits: Tensor, shared: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """Draws [B, max_drafts] tokens from draft_logits [B, max_drafts, V], as a drafter does step by step."""
    steps = [
        sample_reference(
            draft_logits[:, i], shared["temperature"], shared["seeds"], shared["positions"] + i, dtype=dtype
        ).token_ids
        for i in range(draft_logits.shape[1])
    ]
    return torch.stack(steps, dim=1) if steps else torch.empty(len(draft_logits), 0, dtype=torch.int64)


def verify_one(target_logits, token_ids, draft_logits=None, temperature=1.0, **options) -> Verification:
    """One request: target_logits [n + 1, V], token_ids [n], draft_logits [n, V] or None."""
    return verify_reference(
        torch.as_tensor(target_logits, dtype=torch.float32),
        torch.tensor([token_ids], dtype=torch.int64),
        None if draft_logits is None else torch.as_tensor(draft_logits, dtype=torch.float32)[None],
        torch.tensor([len(token_ids)]),
        **requests(1, temperature),
        **options,
    )


def assert_bitwise_equal(a, b) -> None:
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert x.dtype == y.dtype and x.shape == y.shape, field.name
        same = (x == y) | (x.isnan() & y.isnan()) if x.is_floating_point() else x == y
        assert same.all(), field.name


def mixed_batch(vocab_size: int = 700, batch: int = 12, max_drafts: int = 3, seed: int = 0) -> dict:
    """Requests with 0 .. max_drafts drafts: sampled, greedy and one-hot; some rejected, some accepted."""
    generator = torch.Generator().manual_seed(seed)
    num_draft_tokens = torch.arange(batch) % (max_drafts + 1)
    draft_logits = torch.randn(batch, max_drafts, vocab_size, generator=generator) * 3
    shared = requests(batch)
    shared["temperature"] = torch.where(torch.arange(batch) % 5 == 4, 0.0, torch.linspace(0.3, 1.5, batch))
    rows = [
        F.pad(draft_logits[r, :n], (0, 0, 0, 1)) + torch.randn(n + 1, vocab_size, generator=generator)
        for r, n in enumerate(num_draft_tokens.tolist())
    ]
    token_ids = draft(draft_logits, shared)
    past_the_end = torch.arange(max_drafts) >= num_draft_tokens[:, None]
    return {
        "target_logits": torch.cat(rows),
        "draft_token_ids": token_ids.masked_fill(past_the_end, -1),
        "draft_logits": draft_logits,
        "num_draft_tokens": num_draft_tokens,
        **shared,
        "one_hot": torch.arange(batch) % 5 == 2,
    }


def select(arguments: dict, order: list[int]) -> dict:
    """The same requests in another order, or a part of them."""
    rows = arguments["target_logits"].split((arguments["num_draft_tokens"] + 1).tolist())
    chosen = {name: value[order] for name, value in arguments.items() if name != "target_logits"}
    return {"target_logits": torch.cat([rows[r] for r in order]), **chosen}


def select_output(out: Verification, order: list[int]) -> Verification:
    return Verification(**{field.name: getattr(out, field.name)[order] for field in dataclasses.fields(out)})
