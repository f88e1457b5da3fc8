"""q of the last drafts, kept for verification by request slot (model runner V2): its memory, its limit, its allocation.

A slot past the end of a limited cache drafts argmax q and is verified as one-hot: lossless too, with fewer tokens
accepted. The kernels see to that; here only the number of cached slots is decided. The drafts themselves are kept too,
for those that the scheduler drops under a grammar (see `kernels.gathering`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from vllm_bebop.config import BebopConfigError
from vllm_bebop.kernels.candidates import num_candidates
from vllm_bebop.kernels.gathering import DrawnDrafts

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
    drawn: DrawnDrafts  # the drafts themselves

    def start(self, slot: int, has_grammar: bool) -> None:
        """The slot has a new request, or one that begins anew."""
        if slot < self.logits.shape[0]:
            self.drawn.positions[slot] = -1
            self.drawn.has_grammar[slot] = has_grammar


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
        drawn=DrawnDrafts(
            token_ids=torch.full((num_slots, num_steps), -1, dtype=torch.int64, device=device),
            positions=torch.full((num_slots, num_steps), -1, dtype=torch.int64, device=device),
            has_grammar=torch.zeros(num_slots, dtype=torch.bool, device=device),
        ),
    )


class LowestFirst(list[int]):
    """Free slots, the lowest handed out first, so that the cached ones are used before any other."""

    def pop(self, _index: object = -1) -> int:
        lowest = min(self)
        self.remove(lowest)
        return lowest
