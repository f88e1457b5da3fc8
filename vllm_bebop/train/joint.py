"""For those who must train the head during RL: its loss and its own parameter group, for an existing training loop.

Better leave a TV-trained head alone during RL, and never update it with cross-entropy there: that undoes the gain
(arXiv:2606.12370, Sect. 5.3 and Fig. 9a). If it is trained, it needs its own learning rate and its own gradient
clipping, and must send no gradient into the backbone:

    head = load_head(draft, model, dtype=torch.float32)                    # embedding and lm_head stay the model's own
    optimizer = AdamW([{"params": model.parameters()}, head_parameter_group(head, learning_rate=3.5e-5)], lr=1e-6)
    ...
    hidden_states = model.base_model(token_ids).last_hidden_state          # the forward pass that RL runs anyway
    policy_loss.backward()
    joint_head_loss(head, hidden_states, token_ids, documents, loss_mask).loss.backward()
    clip_grad_norm_(model.parameters(), 1.0)
    clip_head_gradients(head, 1.0)
    optimizer.step()

Under FSDP leave the embedding and lm_head out of what is sharded (`ignored_params`), and make the head after that: it
computes with them as they are then, whole.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vllm_bebop.train.heads import MTPHead
from vllm_bebop.train.losses import HeadLoss, SamplingPolicy
from vllm_bebop.train.objective import Rollout, head_objective


def joint_head_loss(
    head: MTPHead,
    hidden_states: Tensor,
    token_ids: Tensor,
    documents: Tensor,
    loss_mask: Tensor,
    *,
    pre_norm_hidden_states: Tensor | None = None,
    loss: str = "e2e_tv",
    num_steps: int = 3,
    policy: SamplingPolicy | None = None,
) -> HeadLoss:
    """The head's loss on rows that the backbone has just been run on. Its gradient reaches the head alone.

    Args:
        hidden_states: [batch, seq_len, hidden_size], the backbone's after its final norm.
        token_ids, documents, loss_mask: [batch, seq_len]; document index or -1 for padding; true for the policy's
            own tokens.
        pre_norm_hidden_states: what the head is fed if its family is fed the hidden state before the final norm.
        policy: how rollouts are sampled; default temperature 1.
    Raises:
        ValueError: the family needs `pre_norm_hidden_states`; or the model is in fp16, in which gradients underflow.
    """
    if head.lm_head.dtype is torch.float16:
        raise ValueError("the lm_head is in fp16, in which the loss's gradients underflow: load it in bf16 or fp32")
    fed = hidden_states
    if head.family.hidden_in == "pre_norm":
        if pre_norm_hidden_states is None:
            raise ValueError(f"a {head.family.name} head is fed hidden states from before the final norm: give them")
        fed = pre_norm_hidden_states
    return head_objective(
        *(Rollout(head), fed, hidden_states, token_ids, documents, loss_mask),
        loss=loss,
        num_steps=num_steps,
        policy=policy or SamplingPolicy(),
    )


def head_parameter_group(head: MTPHead, learning_rate: float) -> dict[str, Any]:
    """A group for the existing optimizer, with a rate of its own and no weight decay."""
    return {"params": _trained(head), "lr": learning_rate, "weight_decay": 0.0, "name": "mtp_head"}


def clip_head_gradients(head: MTPHead, max_norm: float) -> Tensor:
    """Clip the head's gradients by their own norm and return it; the backbone's say nothing about the head's."""
    return torch.nn.utils.clip_grad_norm_(_trained(head), max_norm)


def _trained(head: MTPHead) -> list[nn.Parameter]:
    return [parameter for parameter in head.parameters() if parameter.requires_grad]
