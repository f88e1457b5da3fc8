"""Training state on disk: whole or absent (`durable`), and checksummed; what is damaged is never loaded.

RUN/checkpoint-00000200/state.pt         what `save` was given
RUN/checkpoint-00000200/complete.json    its update number and SHA-256, written last
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm_bebop.durable import new_directory

_PREFIX = "checkpoint-"
_KEEP = 2


class Checkpoint(NamedTuple):
    """`update`: how many updates the state has seen."""

    update: int
    state: dict[str, Any]


def save(run: Path, update: int, state: dict[str, Any]) -> None:
    """Write a checkpoint, all or nothing, then drop all but the newest two.

    Raises:
        OSError: the disk is full or read-only. Nothing unfinished stays behind, earlier checkpoints are untouched.
    """
    for left_behind in run.glob(f".{_PREFIX}*"):  # by a process that was killed; only one writes
        shutil.rmtree(left_behind, ignore_errors=True)
    with new_directory(run / f"{_PREFIX}{update:08}") as directory:
        with open(directory / "state.pt", "wb") as file:
            torch.save(state, file)
        record = {"update": update, "sha256": _sha256(directory / "state.pt")}
        (directory / "complete.json").write_text(json.dumps(record))
    for old in _checkpoints(run)[_KEEP:]:
        shutil.rmtree(old, ignore_errors=True)


def load_newest(run: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, with tensors on the CPU; None without one. Damaged ones are set aside."""
    for directory in _checkpoints(run):
        try:
            record = json.loads((directory / "complete.json").read_text())
            if record["sha256"] == _sha256(directory / "state.pt"):
                return Checkpoint(record["update"], torch.load(directory / "state.pt", "cpu", weights_only=True))
        except (OSError, ValueError, KeyError):
            pass
        aside = directory.with_name(f"damaged-{directory.name}")
        shutil.rmtree(aside, ignore_errors=True)
        directory.rename(aside)
        print(f"{directory} is damaged, set aside as {aside.name}: going back to the checkpoint before it")
    return None


def _checkpoints(run: Path) -> list[Path]:
    """Newest first."""
    return sorted(run.glob(f"{_PREFIX}*"), reverse=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
