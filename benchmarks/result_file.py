"""A JSON file of measurements that grows one entry at a time, and what the measurements depend on.

A run that is cut short loses the measurement it was at. The next one, if it finds this file, keeps what was measured on
the same device, with the same code and versions, and goes on from there; anything else in the file is measured anew.
"""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from vllm_bebop.bench.conditions import command_line, commit, device_name
from vllm_bebop.durable import write_json

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Entry = dict[str, Any]


def conditions(packages: Iterable[str], sources: Iterable[Path]) -> Entry:
    """Device, versions and a digest of the code. The commit is for the reader: results are committed too."""

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "absent"

    digest = hashlib.sha256()
    for path in sorted(sources):
        digest.update(path.read_bytes())
    return {
        "device": device_name(),
        "versions": {
            "python": platform.python_version(),
            "cuda": str(torch.version.cuda),
            **{package: version(package) for package in packages},
        },
        "code_sha256": digest.hexdigest()[:16],
        "commit": commit(),
    }


class ResultFile:
    """Entries, each found by its `key`, under a header that says what they depend on."""

    def __init__(self, path: Path, conditions: Entry, key: tuple[str, ...]) -> None:
        self.path, self.conditions, self.key = path, conditions, key
        self.entries: list[Entry] = []
        if path.exists():
            old = json.loads(path.read_text())
            if _decisive(old["conditions"]) == _decisive(conditions):
                self.entries = old["entries"]
            else:
                print(f"{path.name} was measured with other code, versions or on another device: starting anew")

    def find(self, wanted: Entry) -> Entry | None:
        """The entry with the key of `wanted`."""
        return next((entry for entry in self.entries if all(entry[name] == wanted[name] for name in self.key)), None)

    def save(self, **summary: Any) -> None:
        """Writes the entries, and the summary in place of the one before, atomically."""
        content = {"command": command_line(), "conditions": self.conditions, **summary, "entries": self.entries}
        write_json(self.path, content)


def _decisive(conditions: Entry) -> Entry:
    return {name: value for name, value in conditions.items() if name != "commit"}
