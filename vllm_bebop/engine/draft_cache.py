"""q of the last drafts, kept for verification by request slot (model runner V2): its memory, its limit, its allocation.

A slot past the end of a limited cache drafts argmax q and is verified as one-hot: lossless too, with fewer tokens
accepted. The kernels see to that; here only the number of cached slots is decided. The drafts themselves are kept too,
for those that the scheduler drops under a grammar.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from vllm_bebop.config import BebopConfigError
from vllm_bebop.kernels.candidates import num_candidates

logger = logging.getLogger("vllm.bebop")  # below vLLM's root logger, so that its format and level apply

_GIB = 2**30


@dataclass(frozen=True)
class DraftCache:
    """What verification must know of q; row [slot, step]."""

    logits: torch.Tensor  # [num_slots, num_steps, vocab_size or number of candidates], before temperature
    ids: torch.Tensor | None  # [num_slots, num_steps, number of candidates] int32, whose logits those are
    logsumexp: torch.Tensor  # [num_slots, num_steps] fp32, of logits / T
    argmax: torch.Tensor  # [num_slots, num_steps] int64
    threshold: torch.Tensor  # [num_slots, num_steps] fp32, the lowest logit that top-k and top-p left of q
    # The drafts and where they begin, with a spare row for requests without a slot here; -1: none.
    token_ids: torch.Tensor  # [num_slots + 1, num_steps] int64
    first_positions: torch.Tensor  # [num_slots + 1] int64
    has_grammar: torch.Tensor  # [num_slots + 1] bool

    def rows_of(self, slots: torch.Tensor) -> torch.Tensor:
        """Rows of `token_ids` and `first_positions` [N] int64 for slots [N]."""
        num_slots = self.logits.shape[0]
        return slots.long().where((slots >= 0) & (slots < num_slots), num_slots)

    def remember(self, slots: torch.Tensor, step: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor) -> None:
        """Keep the drafts [N] of a step, at absolute positions [N]; inside CUDA graphs too."""
        rows = self.rows_of(slots)
        self.token_ids[rows, step] = tokens
        self.first_positions[rows] = (positions - step).long()
        self.first_positions[-1] = -1

    def start(self, slot: int, has_grammar: bool) -> None:
        """The slot has a new request, or one that begins anew."""
        row = min(slot, self.logits.shape[0])
        self.first_positions[row] = -1
        self.has_grammar[row] = has_grammar

    def with_dropped(
        self,
        slots: torch.Tensor,
        drafts: torch.Tensor,
        num_drafts: torch.Tensor,
        first_positions: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The drafts of a batch, and their number, with the first that the scheduler dropped under a grammar.

        It drops a draft that the grammar forbids, and all after it; and drafts for which it has no room. Were only the
        allowed ones verified, the law of structured outputs would be off by what q has outside the grammar. So the
        first that was dropped is verified too, whatever it is; of a forbidden one p has nothing. There is no row of
        logits behind its own: if it is accepted, the token after it means nothing.

        Args:
            drafts: [B, num_steps]; num_drafts: [B], as for `verify`; first_positions: [B], of the tokens being decided;
                other drafts are of a prompt's chunk, or from before preemption.
        """
        num_steps = drafts.shape[1]
        step = num_drafts.long().clamp(max=num_steps - 1)[:, None]
        rows = self.rows_of(slots)
        dropped = self.token_ids[rows].gather(1, step)
        is_current = self.has_grammar[rows] & (self.first_positions[rows] == first_positions)
        is_dropped = is_current & (num_drafts < num_steps) & (dropped[:, 0] >= 0)
        put_back = torch.where(is_dropped[:, None], dropped.to(drafts.dtype), drafts.gather(1, step))
        return drafts.scatter(1, step, put_back), num_drafts + is_dropped.to(num_drafts.dtype)


def allocate(
    num_requests: int,
    num_steps: int,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device,
    limit_gib: float | None,
    *,
    candidates_only: bool = False,
) -> DraftCache:
    """A cache for every request, or for as many as `limit_gib` holds. Logs its size first.

    Raises:
        BebopConfigError: the limit holds no request at all.
    """
    width, entry_bytes = vocab_size, dtype.itemsize
    if candidates_only:
        width, entry_bytes = num_candidates(vocab_size), dtype.itemsize + torch.int32.itemsize
    row_bytes = num_steps * width * entry_bytes
    num_slots = num_requests if limit_gib is None else min(num_requests, int(limit_gib * _GIB // row_bytes))
    if num_slots == 0:
        raise BebopConfigError(
            f"'draft_cache_gib': {limit_gib} holds no request, one takes {row_bytes / _GIB:.3g}; raise it, or set "
            '"acceptance": "target_only", which needs no cache'
        )
    logger.info(
        "bebop: draft cache of %d requests x %d steps x %d logits x %d bytes = %.2f GiB",
        num_slots, num_steps, width, entry_bytes, num_slots * row_bytes / _GIB,
    )  # fmt: skip
    if num_slots < num_requests:
        logger.warning(
            "bebop: 'draft_cache_gib': %g lets %d of %d concurrent requests speculate probabilistically; the drafts of "
            "the others are one-hot (still lossless, fewer are accepted)",
            limit_gib, num_slots, num_requests,
        )  # fmt: skip
    return DraftCache(
        logits=torch.zeros(num_slots, num_steps, width, dtype=dtype, device=device),
        ids=torch.zeros(num_slots, num_steps, width, dtype=torch.int32, device=device) if candidates_only else None,
        logsumexp=torch.zeros(num_slots, num_steps, dtype=torch.float32, device=device),
        argmax=torch.zeros(num_slots, num_steps, dtype=torch.int64, device=device),
        threshold=torch.zeros(num_slots, num_steps, dtype=torch.float32, device=device),
        token_ids=torch.full((num_slots + 1, num_steps), -1, dtype=torch.int64, device=device),
        first_positions=torch.full((num_slots + 1,), -1, dtype=torch.int64, device=device),
        has_grammar=torch.zeros(num_slots + 1, dtype=torch.bool, device=device),
    )


class LowestFirst(list[int]):
    """Free slots, the lowest handed out first, so that the cached ones are used before any other."""

    def pop(self, _index: object = -1) -> int:
        lowest = min(self)
        self.remove(lowest)
        return lowest
