"""vLLM as far as its sampling goes: scripts/gather_peers.sh makes this `vllm/__init__.py` over the modules it takes.

Those are vLLM's own, unmodified. Whatever else they import is a placeholder: it can be imported, inherited from and
named in an annotation, and raises as soon as it is called or tested, so that nothing measured relies on one. Given are
the few values that are needed on the way: a platform that says it is CUDA, and what vLLM has by default there.
"""

import logging
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

import triton
import triton.language
from triton.language.extra import libdevice


class Placeholder(type):
    """The type of names that were not gathered."""

    def refuse(cls, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"{cls.__module__}.{cls.__name__} was not gathered")

    __call__ = __bool__ = refuse


class Absent(ModuleType):
    """A module that was not gathered."""

    def __getattr__(self, name: str) -> Placeholder:
        if name.startswith("__"):
            raise AttributeError(name)
        return Placeholder(name, (), {"__module__": self.__name__})


class Cuda:
    device_type, simple_compile_backend = "cuda", "inductor"

    def is_cuda(self) -> bool:
        return True

    def is_cpu(self) -> bool:
        return False

    is_cuda_alike = is_cuda


class Logger(logging.Logger):
    info_once = logging.Logger.info


GIVEN: dict[str, dict[str, Any]] = {
    "vllm.config.model": {"PROCESSED_LOGPROBS_MODES": ("processed_logits", "processed_logprobs")},
    # On by default. But without top-k and top-p it hands on to PyTorch's, which is taken at once if it is off.
    "vllm.envs": {"VLLM_USE_FLASHINFER_SAMPLER": False},
    "vllm.logger": {"init_logger": Logger},
    "vllm.platforms": {"current_platform": Cuda()},
    "vllm.triton_utils": {"HAS_TRITON": True, "triton": triton, "tl": triton.language, "tldevice": libdevice},
}


class Finder(MetaPathFinder, Loader):
    """Of modules that were not gathered."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.startswith("vllm.") else None

    def create_module(self, spec: ModuleSpec) -> Absent:
        return Absent(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(GIVEN.get(module.__name__, {}))


SamplingParams = Absent("vllm").SamplingParams
sys.meta_path.append(Finder())  # the last one: what was gathered is found before
