"""What a measurement depends on, recorded beside every result; and the settings that a machine without a GPU needs."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

MEND_CPU = {"VLLM_BEBOP_MEND_CPU": "1"}
MEND_CPU_NOTE = (
    "On a CPU the stock baselines run with VLLM_BEBOP_MEND_CPU=1, which mends vLLM issue #55005 (the stock sampler "
    "reads uninitialised temperatures there); without it their acceptance is meaningless. bebop does not need it."
)
# Several servers share few cores and little memory: 1 GiB of cache each, no core of one's own.
_CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
# `on_cpu` asks the CUDA driver, after which a forked child could not use it.
_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
_PACKAGES = ("vllm", "torch", "transformers")


def on_cpu() -> bool:
    """True where PyTorch finds no GPU: then vLLM is its CPU build."""
    import torch

    return not torch.cuda.is_available()


def engine_environment(model: str, draft: str | None = None) -> dict[str, str]:
    """Environment variables for an engine process; nothing is looked up on the Hub for a local model and draft."""
    environment = dict(_ENVIRONMENT)
    if on_cpu():
        environment |= _CPU_ENVIRONMENT
    if Path(model).is_dir() and (draft is None or Path(draft).is_dir()):
        environment["HF_HUB_OFFLINE"] = "1"
    return environment


def engine_options() -> dict[str, Any]:
    """Arguments of `vllm.LLM`: on a CPU fp32 without compilation, on a GPU vLLM's own defaults."""
    return {"dtype": "float32", "enforce_eager": True} if on_cpu() else {}


def describe(model: str, draft: str | None = None) -> dict[str, Any]:
    """Model, draft, device, versions and our code, JSON-serialisable. Paths are relative to the working directory.

    Raises:
        CheckpointError: a directory without a readable checkpoint, or whose head is of no supported family.
    """
    return {
        "model": shown_path(model),
        "model_sha256": _model_digest(model),
        "draft": "the model's own head" if draft is None else shown_path(draft),
        "draft_sha256": _head_digest(model if draft is None else draft),
        "device": device_name(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "code_sha256": _code_digest(),
    }


def device_name() -> str:
    """The GPU's name, or "CPU" with its model and the number of its cores."""
    import torch

    if not on_cpu():
        return torch.cuda.get_device_name()
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    model = f" ({found.group(1).strip()})" if found else ""
    return f"CPU{model}, {os.cpu_count()} cores"


def device_slug() -> str:
    """For file names: "h100" for an "NVIDIA H100 80GB HBM3", "cpu" without a GPU."""
    words = [word for word in re.split(r"[^a-z0-9]+", device_name().lower()) if word not in ("nvidia", "amd", "")]
    models = [word for word in words if re.search(r"[a-z]\d|\d{3}", word)]
    return "cpu" if words[0] == "cpu" else (models or words)[0]


def commit() -> str | None:
    """The checkout's commit, with "-dirty" where files differ from it; None for an installed package."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def command_line() -> str:
    """How this process was started, without the directories of its interpreter and script."""
    program = Path(sys.argv[0])
    words = ["python", shown_path(program)] if program.suffix == ".py" else [program.name]
    return shlex.join([*words, *(shown_path(word) if word.startswith("/") else word for word in sys.argv[1:])])


def shown_path(path: str | Path) -> str:
    """Relative to the working directory; a Hub id unchanged; of a path elsewhere only its name."""
    path = Path(path)
    if path.is_absolute():
        return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name
    return str(path)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _code_digest() -> str:
    """Over every source file of the package. A commit would not do: results and documents are committed too."""
    import vllm_bebop.kernels

    digest = hashlib.sha256()
    for folder in (Path(__file__).parents[1], Path(next(iter(vllm_bebop.kernels.__path__)))):
        for file in sorted(folder.rglob("*.py")):
            digest.update(f"{file.relative_to(folder)} ".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _model_digest(model: str) -> str | None:
    from vllm_bebop.tensor_files import fingerprint

    return fingerprint(model)[:16] if Path(model).is_dir() else None


def _head_digest(directory: str) -> str | None:
    from vllm_bebop.draft import head_digest
    from vllm_bebop.families import FamilyError
    from vllm_bebop.tensor_files import CheckpointError

    if not Path(directory).is_dir():
        return None
    try:
        return head_digest(directory)[:16]
    except FamilyError as error:
        problem = f"{error}; `bebop rollout` takes any model without --num-speculative-tokens"
        raise CheckpointError(problem, path=directory) from None
