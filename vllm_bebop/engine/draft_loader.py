"""Loads the draft head and proves that the engine holds what the file says.

Stock loaders accept a head with a missing linear layer or expert without a word, and acceptance falls to nothing. So
the draft is loaded through a load format of its own, a public extension point of vLLM: every parameter is poisoned with
NaN first, vLLM's own loader runs, and then

* no NaN may be left: each element was written (checks fused and stacked parameters without knowing their layout);
* on one rank, a checksum over all elements that does not depend on their order equals that of the file's tensors.

Upstream symbols: `register_model_loader`, `DefaultModelLoader.{get_all_weights, load_weights}`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from vllm_bebop.draft import DraftError, add_checksums, element_checksum, head_tensor_names

logger = logging.getLogger("vllm.bebop")

# The target's own are used: vLLM puts them in place after loading.
_SHARED_WITH_TARGET = ("embed_tokens", "lm_head", "shared_head.head")


@register_model_loader("bebop")
class BebopDraftLoader(DefaultModelLoader):
    """vLLM's default loader, checked. Raises DraftError where the head in memory is not the head on disk."""

    def __init__(self, load_config: Any):
        super().__init__(dataclasses.replace(load_config, load_format="safetensors"))

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        """Load as vLLM does, between poisoning and checking."""
        parameters = _head_parameters(model)
        for parameter in parameters.values():
            parameter.data.fill_(float("nan"))
        self._file_checksum = (0, 0, 0)
        self._names = head_tensor_names(Path(model_config.model), model_config.hf_config.to_dict())
        super().load_weights(model, model_config)

        unwritten = [name for name, parameter in parameters.items() if parameter.data.isnan().any()]
        if unwritten:
            raise DraftError(
                f"draft {model_config.model}: these parameters were not (fully) loaded: {', '.join(unwritten)}. The "
                "head is incomplete or holds NaN; `bebop doctor --model MODEL --draft DRAFT` names the tensors"
            )
        self._compare(parameters, model_config)

    def get_all_weights(self, model_config: Any, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """As upstream, adding up the checksum of the head's tensors as they pass."""
        for name, tensor in super().get_all_weights(model_config, model):
            if name in self._names:
                self._file_checksum = add_checksums(self._file_checksum, element_checksum(tensor, model_config.dtype))
            yield name, tensor

    def _compare(self, parameters: dict[str, torch.nn.Parameter], model_config: Any) -> None:
        count = sum(parameter.numel() for parameter in parameters.values())
        if get_tensor_model_parallel_world_size() > 1:
            logger.info("bebop: draft head loaded, %d elements on this rank, none left unwritten", count)
            return
        held = (0, 0, 0)
        for parameter in parameters.values():
            held = add_checksums(held, element_checksum(parameter.data, model_config.dtype))
        if held != self._file_checksum:
            raise DraftError(
                f"draft {model_config.model}: the engine holds {held[0]} elements that differ from the "
                f"{self._file_checksum[0]} in the file: the checkpoint's layout is not the one vLLM expects"
            )
        logger.info("bebop: draft head loaded, %d elements, checksum %016x equals the file's", count, held[-1])


def _head_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and not any(part in name for part in _SHARED_WITH_TARGET)
    }
