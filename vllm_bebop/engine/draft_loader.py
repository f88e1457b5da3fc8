"""Loads the draft head and proves that the engine holds what the file says.

Stock loaders accept a head with a missing linear layer or expert without a word, and acceptance falls to nothing. So
the draft is loaded through a load format of its own, a public extension point of vLLM: every parameter is poisoned with
NaN first, vLLM's own loader runs, and then

* no NaN may be left: each element was written (checks fused and stacked parameters without knowing their layout), but
  for the padding that some kernels want around experts, which is zeroed;
* a checksum over all elements that does not depend on their order equals that of the file's tensors, summed over
  tensor-parallel ranks (not with pipeline, data or context parallelism, which share out a head in other ways).

Scales of the KV cache, beside a quantised target, are left out of both: vLLM's defaults stand where a file has none.

A quantised head is loaded without either: its scales may be repeated, absent or vLLM's own. Only a file that holds an
unquantised one is refused, unless vLLM quantises as it loads.

Upstream symbols: `register_model_loader`, `DefaultModelLoader.{get_all_weights, load_weights}`, `get_tp_group`,
`get_pp_group`, `get_dp_group`, `get_pcp_group`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import torch
from vllm.distributed.parallel_state import get_dp_group, get_pcp_group, get_pp_group, get_tp_group
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from vllm_bebop.draft import DraftError, add_checksums, element_checksum
from vllm_bebop.engine.draft_shards import checksum_over_ranks, padding_numel
from vllm_bebop.families import recognise
from vllm_bebop.head_checks import CACHE_SCALES

logger = logging.getLogger("vllm.bebop")

# The target's own are used: vLLM puts them in place after loading (the embedding not with pipeline parallelism).
_SHARED_WITH_TARGET = ("lm_head", "shared_head.head", "embed_tokens")
_PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@register_model_loader("bebop")
class BebopDraftLoader(DefaultModelLoader):
    """vLLM's default loader, checked. Raises DraftError where the head in memory is not the head on disk."""

    def __init__(self, load_config: Any):
        super().__init__(dataclasses.replace(load_config, load_format="safetensors"))

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        """Load as vLLM does, between poisoning and checking."""
        parameters = _head_parameters(model)
        on_loading = any(parameter.is_meta for parameter in parameters.values())
        quantised = on_loading or any(parameter.dtype not in _PLAIN_DTYPES for parameter in parameters.values())
        if not quantised:
            for parameter in parameters.values():
                parameter.data.fill_(float("nan"))
        self._file_checksum = (0, 0, 0)
        self._file_is_quantised = False
        super().load_weights(model, model_config)

        if quantised:
            if not on_loading and not self._file_is_quantised:
                raise DraftError(
                    f"draft {model_config.model}: vLLM built a quantised head, after the target's quantization_config, "
                    "and the draft is not quantised: serve an unquantised target, or list the head's modules among the "
                    "exceptions there"
                )
            logger.info("bebop: draft head loaded; it is quantised, and not compared with the file")
            return
        if unwritten := [name for name, parameter in parameters.items() if not _zero_padding(parameter)]:
            raise DraftError(
                f"draft {model_config.model}: these parameters were not (fully) loaded: {', '.join(unwritten)}. The "
                "head is incomplete or holds NaN; `bebop doctor --model MODEL --draft DRAFT` names the tensors"
            )
        self._compare(model, parameters, model_config)

    def get_all_weights(self, model_config: Any, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """As upstream, noting the checksum of the head's tensors as they pass, and whether any is quantised."""
        config = model_config.hf_config.to_dict()
        family = recognise(config)
        for name, tensor in super().get_all_weights(model_config, model):
            is_heads_own = family.is_head_tensor(name, config) and not family.is_target_copy(name, config)
            if is_heads_own and not name.endswith(CACHE_SCALES):
                if tensor.dtype in _PLAIN_DTYPES:
                    checksum = element_checksum(tensor, model_config.dtype)
                    self._file_checksum = add_checksums(self._file_checksum, checksum)
                else:
                    self._file_is_quantised = True
            yield name, tensor

    def _compare(self, model: torch.nn.Module, parameters: dict[str, torch.nn.Parameter], model_config: Any) -> None:
        """Raise DraftError where the head of all ranks is not the file's."""
        if not _only_tensor_parallel():
            count = sum(parameter.numel() for parameter in parameters.values())
            logger.info("bebop: draft head loaded, %d elements on this rank, none left unwritten", count)
            return
        held = checksum_over_ranks(model, parameters, model_config.dtype)
        if held[0] > self._file_checksum[0] and get_tp_group().world_size > 1:  # e.g. redundant copies of busy experts
            logger.warning(
                "bebop: draft head loaded, every element written; the file's checksum was not compared: the ranks hold "
                "%d elements, the file %d",
                held[0],
                self._file_checksum[0],
            )
            return
        if held != self._file_checksum:
            raise DraftError(
                f"draft {model_config.model}: the engine holds {held[0]} elements that differ from the "
                f"{self._file_checksum[0]} in the file: the checkpoint's layout is not the one vLLM expects"
            )
        logger.info("bebop: draft head loaded, %d elements, checksum %016x equals the file's", held[0], held[-1])


def _head_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    shared = _SHARED_WITH_TARGET if get_pp_group().world_size == 1 else _SHARED_WITH_TARGET[:-1]
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if not any(part in name for part in shared) and not name.endswith(CACHE_SCALES)
    }


def _zero_padding(parameter: torch.nn.Parameter) -> bool:
    """Put 0 where the parameter is NaN; False, and nothing changes, if that is more than its padding."""
    unwritten = parameter.data.isnan()
    if (count := int(unwritten.sum())) > padding_numel(parameter):
        return False
    if count:
        parameter.data.masked_fill_(unwritten, 0)
    return True


def _only_tensor_parallel() -> bool:
    """Else experts are shared out over other ranks too."""
    return all(group().world_size == 1 for group in (get_pp_group, get_dp_group, get_pcp_group))
