"""The checksum of a head that several tensor-parallel ranks hold together, to compare it with the file's.

Linear layers and experts are cut into disjoint shards; norms and routers are whole on every rank, and where there are
more ranks than key-value heads, several ranks hold the same head. What several hold counts on the lowest of them.

Upstream symbols: `ColumnParallelLinear`, `RowParallelLinear`, `QKVParallelLinear.{num_heads, head_size,
num_kv_head_replicas}`, `tp_size`, `get_tp_group`, `weight_loader_numel` of padded experts, and the names `w13_weight`
and `w2_weight` of stacked experts.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear

from vllm_bebop.draft import add_checksums, element_checksum

_EXPERTS = ("w13_weight", "w2_weight")


def padding_numel(parameter: torch.nn.Parameter) -> int:
    """Elements that no file holds: vLLM rounds the sizes of experts up for some kernels, and notes the file's count."""
    return parameter.numel() - getattr(parameter, "weight_loader_numel", parameter.numel())


def checksum_over_ranks(
    model: torch.nn.Module, parameters: dict[str, torch.nn.Parameter], dtype: torch.dtype
) -> tuple[int, int, int]:
    """`element_checksum` of these parameters of `model`, by dotted name, over all tensor-parallel ranks.

    Every rank must call this, and each gets the same answer. Elements that several ranks hold count once, padding,
    which must be zero, not at all.
    """
    group = get_tp_group()
    parts = []
    for name, parameter in parameters.items():
        owner, _, last = name.rpartition(".")
        part = _own_part(model.get_submodule(owner), last, parameter.data, group.rank_in_group)
        parts += [element_checksum(part, dtype), _less_zeros(padding_numel(parameter), dtype)]
    of_ranks = [add_checksums(*parts)] * group.world_size
    if group.world_size > 1:
        dist.all_gather_object(of_ranks, of_ranks[0], group=group.cpu_group)
    return add_checksums(*of_ranks)


def _less_zeros(count: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """What takes `count` zeros out of a checksum that it is added to."""
    _, plain, mixed = element_checksum(torch.zeros(1), dtype)
    return -count, -count * plain, -count * mixed


def _own_part(module: torch.nn.Module, name: str, parameter: torch.Tensor, rank: int) -> torch.Tensor:
    """The rows of `module`'s parameter `name` that no lower rank holds too: a view, of none, some or all."""
    if name in _EXPERTS:
        return parameter
    is_cut = isinstance(module, (ColumnParallelLinear, RowParallelLinear)) and module.tp_size > 1
    is_cut &= not (isinstance(module, RowParallelLinear) and name == "bias")
    if not is_cut:
        return parameter if rank == 0 else parameter[:0]
    if isinstance(module, QKVParallelLinear) and rank % module.num_kv_head_replicas:
        return parameter[: module.num_heads * module.head_size]
    return parameter
