"""Keeps the head over level-2 sleep, which discards every weight on the device.

What an RL stack then sends or reloads are the target's weights: nothing would bring the head back, and drafts from what
is left in its memory are rejected without a word. So a copy waits on the host and returns when the weights' memory
does: the head as it was, loaded from the draft or pushed by `start_draft_weight_update`. vLLM can be told as much since
0.32 only (`sleep_preserve_parameter_names`). The embedding and lm_head are the target's, and come back with it.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch


def draft_model(worker: Any) -> torch.nn.Module | None:
    """The module that drafts; None on a pipeline rank without one."""
    if hasattr(worker, "get_draft_model"):  # since vLLM 0.26
        return worker.get_draft_model()
    drafter = getattr(worker.model_runner, "drafter", None)
    return drafter and (drafter.model.unwrap() if hasattr(drafter.model, "unwrap") else drafter.model)


def copy_head(worker: Any) -> dict[str, torch.Tensor]:
    """A copy on the host of each tensor of the head, by name; none on a pipeline rank without it."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in _head_tensors(worker).items()}


def restore_head(worker: Any, kept: dict[str, torch.Tensor]) -> None:
    """Write the copy back, in place: captured graphs go on reading the same addresses."""
    tensors = _head_tensors(worker)
    for name, values in kept.items():
        tensors[name].copy_(values)


def _head_tensors(worker: Any) -> dict[str, torch.Tensor]:
    """Parameters, and buffers with them: what MLA derives from its weights is either, by vLLM's version."""
    draft = draft_model(worker)
    if draft is None:
        return {}
    of_target = {id(tensor) for _, tensor in _named_tensors(worker.get_model())}
    return {name: tensor.data for name, tensor in _named_tensors(draft) if id(tensor) not in of_target}


def _named_tensors(model: torch.nn.Module) -> Any:
    return chain(model.named_parameters(), model.named_buffers())
