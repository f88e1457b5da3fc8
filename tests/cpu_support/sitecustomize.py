"""Lets more of vLLM run in tests on a machine without a GPU. Active where this folder is on PYTHONPATH.

Python imports a module of this name at start-up, so vLLM's own subprocesses get the same help. Three things are mended,
each just before the package it concerns is first imported:

* torchvision's ordinary wheel wants a CUDA build of PyTorch: its import fails because two custom operators have no
  schema. vLLM's Qwen3.5 imports torchvision without calling those operators, so declaring them is enough.
* On a processor with AMX, vLLM's attention for DeepSeek takes no fp32: it is told that there is none.
* Model runner V2 is written in Triton. With TRITON_INTERPRET=1 its kernels run in Python, given a driver that says it
  is there, boolean masks where vLLM passes integers, and `libdevice.log1p`. With EMULATE_GPU=90 they are compiled as
  for a GPU of compute capability 9.0, and tests/ptx runs what came out.
"""

import importlib.abc
import os
import sys
from types import SimpleNamespace


def declare_torchvision_operators() -> None:
    import torch

    if torch.version.cuda is not None:  # torchvision's own operators load there, and would be declared twice
        return
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def hide_amx() -> None:
    import torch

    torch.cpu._is_amx_tile_supported = lambda: False


def run_triton_on_the_cpu() -> None:
    import torch
    import triton.language as tl
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget
    from triton.language.extra import libdevice

    class CpuDriver:
        @staticmethod
        def is_active() -> bool:
            return True

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cpu", 0, 0)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int | None = None) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_device_interface(self) -> object:
            return torch.cpu

    backends["cpu"] = SimpleNamespace(driver=CpuDriver, compiler=None)
    libdevice.log1p = lambda x, **_: tl.log(1.0 + x)
    _accept_integer_masks()


def _accept_integer_masks() -> None:
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def accepting(name: str, mask_position: int) -> None:
        original = getattr(InterpreterBuilder, name)

        def method(self, *args, **kwargs):
            mask = args[mask_position]
            if mask is not None and mask.data.dtype != np.bool_:
                mask = TensorHandle(mask.data.astype(np.bool_), mask.dtype)
                args = (*args[:mask_position], mask, *args[mask_position + 1 :])
            return original(self, *args, **kwargs)

        setattr(InterpreterBuilder, name, method)

    accepting("create_masked_load", 1)
    accepting("create_masked_store", 2)


def emulate_a_gpu() -> None:
    import torch
    from triton.backends import backends

    from tests.ptx import driver
    from vllm_bebop.kernels import backend

    # What vLLM looks for; kernels are compiled by NVIDIA's.
    backends["cpu"] = SimpleNamespace(driver=driver.Driver, compiler=SimpleNamespace(supports_target=lambda _: False))
    driver.install()
    backend._runs_triton = lambda device: True
    torch.cuda.get_device_name = lambda device=None: "NVIDIA H100, emulated"  # asked for by kernels that are not used


class BeforeImport(importlib.abc.MetaPathFinder):
    """Runs a mend when its package is first looked up; finds nothing itself."""

    def __init__(self) -> None:
        self.mends = {"torchvision": [declare_torchvision_operators], "vllm": [hide_amx]}
        if os.environ.get("TRITON_INTERPRET") == "1":
            self.mends["vllm"].append(run_triton_on_the_cpu)
        if "EMULATE_GPU" in os.environ:
            self.mends["vllm"].append(emulate_a_gpu)

    def find_spec(self, name, path=None, target=None):
        for mend in self.mends.pop(name, []):
            mend()
        return None


sys.meta_path.insert(0, BeforeImport())
