"""What a step verifies: each request's scheduled drafts, and the first that the scheduler dropped under a grammar.

A scheduler drops a draft that the grammar forbids, and all after it; and drafts for which it has no room. Were only the
allowed ones verified, the law of structured outputs would be off by what q has outside the grammar. So the first that
was dropped is verified too, whatever it is; of a forbidden one p has nothing. There is no row of logits behind its own:
if it is accepted, the token after it means nothing. In Triton: `gathering_kernel`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DrawnDrafts:
    """The drafts last drawn for each slot, as `sample` stores them."""

    token_ids: Tensor  # [num_slots, max_drafts] int64
    positions: Tensor  # [num_slots, max_drafts] int64, absolute; -1: none
    has_grammar: Tensor  # [num_slots] bool


@dataclass(frozen=True)
class GatheredDrafts:
    """The arguments of `verify` that concern drafts."""

    token_ids: Tensor  # [B, max_drafts] int64; -1: no draft
    num_drafts: Tensor  # [B] int64, with one that was dropped
    num_scheduled: Tensor  # [B] int64, without
    positions: Tensor  # [B] int64, of the first token being decided


def gather_drafts_reference(
    input_ids: Tensor,
    input_positions: Tensor,
    row_offsets: Tensor,
    slots: Tensor,
    max_drafts: int,
    *,
    cut_input_ids: Tensor | None = None,
    drawn: DrawnDrafts | None = None,
) -> GatheredDrafts:
    """The twin of `gathering_kernel.gather_drafts`, which says what the arguments are."""
    first_rows, num_scheduled = row_offsets[:-1].long(), row_offsets.diff().long() - 1
    token_ids = input_ids.long()
    if cut_input_ids is not None:
        is_first = (cut_input_ids < 0) & (cut_input_ids.roll(1) >= 0)
        token_ids = token_ids.where(is_first, cut_input_ids.long())
    steps = torch.arange(max_drafts, device=input_ids.device)
    rows = (first_rows[:, None] + 1 + steps).clamp(max=len(input_ids) - 1)
    token_ids = token_ids[rows].where(steps < num_scheduled[:, None], -1)
    positions = input_positions[first_rows].long() + 1
    num_drafts = num_scheduled
    if drawn is not None and max_drafts > 0:
        is_known = (slots >= 0) & (slots < len(drawn.token_ids)) & (num_scheduled < max_drafts)
        slot, step = slots.long().where(is_known, 0), num_scheduled.where(is_known, 0)
        is_current = drawn.positions[slot, step] == positions + step
        is_dropped = is_known & is_current & drawn.has_grammar[slot]
        put_back = drawn.token_ids[slot, step][:, None]
        token_ids = put_back.where(is_dropped[:, None] & (steps == num_scheduled[:, None]), token_ids)
        num_drafts = num_scheduled + is_dropped
    return GatheredDrafts(token_ids, num_drafts, num_scheduled, positions)
