"""Losses of a draft head. p is the target's distribution, a constant; q the draft's; gamma the number of draft steps.

Every loss is a mean over rows of a few statistics per row and step (`kernels.linear_statistics`): the overlap
alpha = sum_v min(p, q), divergences, log-probabilities of the text's own tokens. All are over the full vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vllm_bebop.errors import UserError
from vllm_bebop.kernels.linear_statistics import linear_statistics

LK_DECAY = 3.0  # eta of arXiv:2602.23881


@dataclass(frozen=True)
class SamplingPolicy:
    """How rollouts sample. All of it shapes the target's p; in a loss the temperature alone shapes the draft's q.

    Serving filters the drafts as well, and `evaluate` does; but a loss of a filtered q would be infinite (KL), or have
    no gradient (TV), just where q leaves out what p keeps. The filters follow vLLM: min-p first, then top-k, which
    keeps all tokens tied with the k-th, then top-p.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None  # in (0, 1]
    min_p: float | None = None  # in [0, 1], as a part of the largest probability

    def __post_init__(self) -> None:
        if not self.temperature >= 1e-5:
            raise UserError(f"temperature is {self.temperature}: a greedy policy has no distribution to learn; use > 0")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}, expected at least 1, or None for no limit")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}, expected a number in (0, 1], or None for no limit")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UserError(f"min_p is {self.min_p}, expected a number in [0, 1], or None for no limit")

    @property
    def filters(self) -> bool:
        return any(limit is not None for limit in (self.top_k, self.top_p, self.min_p))

    def filter(self, scores: Tensor) -> Tensor:
        """Scores z / T [..., V] with -inf where the policy has no probability; a new tensor."""
        if self.min_p is not None:
            probs = scores.softmax(-1)
            scores = scores.masked_fill(probs < self.min_p * probs.amax(-1, keepdim=True), float("-inf"))
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            smallest = scores.topk(self.top_k, dim=-1).values[..., -1:]
            scores = scores.masked_fill(scores < smallest, float("-inf"))
        if self.top_p is not None:
            ordered, ids = scores.sort(dim=-1)
            is_dropped = ordered.softmax(-1).cumsum(-1) <= 1 - self.top_p
            is_dropped[..., -1] = False
            scores = scores.masked_fill(is_dropped.scatter(-1, ids, is_dropped), float("-inf"))
        return scores


class HeadLoss(NamedTuple):
    loss: Tensor  # scalar fp32, differentiable
    overlap: Tensor  # [num_steps, N] fp32, sum_v min(p, q) of every row and step: its chance of acceptance


class _Loss(NamedTuple):
    description: str
    statistics: tuple[str, ...]
    evaluate: Callable[[Mapping[str, Tensor], Tensor], Tensor]  # (statistics, token_ids) -> scalar


def _ce(s: Mapping[str, Tensor], token_ids: Tensor) -> Tensor:
    return -s["log_q"].sum() / (token_ids >= 0).sum().clamp(min=1)


def _prefix_products(factors: Tensor) -> Tensor:
    """Like cumprod over the steps; but its derivative never divides by a factor, which may be 0."""
    products = [factors[0]]
    for factor in factors[1:]:
        products.append(products[-1] * factor)
    return torch.stack(products)


def _log(x: Tensor) -> Tensor:
    """log x for x in [0, 1]; where x underflowed to 0, log of the smallest number, with gradient 0."""
    return x.clamp(min=torch.finfo(x.dtype).tiny).log()


def _lk_mix(s: Mapping[str, Tensor], _: Tensor) -> Tensor:
    weight = torch.exp(-LK_DECAY * s["overlap"].detach())
    return (weight * s["kl"] + (1 - weight) * (1 - s["overlap"])).mean()


def _e2e_corrected(s: Mapping[str, Tensor], _: Tensor) -> Tensor:
    log_ratio = s["log_q"] - s["log_p"]
    # Where q >= p the ratio is 1 and constant: no gradient at q = p, where the chance of acceptance has its maximum.
    accepted = torch.where(log_ratio < 0, log_ratio, 0).exp()[:-1]
    reached = torch.cat([torch.ones_like(s["overlap"][:1]), _prefix_products(accepted)]) if len(accepted) else 1
    return 1 - (reached * s["overlap"]).mean()


