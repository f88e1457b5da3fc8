"""A vocabulary split over ranks: every rank holds a slice of each row's logits, in the order of ranks.

What a softmax needs of the other slices is a few numbers per row. Without a group a rank holds all of it, and every
function here returns what it is given.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    start: int  # the first token of this rank's slice
    sizes: tuple[int, ...]  # tokens per rank
    size: int  # of this rank's slice
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, size: int, group: dist.ProcessGroup | None, device: torch.device) -> "VocabShard":
        """The shard of a rank with `size` tokens. A collective call: every rank of the group has to make it."""
        if group is None:
            return cls(0, (size,), size, None)
        sizes = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=device)
        rank = dist.get_rank(group)
        sizes[rank] = size
        dist.all_reduce(sizes, group=group)
        return cls(int(sizes[:rank].sum()), tuple(sizes.tolist()), size, group)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def logsumexp(self, local: Tensor) -> Tensor:
        """[rows]: the whole rows' logsumexp from that of this rank's slices, -inf for an empty one."""
        if self.group is None:
            return local
        largest = local.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        finite = largest.where(largest > float("-inf"), 0)  # -inf - (-inf) would be NaN
        return finite + self.sum((local - finite).exp()).log()

    def gather(self, logits: Tensor) -> Tensor:
        """Whole rows [rows, sum(sizes)] from this rank's slices [rows, size]."""
        if self.group is None:
            return logits
        # A sum with zeros: unlike a gather, it takes slices of different sizes.
        rows = logits.new_zeros(len(logits), sum(self.sizes))
        rows[:, self.start : self.start + self.size] = logits
        return self.sum(rows)
