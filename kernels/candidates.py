"""A draft cache some hundred times smaller: q restricted to the largest few logits of each stretch of the vocabulary.

The draft may be drawn from any law that verification knows. Of every GROUP logits only the NUM_KEPT largest stay (the
lowest ids on ties); q is renormalised over these candidates, drawn from, cached and verified as such. The output
follows the target as before; what is lost is acceptance, at most the mass that the full q has outside the candidates.

A row of candidates is a row of logits like any other, with num_candidates(V) entries: `draft_sampling.sample` draws an
index from it, and the index's id is the token. In Triton: `candidate_kernel`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_bebop.kernels.reference import MAX_SCORE

GROUP, NUM_KEPT = 2048, 8


@dataclass(frozen=True)
class Candidates:
    """Candidates of B rows, by group; within a group from the largest down. C = num_candidates(V)."""

    ids: Tensor  # [B, C] int32; -1 where the last group has fewer than NUM_KEPT tokens
    logits: Tensor  # [B, C], dtype of the logits; -inf there

    @staticmethod
    def allocate(batch: int, vocab_size: int, dtype: torch.dtype, device: torch.device | str) -> "Candidates":
        shape = batch, num_candidates(vocab_size)
        ids = torch.empty(shape, dtype=torch.int32, device=device)
        return Candidates(ids, torch.empty(shape, dtype=dtype, device=device))


def num_candidates(vocab_size: int) -> int:
    return -(-vocab_size // GROUP) * NUM_KEPT


def find_candidates_reference(logits: Tensor) -> Candidates:
    """The NUM_KEPT largest of every GROUP of logits [B, V]; the twin of `candidate_kernel.find_candidates`."""
    vocab_size = logits.shape[1]
    padding = (0, -vocab_size % GROUP)
    scores = logits.float().nan_to_num(nan=-torch.inf, posinf=MAX_SCORE, neginf=-torch.inf)
    groups = F.pad(scores, padding, value=-torch.inf).unflatten(1, (-1, GROUP))
    ids = F.pad(torch.arange(vocab_size, device=logits.device), padding, value=-1).unflatten(0, (-1, GROUP))
    order = groups.sort(dim=2, descending=True, stable=True).indices[:, :, :NUM_KEPT]
    kept = groups.gather(2, order).to(logits.dtype)
    return Candidates(ids.expand(len(logits), -1, -1).gather(2, order).flatten(1).int(), kept.flatten(1))


def expand_candidates(ids: Tensor, logits: Tensor, vocab_size: int) -> Tensor:
    """[..., C] -> [..., vocab_size]: rows of logits that are -inf but for the candidates."""
    full = logits.new_full((*logits.shape[:-1], vocab_size + 1), -torch.inf)
    return full.scatter_(-1, ids.long().where(ids >= 0, vocab_size), logits)[..., :vocab_size]
