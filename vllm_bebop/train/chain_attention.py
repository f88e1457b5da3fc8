"""Attention of draft chains, as served: the target's tokens once, and each row's own chain.

Registered with Transformers under the name `CHAIN_ATTENTION`, so that its decoder layers can be used as they are.
"""

from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

CHAIN_ATTENTION = "bebop_mtp_chain"
StepKeys = list[tuple[Tensor, Tensor]]  # (keys, values) of each step so far, [batch, kv_heads, rows, head_dim]

_SCORES_AT_ONCE = 1 << 26


class Packing(NamedTuple):
    """Where the documents of packed rows begin. A row sees step 0's keys of its own document alone, up to itself."""

    starts: Tensor  # [batch, rows] int64, the first row of each row's document
    lowest: list[int]  # by row, of all batch entries; on the host, where the bounds of the work are decided

    @classmethod
    def of(cls, documents: Tensor) -> Self:
        """documents: [batch, rows] int64, the document of each row, each one run of rows."""
        is_first = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
        starts = torch.arange(documents.shape[1], device=documents.device).where(is_first, 0).cummax(-1).values
        return cls(starts, starts.amin(0).tolist())


def chain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing | None,
    *,
    scaling: float,
    keys: StepKeys,
    scores_at_once: int = _SCORES_AT_ONCE,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Row t sees step 0's keys of the rows s <= t of its document, and of the later steps' only its own.

    Args:
        query: [batch, heads, rows, head_dim].
        key, value: [batch, kv_heads, rows, head_dim]; the values' head_dim may be another.
        packing: None: every batch entry is one document.
        keys: of the steps before; this step's are appended.
        scores_at_once: rows are taken together until they have this many scores; where that is not all of them, the
            scores are computed again for the gradient, not kept. Memory is bounded so, whatever the sequence length:
            a mask is only ever made for the rows at hand.
    Returns:
        [batch, rows, heads, head_dim of the values], and None in the place of the weights.
    """
    keys.append((key, value))
    batch, heads, rows, _ = query.shape
    size = max(1, scores_at_once // (batch * heads * rows))
    outputs = []
    for start in range(0, rows, size):
        some = slice(start, min(start + size, rows))
        parts = query[:, :, some] * scaling, packing, keys[:], some
        if size >= rows:
            outputs.append(_attend(*parts))
        else:
            outputs.append(checkpoint(_attend, *parts, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(outputs, dim=1), None


def _attend(query: Tensor, packing: Packing | None, keys: StepKeys, some: slice) -> Tensor:
    """The rows `some` alone: query [batch, heads, len(some), head_dim]."""
    seen = slice(0 if packing is None else packing.lowest[some.start], some.stop)  # nothing outside is, by any of them
    shared_key, shared_value = (part[:, :, None, seen] for part in keys[0])
    own = [(key[:, :, None, some], value[:, :, None, some]) for key, value in keys[1:]]
    row, column = (torch.arange(part.start, part.stop, device=query.device) for part in (some, seen))
    mask = column <= row[:, None]
    if packing is not None:
        mask = mask & (column >= packing.starts[:, None, None, some, None])
    query = query.unflatten(1, (shared_key.shape[1], -1))  # [batch, kv_heads, group, len(some), head_dim]
    scores = [(query @ shared_key.mT).masked_fill(~mask, -torch.inf)]
    scores += [(query * key).sum(-1, keepdim=True) for key, _ in own]
    weights = torch.cat(scores, dim=-1).softmax(-1, dtype=torch.float32).to(shared_value.dtype)
    out = weights[..., : len(column)] @ shared_value
    for step, (_, value) in enumerate(own):
        out = out + weights[..., len(column) + step, None] * value
    return out.flatten(1, 2).transpose(1, 2)


AttentionInterface.register(CHAIN_ATTENTION, chain_attention)
