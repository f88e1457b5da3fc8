"""The frozen target, run over packed rows: each document by itself, whatever kind of layers the model has.

Position ids alone do not keep packed documents apart: linear-attention layers (Qwen3-Next, Qwen3.5) carry their state
across. So documents are taken out of the row, run right-padded with others of about their length, and put back.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from vllm_bebop.train.rollout import target_hidden_states

_LONGEST_OVER_SHORTEST = 2  # in one call; bounds padding to half of it


@torch.no_grad()
def packed_hidden_states(
    model: PreTrainedModel, token_ids: Tensor, documents: Tensor, *, sharded: bool = False
) -> tuple[Tensor, Tensor]:
    """What a head is fed and what its teacher is, for every token of packed rows.

    Args:
        token_ids: [batch, seq_len] int64.
        documents: [batch, seq_len] int64, the document of each token within its row, -1 for padding.
        sharded: the model is spread over processes (FSDP); then all of them make equally many calls.
    Returns:
        Two tensors [batch, seq_len, hidden_size], zero in the padding; see `target_hidden_states`.
    """
    spans = _spans(documents)
    groups = _groups_of_similar_length(spans)
    num_calls = len(groups)
    if sharded:  # agreed on before the first call: every call is a collective operation
        calls = torch.tensor(num_calls, device=token_ids.device)
        dist.all_reduce(calls, dist.ReduceOp.MAX)
        num_calls = int(calls)
    size = model.get_input_embeddings().get_parameter("weight").shape[1]
    fed = torch.zeros(*token_ids.shape, size, dtype=model.dtype, device=token_ids.device)
    teacher = torch.zeros_like(fed)
    for group in groups:
        longest = group[-1][2]
        padded = token_ids.new_zeros(len(group), longest)
        for index, (row, start, length) in enumerate(group):
            padded[index, :length] = token_ids[row, start : start + length]
        results = target_hidden_states(model, padded)
        for index, (row, start, length) in enumerate(group):
            for packed, result in zip((fed, teacher), results, strict=True):
                packed[row, start : start + length] = result[index, :length]
    for _ in range(num_calls - len(groups)):  # others still gather this process's part of the weights
        target_hidden_states(model, token_ids.new_zeros(1, 1))
    return fed, teacher


def _spans(documents: Tensor) -> list[tuple[int, int, int]]:
    """(row, start, length) of every document."""
    spans = []
    for row, indices in enumerate(documents.tolist()):
        start = 0
        for position in range(1, len(indices) + 1):
            if position == len(indices) or indices[position] != indices[start]:
                if indices[start] >= 0:
                    spans.append((row, start, position - start))
                start = position
    return spans


def _groups_of_similar_length(spans: list[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
    """Spans by rising length, cut where a group would hold lengths too far apart."""
    groups: list[list[tuple[int, int, int]]] = []
    for span in sorted(spans, key=lambda span: span[2]):
        if not groups or span[2] > _LONGEST_OVER_SHORTEST * groups[-1][0][2]:
            groups.append([])
        groups[-1].append(span)
    return groups
