"""Files and directories that appear whole or not at all, and stay: not even a power cut leaves half of one. No torch.

A rename alone is no such promise: file systems may put a name onto the disk before what it names.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4


@contextmanager
def new_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A directory to fill; named `path` and on the disk once the block has ended. Files directly in it only.

    It lies beside `path` until then, since a rename must not cross file systems, as .NAME.HEX, which a process that is
    killed leaves behind.

    Args:
        overwrite: put it in the place of what is called `path`, which is back where it was if that fails.
    Raises:
        OSError: the disk is full or read-only, or `path` exists, is not empty, and is not to be overwritten. Whatever
            is raised, in the block too, nothing of it stays.
    """
    temporary = path.parent / f".{path.name}.{uuid4().hex}"
    temporary.mkdir(parents=True)  # not mkdtemp, whose directories only their owner may read
    try:
        yield temporary
        for written in (*temporary.iterdir(), temporary):
            _to_disk(written)
        if overwrite and path.exists():
            _replace(temporary, path)
        else:
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _to_disk(path.parent)


def _replace(new: Path, path: Path) -> None:
    old = path.parent / f".{path.name}.{uuid4().hex}"
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_file(path: Path, content: bytes) -> None:
    """Put a file in the place of `path`, which may exist; what was there is replaced at once or not at all."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        temporary.write_bytes(content)
        _to_disk(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _to_disk(path.parent)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """As `write_file`; creates the directories above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def _to_disk(path: Path) -> None:
    """Wait until a file, or which names a directory holds, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
