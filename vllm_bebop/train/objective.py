"""From packed rows and the target's hidden states to the loss: which chains count, and who their teachers are."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vllm_bebop.train.heads import MTPHead
from vllm_bebop.train.losses import HeadLoss, SamplingPolicy, head_loss
from vllm_bebop.train.rollout import complete_chains, rollout_hidden_states


class Rollout(nn.Module):
    """`rollout_hidden_states` as one module, so that FSDP gathers the head's weights once for the whole chain.

    It computes in the target's dtype with weights rounded to it, as an engine serves them; gradients reach the head's
    own (fp32) weights. Autocast would round the routers' logits too and send tokens to other experts.
    """

    def __init__(self, head: MTPHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, fed: Tensor, token_ids: Tensor, num_steps: int, documents: Tensor) -> Tensor:
        """See `rollout_hidden_states`."""
        served = {
            name: parameter.to(self.head.lm_head.dtype) if parameter.requires_grad else parameter
            for name, parameter in self.head.named_parameters()
        }

        def head(*arguments: Any) -> Any:  # by step, since each is called again in the backward pass
            return functional_call(self.head, served, arguments)

        return rollout_hidden_states(head, fed, token_ids, num_steps, documents)


def trained_chains(documents: Tensor, loss_mask: Tensor, num_steps: int) -> Tensor:
    """The rows t that count: a complete chain, fed nothing but tokens that the policy wrote.

    When serving, row t drafts after the policy has sampled x[t+1], and step j is fed the draft at x[t+1+j]. So
    x[t+1] .. x[t+num_steps] must be the policy's; x[t] itself may be the last token of the prompt.

    Args:
        documents: [batch, seq_len] int64, -1 for padding.
        loss_mask: [batch, seq_len] bool, true for the policy's tokens.
    Returns:
        [batch, seq_len - num_steps] bool.
    """
    written = loss_mask[:, 1:].unfold(1, num_steps, 1).all(-1)
    return complete_chains(documents, num_steps) & written


def head_objective(
    rollout: Rollout,
    fed: Tensor,
    teacher: Tensor,
    token_ids: Tensor,
    documents: Tensor,
    loss_mask: Tensor,
    *,
    loss: str,
    num_steps: int,
    policy: SamplingPolicy,
    lm_head: Tensor | None = None,
    vocab_group: torch.distributed.ProcessGroup | None = None,
) -> HeadLoss:
    """The loss of a head on packed rows, averaged over their chains.

    Args:
        fed, teacher: [batch, seq_len, hidden_size], see `packed_hidden_states`; detached here.
        token_ids, documents, loss_mask: [batch, seq_len]; see `trained_chains`.
        loss: a name from `vllm_bebop.train.losses.LOSSES`.
        lm_head: default the head's own; a shard [vocab_size / ranks, hidden_size] together with its `vocab_group`.
    Returns:
        With no chain at all: a zero loss that still reaches every parameter, and an overlap of width 0.
    """
    chains = trained_chains(documents, loss_mask, num_steps)
    drafted = rollout(fed.detach(), token_ids, num_steps, documents)
    batch, seq_len = token_ids.shape
    row, slot = chains.nonzero(as_tuple=True)
    if row.numel() == 0:
        return HeadLoss(drafted.sum() * 0.0, drafted.new_zeros(num_steps, 0, dtype=torch.float32))
    steps = torch.arange(num_steps, device=token_ids.device)[:, None]
    teacher_index = row * seq_len + slot + 1 + steps
    predicted = _tokens_after(token_ids, documents).flatten()[teacher_index]
    lm_head = rollout.head.lm_head if lm_head is None else lm_head
    return head_loss(
        loss,
        drafted[:, row, slot],
        teacher.detach().flatten(0, 1),
        teacher_index,
        predicted,
        lm_head,
        policy,
        vocab_group=vocab_group,
    )


def _tokens_after(token_ids: Tensor, documents: Tensor) -> Tensor:
    """The token that follows each token in its document, -1 at the end: [batch, seq_len] int64."""
    after = torch.full_like(token_ids, -1)
    same = documents[:, 1:] == documents[:, :-1]
    after[:, :-1] = torch.where(same, token_ids[:, 1:], -1)
    return after


def accepted_drafts(overlap: Tensor) -> Tensor:
    """Expected accepted drafts per round, (arXiv:2606.12370, Eq. 12): [num_steps, num_chains] -> scalar."""
    return overlap.cumprod(0).sum(0).mean()
