"""What a served round must accept on average, computed exactly on the text that the engine generated. No vLLM import.

A round that starts at anchor t drafts x[t+2], x[t+3], ... in its own way, but the text that follows is distributed as
the target says, whatever was drafted: verification is lossless. So the chance that a round accepts j + 1 drafts can be
written as an expectation over the text instead of over drafts, and averaging it over the rounds that the engine really
ran gives the same number as counting accepted drafts, without their sampling noise. If the two differ by more than
chance, then training and serving compute different numbers, or the sampler is wrong.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from vllm_bebop.train.heads import MTPHead
from vllm_bebop.train.losses import SamplingPolicy
from vllm_bebop.train.rollout import rollout_hidden_states, target_hidden_states

Survival = Callable[[Tensor, Tensor, Tensor], Tensor]


def rejection_sampling_survival(log_p: Tensor, log_q: Tensor, token_ids: Tensor) -> Tensor:
    """An unbiased estimate of the chance to accept at least j + 1 drafts drawn from q (arXiv:2606.12370, Eq. 2).

        prod_{i<j} min(1, q_i(x_i) / p_i(x_i)) * alpha_j,        alpha_j = sum_v min(p_j(v), q_j(v))

    Unbiased for x distributed as p: E_{x~p}[min(1, q/p) f(x)] = sum_v min(p(v), q(v)) f(v), and min(p(v), q(v)) is the
    chance that v is drafted and accepted. The plain product of the alphas (Eq. 12) is not: which token was accepted
    decides what the next step looks like.

    Args:
        log_p, log_q: [num_steps, rows, vocab_size] fp32, normalised; -inf for tokens that are filtered out.
        token_ids: [num_steps - 1, rows] int64, the text's tokens where steps 0 .. num_steps - 2 draft.
    Returns:
        [num_steps, rows] fp32 in [0, 1].
    """
    alpha = torch.minimum(log_p, log_q).exp().sum(-1)
    return _sum_before(_log_ratio(log_p, log_q, token_ids).clamp(max=0)).exp() * alpha


def block_survival(log_p: Tensor, log_q: Tensor, token_ids: Tensor) -> Tensor:
    """The same for drafts that are accepted as a block (arXiv:2403.10444).

        sum_v min(c_j q_j(v), min(c_0, .., c_j) p_j(v)),        c_j = prod_{i<j} q_i(x_i) / p_i(x_i)

    Given the drafts x_0 .. x_{j-1} and v, at least j + 1 are accepted with chance min(1, w_j p_j(v) / q_j(v)), where
    w_0 = 1 and w_{i+1} = min(1, w_i p_i(x_i) / q_i(x_i)) (`kernels.block_reference`). Drafts are drawn from q, the text
    from p, and c_j is what one weighs in the other; c_j w_j is the smallest of c_0 .. c_j.

    Args and returns: as `rejection_sampling_survival`.
    """
    log_c = _sum_before(_log_ratio(log_p, log_q, token_ids))
    log_smallest = log_c.cummin(0).values
    return torch.minimum(log_c[..., None] + log_q, log_smallest[..., None] + log_p).exp().sum(-1)


def target_only_survival(log_p: Tensor, log_q: Tensor, token_ids: Tensor) -> Tensor:
    """The same for greedy drafts, accepted with the target's probability (Eq. 1).

        prod_{i<j} 1[x_i = argmax q_i] * p_j(argmax q_j)

    Args and returns: as `rejection_sampling_survival`.
    """
    drafts = log_q.argmax(-1)
    matches = (drafts[:-1] == token_ids).float()
    return _sum_before(matches.log()).exp() * _at(log_p, drafts).exp()


SURVIVAL: dict[str, Survival] = {
    "rejection": rejection_sampling_survival,
    "block": block_survival,
    "target_only": target_only_survival,
}


@torch.no_grad()
def expected_survival(
    model: PreTrainedModel,
    head: MTPHead,
    token_ids: Sequence[int],
    anchors: Sequence[int],
    num_steps: int,
    target_policy: SamplingPolicy,
    draft_policy: SamplingPolicy,
    acceptance: str,
) -> Tensor:
    """`SURVIVAL[acceptance]` of the rounds that started at `anchors` of one served text.

    Args:
        model: the target, in the dtype served.
        token_ids: prompt and continuation.
        anchors: slots t whose next token, x[t+1], was the last one known when the round drafted; each at most
            len(token_ids) - 1 - num_steps, so that the chain ends inside the text.
        num_steps: draft tokens per round.
        target_policy, draft_policy: temperature and filters of p and of q.
        acceptance: "rejection", "block" or "target_only".
    Returns:
        [num_steps, len(anchors)] fp32 on the CPU.
    Raises:
        ValueError: an anchor's chain runs past the text.
    """
    if max(anchors) + num_steps >= len(token_ids):
        raise ValueError(f"a chain of {num_steps} from slot {max(anchors)} runs past {len(token_ids)} tokens")
    ids = torch.tensor([token_ids], device=model.device)
    fed, teacher = target_hidden_states(model, ids)
    rows = torch.tensor(anchors, device=model.device)
    # Logits of these rows only: tensors of [num_steps, rows, vocab_size] are the largest here.
    draft_logits = head.logits(rollout_hidden_states(head, fed, ids, num_steps)[:, 0, rows])
    steps = torch.arange(num_steps, device=model.device)[:, None]
    lm_head = model.get_output_embeddings()
    target_logits = lm_head(teacher[0, rows + 1 + steps])
    drafted = ids[0, rows + 2 + steps[:-1]]
    log_p, log_q = _log_probs(target_logits, target_policy), _log_probs(draft_logits, draft_policy)
    return SURVIVAL[acceptance](log_p, log_q, drafted).cpu()


def _log_probs(logits: Tensor, policy: SamplingPolicy) -> Tensor:
    return policy.filter(logits.float() / policy.temperature).log_softmax(-1)


def _log_ratio(log_p: Tensor, log_q: Tensor, token_ids: Tensor) -> Tensor:
    """log(q / p) of the text's tokens. They have p > 0; where rounding says 0 all the same, the ratio is taken as 1."""
    log_p, log_q = _at(log_p, token_ids), _at(log_q, token_ids)
    return (log_q - log_p).where(log_p.isfinite(), 0.0)


def _at(log_probs: Tensor, token_ids: Tensor) -> Tensor:
    """log_probs [steps, rows, vocab_size] of token_ids [steps or fewer, rows]: the shape of token_ids."""
    return log_probs[: len(token_ids)].gather(-1, token_ids[..., None]).squeeze(-1)


def _sum_before(values: Tensor) -> Tensor:
    """[num_steps - 1, rows] -> [num_steps, rows]: sum over the steps before each, 0 before the first."""
    return F.pad(values, (0, 0, 1, 0)).cumsum(0)
