"""What a step verifies: the drafts that were scheduled, and the first that the scheduler dropped under a grammar.

A scheduler drops a draft that the grammar forbids, and all after it; one of which it does not know yet; and those for
which it has no room. Were only the allowed ones verified, the law of structured outputs would be off by what q has
outside the grammar. So the first that was dropped is verified too, whatever it is; of a forbidden one p has nothing.
Behind its own row of logits there is none that counts (none at all, or one without a mask): if it is accepted, it is
the last token of its round.

A draft must be the one that was last drawn for its slot and position, since it is verified against the q kept there:
any other, such as a placeholder of the scheduler's, is no draft. In Triton: `gathering_kernel`.
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
    num_scheduled: Tensor  # [B] int64, without: as many may be accepted with a token of the target's behind them
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
    steps = torch.arange(max_drafts, device=input_ids.device)
    rows = (first_rows[:, None] + 1 + steps).clamp(max=len(input_ids) - 1)
    if cut_input_ids is not None:
        is_uncut = (steps < num_scheduled[:, None]) & (cut_input_ids[rows] >= 0)
        num_scheduled = is_uncut.long().cumprod(1).sum(1)
    token_ids = input_ids.long()[rows].where(steps < num_scheduled[:, None], -1)
    positions = input_positions[first_rows].long() + 1
    num_drafts = num_scheduled
    if drawn is not None:
        is_known = ((slots >= 0) & (slots < len(drawn.token_ids)))[:, None]
        slot = slots.long().where(is_known[:, 0], 0)
        is_current = is_known & (drawn.positions[slot] == positions[:, None] + steps)
        is_dropped = is_current & drawn.has_grammar[slot, None] & (steps == num_scheduled[:, None])
        is_drawn = is_current & (drawn.token_ids[slot] == token_ids) | is_dropped
        token_ids = token_ids.where(~is_known, drawn.token_ids[slot].where(is_drawn, -1))
        num_drafts = num_scheduled + is_dropped.sum(1)
    return GatheredDrafts(token_ids, num_drafts, num_scheduled, positions)
