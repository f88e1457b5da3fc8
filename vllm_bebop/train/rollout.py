"""Multi-step rollout of an MTP head, teacher forced, exactly as vLLM serves it; and the acceptance it earns.

Row (anchor) t at step j embeds token x[t+1+j] at rotary position t+j. It is fed the target's hidden state h[t] at
step 0 and its own previous output after that; it sees step 0's keys of rows s <= t and its own keys of steps 1..j.
It drafts x[t+2+j], as the target does from h[t+1+j]. Only rows whose chain is complete are kept: of `seq_len` tokens,
`rows = seq_len - num_steps`. Where documents share a batch entry, `complete_chains` says which rows are complete.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from vllm_bebop.families import recognise
from vllm_bebop.train.chain_attention import StepKeys
from vllm_bebop.train.heads import MTPHead


@torch.no_grad()
def target_hidden_states(model: PreTrainedModel, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """What the model's head is fed, and what its teacher is computed from, for every token.

    Args:
        token_ids: [batch, seq_len] int64, on the model's device; a document per batch entry, padded on the right.
    Returns:
        fed, before or after the final norm as the family's `hidden_in` says, and teacher, after it: lm_head(teacher)
        are the target's logits. Both [batch, seq_len, hidden_size], and the same tensor where nothing differs.
    """
    before_norm: list[Tensor] = []
    norm = model.get_decoder().norm
    hook = norm.register_forward_pre_hook(lambda _, inputs: before_norm.append(inputs[0]))
    try:
        teacher = model.base_model(token_ids, use_cache=False).last_hidden_state
    finally:
        hook.remove()
    family = recognise(model.config.get_text_config().to_dict())
    return (before_norm[-1] if family.hidden_in == "pre_norm" else teacher), teacher


def rollout_hidden_states(
    head: MTPHead, hidden_states: Tensor, token_ids: Tensor, num_steps: int, documents: Tensor | None = None
) -> Tensor:
    """The hidden states that the draft logits of every row and step are computed from (`head.logits`).

    Args:
        hidden_states: [batch, seq_len, hidden_size], the target's as the family's head is fed them: `fed` of
            `target_hidden_states`.
        token_ids: [batch, seq_len] int64, of the vocabulary everywhere, padding too.
        num_steps: draft steps, gamma.
        documents: [batch, seq_len] int64, the document that each token belongs to, -1 for padding; every document is
            one run of tokens. Positions restart in each and attention stays inside, so that each is computed as if it
            were alone. None: every batch entry is one document, without padding.
    Returns:
        [num_steps, batch, rows, hidden_size], differentiable in the head's parameters. Finite everywhere, but
        meaningful only where `complete_chains` says so.
    Raises:
        ValueError: the sequence is too short for a single complete chain.
    """
    batch, seq_len = token_ids.shape
    rows = seq_len - num_steps
    if num_steps < 1 or rows < 1:
        raise ValueError(f"{seq_len} tokens hold no complete chain of {num_steps} steps")
    positions, mask = torch.arange(rows, device=token_ids.device).expand(batch, rows), None
    if documents is not None:
        documents = documents[:, :rows]
        starts = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
        positions = positions - positions.where(starts, 0).cummax(-1).values
        mask = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]
    fed, keys, outputs = hidden_states[:, :rows], StepKeys(), []
    for step in range(num_steps):
        output, fed = head(token_ids[:, 1 + step : 1 + step + rows], fed, positions + step, keys, mask)
        outputs.append(output)
    return torch.stack(outputs)


def rollout(
    head: MTPHead, hidden_states: Tensor, token_ids: Tensor, num_steps: int, documents: Tensor | None = None
) -> Tensor:
    """Draft logits of every row and step, [num_steps, batch, rows, vocab_size]; see `rollout_hidden_states`."""
    return head.logits(rollout_hidden_states(head, hidden_states, token_ids, num_steps, documents))


def complete_chains(documents: Tensor, num_steps: int) -> Tensor:
    """Rows t whose tokens t .. t + num_steps all belong to one document: those a loss may use.

    Args:
        documents: [batch, seq_len] int64 as in `rollout_hidden_states`.
    Returns:
        bool [batch, seq_len - num_steps].
    """
    first, last = documents[:, : documents.shape[1] - num_steps], documents[:, num_steps:]
    return (first == last) & (first >= 0)


def teacher_rows(target: Tensor, num_steps: int) -> Tensor:
    """What the target says where each row and step drafts: `target[:, t+1+j]`, without a copy.

    Args:
        target: [batch, seq_len, size], the target's logits or hidden states.
    Returns:
        [num_steps, batch, rows, size], a view.
    """
    rows = target.shape[1] - num_steps
    return target.unfold(1, rows, 1)[:, 1:].permute(1, 0, 3, 2)


class Acceptance(NamedTuple):
    """Chance that a draft token is accepted, per row and step, each fp32 (arXiv:2606.12370, Eqs. 1 and 2)."""

    rejection_sampling: Tensor  # sum_v min(p, q)
    target_only: Tensor  # p(argmax q)


def expected_acceptance(target_logits: Tensor, draft_logits: Tensor, temperature: float = 1.0) -> Acceptance:
    """Exact acceptance rates of p = softmax(target / T) and q = softmax(draft / T) over the last dimension.

    Args:
        target_logits, draft_logits: [..., vocab_size].
        temperature: above 0.
    Returns:
        Two tensors of shape [...].
    """
    p = torch.softmax(target_logits.float() / temperature, dim=-1)
    q = torch.softmax(draft_logits.float() / temperature, dim=-1)
    return Acceptance(torch.minimum(p, q).sum(-1), p.gather(-1, q.argmax(-1, keepdim=True)).squeeze(-1))


@torch.no_grad()
def exact_acceptance(
    model: PreTrainedModel, head: MTPHead, token_ids: Tensor, num_steps: int, temperature: float = 1.0
) -> Acceptance:
    """Acceptance of every row and step of a given text: an expectation over the drafts, so no sampling noise.

    A row's chain is teacher forced: step j is what a served chain would see had its j drafts been these tokens.

    Args:
        token_ids: [batch, seq_len] int64, on the model's device.
    Returns:
        Two tensors of shape [num_steps, batch, seq_len - num_steps].
    """
    fed, teacher = target_hidden_states(model, token_ids)
    target_logits = teacher_rows(model.get_output_embeddings()(teacher), num_steps)
    return expected_acceptance(target_logits, rollout(head, fed, token_ids, num_steps), temperature)
