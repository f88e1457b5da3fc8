"""Attention of draft chains, as served: the target's tokens once, and each row's own chain.

Registered with Transformers under the name `CHAIN_ATTENTION`, so that its decoder layers can be used as they are.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

CHAIN_ATTENTION = "bebop_mtp_chain"
StepKeys = list[tuple[Tensor, Tensor]]  # (keys, values) of each step so far, [batch, kv_heads, rows, head_dim]

_SCORES_AT_ONCE = 1 << 26


def chain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    keys: StepKeys,
    scores_at_once: int = _SCORES_AT_ONCE,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Row t sees step 0's keys of the rows in `mask`, and of the later steps' only its own.

    Args:
        query: [batch, heads, rows, head_dim].
        key, value: [batch, kv_heads, rows, head_dim]; the values' head_dim may be another.
        mask: bool [batch, 1, rows, rows], rows s <= t and at least s = t; None is all of them.
        keys: of the steps before; this step's are appended.
        scores_at_once: rows are taken together until they have this many scores; where that is not all of them, the
            scores are computed again for the gradient, not kept. Memory is bounded so, whatever the sequence length.
    Returns:
        [batch, rows, heads, head_dim of the values], and None in the place of the weights.
    """
    keys.append((key, value))
    batch, heads, rows, _ = query.shape
    size = max(1, scores_at_once // (batch * heads * rows))
    outputs = []
    for start in range(0, rows, size):
        some = slice(start, min(start + size, rows))
        parts = query[:, :, some] * scaling, None if mask is None else mask[:, :, some], keys[:], some
        outputs.append(_attend(*parts) if size >= rows else checkpoint(_attend, *parts, use_reentrant=False))
    return torch.cat(outputs, dim=1), None


def _attend(query: Tensor, mask: Tensor | None, keys: StepKeys, some: slice) -> Tensor:
    """The rows `some` alone: query [batch, heads, len(some), head_dim], mask [batch, 1, len(some), rows]."""
    shared_key, shared_value = (part[:, :, None, : some.stop] for part in keys[0])  # later rows' are never seen
    own = [(key[:, :, None, some], value[:, :, None, some]) for key, value in keys[1:]]
    if mask is None:
        mask = torch.ones(some.stop, some.stop, dtype=torch.bool, device=query.device).tril()[some]
    else:
        mask = mask[:, :, None, :, : some.stop]
    query = query.unflatten(1, (shared_key.shape[1], -1))  # [batch, kv_heads, group, len(some), head_dim]
    scores = [(query @ shared_key.mT).masked_fill(~mask, -torch.inf)]
    scores += [(query * key).sum(-1, keepdim=True) for key, _ in own]
    weights = torch.cat(scores, dim=-1).softmax(-1, dtype=torch.float32).to(shared_value.dtype)
    out = weights[..., : some.stop] @ shared_value
    for step, (_, value) in enumerate(own):
        out = out + weights[..., some.stop + step, None] * value
    return out.flatten(1, 2).transpose(1, 2)


AttentionInterface.register(CHAIN_ATTENTION, chain_attention)
