"""Imports go one way: kernels -> files -> train, engine -> command line. Read from the sources, at any depth."""

import ast
import sys
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What may be imported, besides Python's own: other projects, then ours.
ERRORS = ("vllm_bebop.errors",)
FILES = ("safetensors", "torch", "vllm_bebop.families", "vllm_bebop.tensor_files", "vllm_bebop.durable", *ERRORS)
DRAFT = ("huggingface_hub", *FILES, "vllm_bebop.head_checks")
PLOTS = ("numpy", "matplotlib")
ALLOWED = {
    "kernels": ("torch", "triton", "vllm_bebop.kernels"),
    "vllm_bebop/__init__.py": (),
    "vllm_bebop/errors.py": (),
    "vllm_bebop/config.py": ERRORS,
    "vllm_bebop/families.py": ERRORS,
    "vllm_bebop/durable.py": (),
    "vllm_bebop/statistics.py": ("numpy", "torch"),
    "vllm_bebop/tensor_files.py": FILES,
    "vllm_bebop/head_checks.py": FILES,
    "vllm_bebop/draft.py": DRAFT,
    "vllm_bebop/merge.py": ("tqdm", *FILES, "vllm_bebop.draft"),
    "vllm_bebop/selftest.py": ("torch", "vllm_bebop.kernels", "vllm_bebop.statistics"),
    "vllm_bebop/train": (
        *("datasets", "pyarrow", "tensorboard", "tqdm", "transformers", *PLOTS),
        *(*DRAFT, "vllm_bebop.draft", "vllm_bebop.kernels", "vllm_bebop.train"),
    ),
    "vllm_bebop/engine": (
        *("numpy", "vllm", *DRAFT),
        *("vllm_bebop.config", "vllm_bebop.draft", "vllm_bebop.kernels", "vllm_bebop.engine"),
    ),
    "vllm_bebop/plugin.py": ("vllm_bebop.engine",),
    "vllm_bebop/doctor.py": ("triton", *DRAFT, "vllm_bebop.config", "vllm_bebop.draft", "vllm_bebop.engine.versions"),
    "vllm_bebop/bench": (
        *("prometheus_client", "tqdm", "transformers", "vllm", "vllm_bebop.config", *PLOTS),
        *(*FILES, "vllm_bebop.draft", "vllm_bebop.kernels", "vllm_bebop.train", "vllm_bebop.bench"),
    ),
    "vllm_bebop/generate.py": (
        *("pydantic", "tqdm", "transformers", "vllm"),
        *(*FILES, "vllm_bebop.config", "vllm_bebop.train", "vllm_bebop.bench.conditions"),
    ),
    "vllm_bebop/cli.py": ("typer", "vllm_bebop"),
}


def _files(place: str) -> list[Path]:
    path = ROOT / place
    return [path] if path.suffix else sorted(path.rglob("*.py"))


def _imports(source: str, package: str, at_any_depth: bool = True) -> set[str]:
    """Full names of what a module of this package imports: of a module's attribute, the module's name and its own."""
    names = set()
    tree = ast.parse(source)
    for node in ast.walk(tree) if at_any_depth else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def _not_allowed(names: set[str], allowed: tuple[str, ...]) -> list[str]:
    allowed = (*sys.stdlib_module_names, *allowed)
    return sorted(name for name in names if not any(f"{name}.".startswith(f"{prefix}.") for prefix in allowed))


@pytest.mark.parametrize("place", ALLOWED)
def test_imports_go_one_way(place):
    assert _files(place)
    for file in _files(place):
        folder = file.parent.relative_to(ROOT).parts
        package = ".".join(("vllm_bebop", *folder) if folder[0] == "kernels" else folder)
        assert not _not_allowed(_imports(file.read_text(), package), ALLOWED[place]), file


def test_every_file_has_its_rule():
    ruled = {file for place in ALLOWED for file in _files(place)}
    assert ruled == {*_files("kernels"), *_files("vllm_bebop")}


def test_command_line_imports_when_it_runs():
    """`bebop --help` must not wait for PyTorch."""
    names = _imports((ROOT / "vllm_bebop" / "cli.py").read_text(), "vllm_bebop", at_any_depth=False)
    assert not _not_allowed(names, ("typer", *ERRORS))


@pytest.mark.parametrize(
    "source",
    [
        "import numpy",
        "import vllm_bebop.families",
        "from vllm_bebop import families",
        "from ..engine import worker",
        "from .. import draft",
        "def f():\n    from transformers import AutoModel",
    ],
)
def test_wrong_import_is_seen_in_any_form(source):
    assert _not_allowed(_imports(source, "vllm_bebop.kernels"), ALLOWED["kernels"])


def test_right_imports_pass():
    source = "import math, torch\nimport triton.language as tl\nfrom .philox import Stream\nfrom . import reference"
    assert not _not_allowed(_imports(source, "vllm_bebop.kernels"), ALLOWED["kernels"])
