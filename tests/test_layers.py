"""Imports go one way: kernels -> draft, config -> train, engine -> command line. Read from the sources."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Folder or module -> what it may not import, at any depth of the file.
FORBIDDEN = {
    "kernels": (
        "vllm",
        "vllm_bebop.engine",
        "vllm_bebop.train",
        "vllm_bebop.config",
        "vllm_bebop.draft",
        "transformers",
    ),
    "vllm_bebop/config.py": ("vllm", "torch", "vllm_bebop"),
    "vllm_bebop/families.py": ("vllm", "torch", "vllm_bebop"),
    "vllm_bebop/draft.py": ("vllm", "vllm_bebop.engine", "vllm_bebop.train"),
    "vllm_bebop/train": ("vllm", "vllm_bebop.engine"),
    "vllm_bebop/engine": ("vllm_bebop.train", "vllm_bebop.cli"),
}


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("place", FORBIDDEN)
def test_imports_go_one_way(place):
    path = ROOT / place
    files = [path] if path.suffix else sorted(path.rglob("*.py"))
    assert files
    for file in files:
        for name in _imports(file):
            for banned in FORBIDDEN[place]:
                if banned == "vllm_bebop" and name.startswith("vllm_bebop.families"):
                    continue
                assert name != banned and not name.startswith(banned + "."), f"{file} imports {name}"
