"""Losses of a draft head from full logits, in plain torch: the oracle for the kernels and the trainer.

Read this first. p = softmax(z_target / T) is a constant, q = softmax(z_draft / T) is what is trained. Everything is
written as it is defined and differentiated by autograd, several [.., V] tensors at a time; fp64 if asked for.
"""

import torch
from torch import Tensor

LK_DECAY = 3.0


def statistics_reference(
    draft_logits: Tensor,
    target_logits: Tensor,
    token_ids: Tensor | None = None,
    *,
    temperature: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Statistics of `linear_statistics`, differentiable in draft_logits.

    Args:
        draft_logits: [..., V], any float dtype.
        target_logits: same shape; -inf where a sampling policy leaves no probability.
        token_ids: [...] int64, the token of log_q and log_p, -1 for none: 0. Without it, neither is returned.
        temperature: above 0.
        dtype: compute dtype, fp32 or fp64.
    Returns:
        Name -> [...] in dtype. reverse_kl is inf where p = 0.
    """
    log_q = (draft_logits.to(dtype) / temperature).log_softmax(-1)
    log_p = (target_logits.detach().to(dtype) / temperature).log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    in_support = p > 0
    result = {
        # Where q = p the derivative is q's (`<=` in Eq. 11); torch.minimum would take half of it.
        "overlap": torch.where(q <= p, q, p).sum(-1),
        "kl": torch.where(in_support, p * (torch.where(in_support, log_p, 0) - log_q), 0).sum(-1),
        "reverse_kl": (q * (log_q - log_p)).sum(-1),
    }
    if token_ids is not None:
        token = token_ids.clamp(min=0)[..., None]
        for name, log_probs in (("log_q", log_q), ("log_p", log_p)):
            result[name] = torch.where(token_ids >= 0, log_probs.gather(-1, token)[..., 0], 0)
    return result


def tv_loss_reference(
    draft_logits: Tensor, target_logits: Tensor, *, temperature: float = 1.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[...]: 1 - sum_v min(p, q) of logits [..., V] (arXiv:2606.12370, Eq. 10)."""
    return 1 - statistics_reference(draft_logits, target_logits, temperature=temperature, dtype=dtype)["overlap"]


def head_loss_reference(
    name: str,
    draft_logits: Tensor,
    target_logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Scalar loss `name` of vllm_bebop.train.losses from logits [num_steps, N, V] and tokens [num_steps, N]."""
    s = statistics_reference(draft_logits, target_logits, token_ids, temperature=temperature, dtype=dtype)
    alpha = s["overlap"]
    if name == "ce":
        return -s["log_q"][token_ids >= 0].mean()
    if name in ("kl", "reverse_kl"):
        return s[name].mean()
    if name == "tv":
        return (1 - alpha).mean()
    if name == "e2e_tv":
        return 1 - alpha.cumprod(0).sum(0).mean() / len(alpha)
    if name == "lk":
        return -alpha.log().mean()
    if name == "lk_mix":
        weight = torch.exp(-LK_DECAY * alpha.detach())
        return (weight * s["kl"] + (1 - weight) * (1 - alpha)).mean()
    if name == "e2e_corrected":
        log_ratio = s["log_q"] - s["log_p"]
        accepted = torch.where(log_ratio < 0, log_ratio, 0).exp()
        reached = torch.stack([accepted[:j].prod(0) for j in range(len(alpha))])
        return 1 - (reached * alpha).sum(0).mean() / len(alpha)
    if name == "log_prefix":
        return -alpha.cumprod(0).mean(1).log().mean()
    raise ValueError(f"unknown loss {name!r}")
