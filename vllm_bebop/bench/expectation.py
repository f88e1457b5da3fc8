"""What a served round must accept on average, computed exactly on the text that the engine generated. No vLLM import.

A round that starts at anchor t drafts x[t+2], x[t+3], ... in its own way, but the text that follows is distributed as
the target says, whatever was drafted: verification is lossless. So the chance that a round accepts j + 1 drafts can be
written as an expectation over the text instead of over drafts, and averaging it over the rounds that the engine really
ran gives the same number as counting accepted drafts, without their sampling noise. If the two differ by more than
chance, then training and serving compute different numbers, or the sampler is wrong.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vllm_bebop.train.heads import MTPHead
from vllm_bebop.train.rollout import rollout_hidden_states

Survival = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def rejection_sampling_survival(
    target_logits: Tensor, draft_logits: Tensor, token_ids: Tensor, temperature: float = 1.0
) -> Tensor:
    """An unbiased estimate of the chance to accept at least j + 1 drafts drawn from q (arXiv:2606.12370, Eq. 2).

        prod_{i<j} min(1, q_i(x_i) / p_i(x_i)) * alpha_j,        alpha_j = sum_v min(p_j(v), q_j(v))

    Unbiased for x distributed as p: E_{x~p}[min(1, q/p) f(x)] = sum_v min(p(v), q(v)) f(v), and min(p(v), q(v)) is the
    chance that v is drafted and accepted. The plain product of the alphas (Eq. 12) is not: which token was accepted
    decides what the next step looks like.

    Args:
        target_logits, draft_logits: [num_steps, rows, vocab_size], before temperature.
        token_ids: [num_steps - 1, rows] int64, the text's tokens where steps 0 .. num_steps - 2 draft.
        temperature: above 0.
    Returns:
        [num_steps, rows] fp32 in [0, 1].
    """
    log_p, log_q = _log_probs(target_logits, temperature), _log_probs(draft_logits, temperature)
    alpha = torch.minimum(log_p, log_q).exp().sum(-1)
    # x has p(x) > 0, but fp32 may round its log-probability to -inf; then min(1, q/p) is taken as 1, not as NaN.
    ratio = (_at(log_q, token_ids) - _at(log_p, token_ids)).nan_to_num(0.0).clamp(max=0).exp()
    return _chances_so_far(ratio) * alpha


def target_only_survival(
    target_logits: Tensor, draft_logits: Tensor, token_ids: Tensor, temperature: float = 1.0
) -> Tensor:
    """The same for greedy drafts, accepted with the target's probability (Eq. 1).

        prod_{i<j} 1[x_i = argmax q_i] * p_j(argmax q_j)

    Args and returns: as `rejection_sampling_survival`.
    """
    log_p, drafts = _log_probs(target_logits, temperature), draft_logits.argmax(-1)
    matches = (drafts[:-1] == token_ids).float()
    return _chances_so_far(matches) * _at(log_p, drafts).exp()


SURVIVAL: dict[str, Survival] = {"rejection": rejection_sampling_survival, "target_only": target_only_survival}


@torch.no_grad()
def expected_survival(
    model: PreTrainedModel,
    head: MTPHead,
    token_ids: Sequence[int],
    anchors: Sequence[int],
    num_steps: int,
    temperature: float,
    acceptance: str,
) -> Tensor:
    """`SURVIVAL[acceptance]` of the rounds that started at `anchors` of one served text.

    Args:
        model: the target, in the dtype served.
        token_ids: prompt and continuation.
        anchors: slots t whose next token, x[t+1], was the last one known when the round drafted; each at most
            len(token_ids) - 1 - num_steps, so that the chain ends inside the text.
        num_steps: draft tokens per round.
        acceptance: "rejection" or "target_only".
    Returns:
        [num_steps, len(anchors)] fp32 on the CPU.
    Raises:
        ValueError: an anchor's chain runs past the text.
    """
    if max(anchors) + num_steps >= len(token_ids):
        raise ValueError(f"a chain of {num_steps} from slot {max(anchors)} runs past {len(token_ids)} tokens")
    ids = torch.tensor([token_ids], device=model.device)
    hidden_states = model.base_model(ids, use_cache=False).last_hidden_state
    rows = torch.tensor(anchors, device=model.device)
    # Logits of these rows only: [num_steps, rows, vocab_size] is the largest tensor here.
    draft_logits = head.logits(rollout_hidden_states(head, hidden_states, ids, num_steps)[:, 0, rows])
    steps = torch.arange(num_steps, device=model.device)[:, None]
    lm_head = model.get_output_embeddings()
    target_logits = lm_head(hidden_states[0, rows + 1 + steps])
    drafted = ids[0, rows + 2 + steps[:-1]]
    return SURVIVAL[acceptance](target_logits, draft_logits, drafted, temperature).cpu()


def _log_probs(logits: Tensor, temperature: float) -> Tensor:
    return (logits.float() / temperature).log_softmax(-1)


def _at(log_probs: Tensor, token_ids: Tensor) -> Tensor:
    """log_probs [steps, rows, vocab_size] of token_ids [steps or fewer, rows]: the shape of token_ids."""
    return log_probs[: len(token_ids)].gather(-1, token_ids[..., None]).squeeze(-1)


def _chances_so_far(chances: Tensor) -> Tensor:
    """[num_steps - 1, rows] -> [num_steps, rows]: product over the steps before each, 1 before the first."""
    return torch.cat([chances.new_ones(1, chances.shape[1]), chances]).cumprod(0)
