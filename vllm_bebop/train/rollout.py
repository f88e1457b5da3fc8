"""Multi-step rollout of an MTP head, teacher forced, exactly as vLLM serves it.

Row (anchor) t at step j embeds token x[t+1+j] at rotary position t+j. It is fed the target's hidden state h[t] at
step 0 and its own previous output after that; it sees step 0's keys of rows s <= t and its own keys of steps 1..j.
It drafts x[t+2+j], as the target does from h[t+1+j]. Only rows whose chain is complete are kept: of `seq_len` tokens,
`rows = seq_len - num_steps`. Where documents share a batch entry, `complete_chains` says which rows are complete.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from vllm_bebop.families import recognise
from vllm_bebop.train.chain_attention import Packing, StepKeys
from vllm_bebop.train.heads import MTPHead

HeadCall = Callable[..., tuple[Tensor, Tensor]]  # as `MTPHead.forward`


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
    head: HeadCall, hidden_states: Tensor, token_ids: Tensor, num_steps: int, documents: Tensor | None = None
) -> Tensor:
    """The hidden states that the draft logits of every row and step are computed from (`head.logits`).

    For the gradient every step is computed again, so that no more than one step's intermediate results are held.

    Args:
        head: or something that calls it.
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
    positions, packing = torch.arange(rows, device=token_ids.device).expand(batch, rows), None
    if documents is not None:
        packing = Packing.of(documents[:, :rows])
        positions = positions - packing.starts
    fed, keys, outputs = hidden_states[:, :rows], StepKeys(), []
    for step in range(num_steps):
        arguments = token_ids[:, 1 + step : 1 + step + rows], fed, positions + step, keys[:], packing
        output, fed, own_keys = checkpoint(_step, head, *arguments, use_reentrant=False, preserve_rng_state=False)
        keys.append(own_keys)
        outputs.append(output)
    return torch.stack(outputs)


def _step(
    head: HeadCall, token_ids: Tensor, fed: Tensor, positions: Tensor, keys: StepKeys, packing: Packing | None
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """What `head` returns, and the step's own keys and values; `keys` is left as it is, for when this runs again."""
    all_keys = keys[:]
    output, recycled = head(token_ids, fed, positions, all_keys, packing)
    return output, recycled, all_keys[-1]


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