_LOSSES = {
    "ce": _Loss("cross entropy of the text's next tokens", ("log_q",), _ce),
    "kl": _Loss("forward Kullback-Leibler divergence D(p||q)", ("kl",), lambda s, _: s["kl"].mean()),
    "reverse_kl": _Loss("reverse divergence D(q||p)", ("reverse_kl",), lambda s, _: s["reverse_kl"].mean()),
    "tv": _Loss(
        "total variation 1 - alpha (arXiv:2606.12370, Eq. 10)", ("overlap",), lambda s, _: 1 - s["overlap"].mean()
    ),
    "e2e_tv": _Loss(
        "end-to-end TV, 1 - mean over j of alpha_1 ... alpha_j (arXiv:2606.12370, Eq. 13)",
        ("overlap",),
        lambda s, _: 1 - _prefix_products(s["overlap"]).mean(),
    ),
    "lk": _Loss(
        "minus log of the acceptance rate, -log alpha (arXiv:2602.23881)",
        ("overlap",),
        lambda s, _: -_log(s["overlap"]).mean(),
    ),
    "lk_mix": _Loss(
        "lambda KL + (1 - lambda) TV with lambda = exp(-3 alpha) of each row and step, a constant (arXiv:2602.23881)",
        ("overlap", "kl"),
        _lk_mix,
    ),
    "e2e_corrected": _Loss(
        "e2e_tv as served: each step before j weighs min(1, q/p) of the text's token instead of its alpha",
        ("overlap", "log_q", "log_p"),
        _e2e_corrected,
    ),
    "log_prefix": _Loss(
        "minus log of the prefix survival mean(alpha_1 ... alpha_j) over the rows of a call, averaged over j",
        ("overlap",),
        lambda s, _: -_log(_prefix_products(s["overlap"]).mean(1)).mean(),
    ),
}

LOSSES = {name: loss.description for name, loss in _LOSSES.items()}


def head_loss(
    name: str,
    draft_hidden: Tensor,
    teacher_hidden: Tensor,
    teacher_index: Tensor,
    token_ids: Tensor,
    lm_head: Tensor,
    policy: SamplingPolicy,
    *,
    vocab_group: dist.ProcessGroup | None = None,
) -> HeadLoss:
    """A draft head's loss, averaged over rows and steps.

    Args:
        name: of LOSSES.
        draft_hidden: [num_steps, N, H], what the draft logits of N rows are projected from; differentiable.
        teacher_hidden: [M, H], the same of the target, for all tokens; a constant.
        teacher_index: [num_steps, N] int64, where in teacher_hidden each row and step's teacher is: token t+1+j.
        token_ids: [num_steps, N] int64, the text's token that each row and step predicts, x[t+2+j]; -1 where the
            document ends before it, possible at the last step only. ce leaves such an entry out.
        lm_head: [V, H], frozen, shared by draft and target; with vocab_group this rank's slice [V / ranks, H].
        policy: its temperature shapes p and q, its filters p.
        vocab_group: ranks that share the vocabulary and have the same hidden states; all get the same loss and
            gradients.
    Returns:
        HeadLoss.
    Raises:
        ValueError: the loss is unknown, there are no rows, or the loss is infinite under the policy.
    Memory: see `linear_statistics`.
    Reference: kernels.loss_reference.head_loss_reference
    """
    if name not in _LOSSES:
        raise ValueError(f"unknown loss {name!r}, expected one of {', '.join(LOSSES)}")
    if draft_hidden.shape[1] == 0:
        raise ValueError("draft_hidden has no rows: every document is shorter than num_steps + 1 tokens")
    if name == "reverse_kl" and policy.filters:
        raise ValueError(
            "reverse_kl is infinite where top_k, top_p or min_p leave p = 0: drop them or take another loss"
        )
    loss = _LOSSES[name]
    statistics = linear_statistics(
        loss.statistics,
        draft_hidden,
        teacher_hidden,
        teacher_index,
        token_ids,
        lm_head,
        temperature=policy.temperature,
        filter_scores=policy.filter if policy.filters else None,
        vocab_group=vocab_group,
    )
    return HeadLoss(loss.evaluate(statistics, token_ids), statistics["overlap"].detach())
