"""Top-k, top-p and min-p: what each leaves of a row of logits is all of it at or above one number, the row's threshold.

They apply in vLLM's order, each to what the one before has left: min-p, top-k, top-p. Logits are compared before the
temperature, so that a threshold is a logit that occurs in the row (min-p's apart) and comparing is exact. Equal logits
are kept or left out together: `k` keeps more than k of them where several equal the k-th largest, as in Transformers.

No mask of a row is ever stored. In Triton: `filtering`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_bebop.kernels.arguments import check_contiguous, check_tensor

NEG_INF = float("-inf")


@dataclass(frozen=True)
class Filters:
    """What each request asks for, [B] or by slot [num_slots], contiguous; None: nobody asks for it.

    Greedy requests (T < 1e-5) are not filtered: their argmax always stays.
    """

    top_k: Tensor | None = None  # int32; 0 or less, or the vocabulary's size or more: all
    top_p: Tensor | None = None  # fp32; 1 or more: all
    min_p: Tensor | None = None  # fp32; tokens with p(v) < min_p * max p are left out; 0: none

    @property
    def are_asked_for(self) -> bool:
        return any(each is not None for each in (self.top_k, self.top_p, self.min_p))

    def check(self, num_requests: int, device: torch.device) -> None:
        """Raises ValueError that names the argument."""
        for name, dtype in (("top_k", torch.int32), ("top_p", torch.float32), ("min_p", torch.float32)):
            tensor = getattr(self, name)
            if tensor is not None:
                check_tensor(name, tensor, (num_requests,), dtype, device)
                check_contiguous(name, tensor)

    def of(self, requests: Tensor) -> "Filters":
        """The same filters for rows that belong to requests [N] int64."""
        return Filters(*(None if each is None else each[requests] for each in (self.top_k, self.top_p, self.min_p)))


NO_FILTERS = Filters()


def find_threshold(logits: Tensor, temperature: Tensor, filters: Filters) -> Tensor:
    """The lowest logit that each row keeps; -inf where it keeps all.

    Args:
        logits: [N, V] fp32 or fp64, no NaN.
        temperature: [N], positive; 1 where the logits carry it already.
        filters: of the N rows.
    Returns:
        [N], dtype of `logits`.
    Memory: three [N, V] temporaries with top-k or top-p.
    """
    threshold = torch.full_like(logits[:, 0], NEG_INF)
    temperature = temperature.to(logits.dtype)
    if filters.min_p is not None:
        threshold = logits.amax(dim=1) + filters.min_p.to(logits.dtype).log() * temperature
    if filters.top_k is None and filters.top_p is None:
        return threshold
    ordered = logits.sort(dim=1, descending=True).values
    if filters.top_k is not None:
        is_asked = (filters.top_k > 0) & (filters.top_k < logits.shape[1])
        index = (filters.top_k.long() - 1).where(is_asked, 0)
        kth_largest = ordered.gather(1, index[:, None]).squeeze(1)
        threshold = torch.maximum(threshold, kth_largest.where(is_asked, NEG_INF))
    if filters.top_p is not None:
        is_asked = filters.top_p < 1
        left = ordered.masked_fill(ordered < threshold[:, None], NEG_INF) / temperature[:, None]
        mass = left.softmax(dim=1).cumsum(dim=1)
        index = (mass < filters.top_p.to(mass.dtype)[:, None]).sum(dim=1, keepdim=True).clamp(max=logits.shape[1] - 1)
        nucleus_end = ordered.gather(1, index).squeeze(1)
        threshold = torch.maximum(threshold, nucleus_end.where(is_asked, NEG_INF))
    return threshold
