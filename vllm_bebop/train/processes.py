"""How training is spread: rows over processes, weights sharded by FSDP2, the vocabulary over `vocabulary_parallel`.

Started by torchrun, which sets RANK, WORLD_SIZE and LOCAL_RANK; without it there is one process.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from vllm_bebop.errors import UserError

_TIMEOUT = timedelta(hours=1)  # the others wait while the first one reads a large target from a slow disk


@dataclass(frozen=True)
class Processes:
    """This process and the others. Those of one vocabulary group have the same rows; each projects to a slice of it."""

    device: torch.device
    mesh: DeviceMesh | None = None  # ("data", "vocabulary"); None: this is the only process

    @classmethod
    def from_environment(cls, vocabulary_parallel: int = 1) -> Self:
        """Join torchrun's processes, on its GPU if there is one.

        Raises:
            UserError: `vocabulary_parallel` does not divide the number of processes.
        """
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if vocabulary_parallel < 1 or count % vocabulary_parallel:
            raise UserError(
                f"vocabulary_parallel {vocabulary_parallel} does not divide the {count} processes: give a divisor"
            )
        kind, device = "cpu", torch.device("cpu")
        if torch.cuda.is_available():
            kind, device = "cuda", torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        if count == 1:
            return cls(device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=_TIMEOUT)
        shape = (count // vocabulary_parallel, vocabulary_parallel)
        return cls(device, init_device_mesh(kind, shape, mesh_dim_names=("data", "vocabulary")))

    @property
    def is_first(self) -> bool:
        """True for the one that writes."""
        return self.mesh is None or dist.get_rank() == 0

    @property
    def data_parallel(self) -> int:
        """Among how many an update's rows are dealt out."""
        return 1 if self.mesh is None else self.mesh["data"].size()

    @property
    def data_rank(self) -> int:
        """Which of them this is."""
        return 0 if self.mesh is None else self.mesh["data"].get_local_rank()

    @property
    def vocabulary_group(self) -> dist.ProcessGroup | None:
        """The processes that share the vocabulary out; None if each holds all of it."""
        if self.mesh is None or self.mesh["vocabulary"].size() == 1:
            return None
        return self.mesh["vocabulary"].get_group()

    def vocabulary_shard(self, lm_head: Tensor) -> Tensor:
        """This process's part of lm_head [vocab_size, hidden_size], a view.

        Raises:
            UserError: the vocabulary does not divide evenly.
        """
        if self.mesh is None or self.vocabulary_group is None:
            return lm_head
        parts = self.mesh["vocabulary"].size()
        if lm_head.shape[0] % parts:
            raise UserError(
                f"a vocabulary of {lm_head.shape[0]} does not divide by vocabulary_parallel {parts}: give a divisor"
            )
        return lm_head.chunk(parts)[self.mesh["vocabulary"].get_local_rank()]

    def hand_out(self, module: nn.Module, leave_out: nn.Module | None = None) -> None:
        """Give every process's module, less a part of it, the first one's parameters and buffers, on its device.

        The others' may be on the meta device, so that only the first process needs host memory for them.

        Raises:
            UserError: the modules differ.
        """
        left_out = set() if leave_out is None else set(leave_out.modules())
        places: list[tuple[dict[str, Any], str]] = [
            (tensors, name)
            for part in module.modules()
            if part not in left_out
            for tensors in (part._parameters, part._buffers)
            for name, tensor in tensors.items()
            if tensor is not None
        ]
        ids = [id(tensors[name]) for tensors, name in places]
        ours = [(name, tensors[name].shape) for tensors, name in places]
        firsts = [(ours, [tensors[name].dtype for tensors, name in places], [ids.index(each) for each in ids])]
        dist.broadcast_object_list(firsts)
        theirs, dtypes, same_as = firsts[0]
        if ours != theirs:
            raise UserError(
                f"process {dist.get_rank()} built another {type(module).__name__} than the first: update it"
            )
        values: list[Tensor] = []
        for index, (tensors, name) in enumerate(places):
            if same_as[index] < index:  # tied
                values.append(values[same_as[index]])
            else:
                values.append(torch.empty(ours[index][1], dtype=dtypes[index], device=self.device))
                if self.is_first:
                    values[index].copy_(tensors[name].detach())
                dist.broadcast(values[index], 0)
                if isinstance(tensors[name], nn.Parameter):
                    values[index] = nn.Parameter(values[index], tensors[name].requires_grad)
            tensors[name] = values[index]

    def shard(self, module: nn.Module, dtype: torch.dtype | None = None) -> None:
        """Spread a module's weights over all processes, on their devices (FSDP2); alone, do nothing.

        dtype: that they are gathered in; None: their own. Gradients are reduced in fp32.
        """
        if self.mesh is not None:
            policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
            # FSDP keeps a root's weights gathered unless told not to.
            fully_shard(module, mesh=self.mesh._flatten(), reshard_after_forward=True, mp_policy=policy)

    def shard_root(self, module: nn.Module) -> None:
        """Join what was spread of `module`: its parts then share streams, and the memory they are gathered in.

        Parts that are roots of their own cannot be gathered ahead. What was not spread stays whole.
        """
        if self.mesh is not None:
            whole = {parameter for parameter in module.parameters() if not isinstance(parameter, DTensor)}
            fully_shard(module, mesh=self.mesh._flatten(), reshard_after_forward=True, ignored_params=whole)

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over the processes that hold different rows."""
        tensor = tensor.to(self.device)
        if self.mesh is not None:
            dist.all_reduce(tensor, group=self.mesh["data"].get_group())
        return tensor

    def any_of(self, *flags: bool) -> list[bool]:
        """Each flag, set on every process where it is set on one."""
        if self.mesh is None:
            return list(flags)
        found = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.bool().tolist()
