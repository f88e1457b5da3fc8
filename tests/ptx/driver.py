"""A driver for Triton whose GPU is machine.c: it runs the PTX that kernels are compiled to, on tensors of the CPU.

EMULATE_GPU is the compute capability to compile for: 80, 90 or 100.
"""

import functools
import os
from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel

from tests.ptx.program import Program

TARGET = GPUTarget("cuda", int(os.environ["EMULATE_GPU"]), 32)


class Driver:
    """What triton.runtime.driver.active is asked for."""

    def __init__(self) -> None:
        self.launcher_cls = Launcher
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 232_448, "multiprocessor_count": 132},
            load_binary=lambda name, binary, shared, device: ("emulated", None, 0, 0, 1024),
        )

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu


class Launcher:
    """Called as Triton calls the launcher of CUDA."""

    def __init__(self, src, metadata) -> None:
        self.is_argument = [type_name != "constexpr" for type_name in src.signature.values()]
        self.shared_size = metadata.shared
        self.is_trusted = src.fn.fn.__module__.startswith("vllm.")  # its block tables are tensors of addresses

    def __call__(self, grid_x, grid_y, grid_z, stream, function, packed, launch_metadata, enter, leave, *arguments):
        used = [argument for argument, is_used in zip(arguments, self.is_argument, strict=True) if is_used]
        scratch = [None, None]  # two parameters that Triton adds
        function.launch((grid_x, grid_y, grid_z), self.shared_size, used + scratch, self.is_trusted)


barrier = tl.debug_barrier


def without_ptxas(*arguments):
    """A hook of Triton's, called before a launch and to add stages of compilation: there is no machine code to make."""
    tl.debug_barrier = barrier  # on a CPU, vLLM puts nothing in its place
    if arguments:
        _, stages, *_ = arguments
        stages["cubin"] = lambda ptx, metadata: b""
    return "without ptxas, with barriers", "without ptxas, with barriers"


def install() -> None:
    """From now on, this process runs Triton's kernels here."""
    triton.knobs.runtime.add_stages_inspection_hook = without_ptxas
    triton.knobs.compilation.disable_line_info = True
    initialize, program = CompiledKernel._init_handles, functools.cache(Program)

    def init_handles(kernel) -> None:
        initialize(kernel)
        kernel.function = program(kernel.asm["ptx"])

    CompiledKernel._init_handles = init_handles
    triton.runtime.driver.set_active(Driver())
