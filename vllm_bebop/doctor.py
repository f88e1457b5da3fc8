"""What `bebop doctor` checks: the installation, and the head that would be served. Each check is one row."""

from __future__ import annotations

import os
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from vllm_bebop.draft import (
    DraftError,
    inspect_checkpoint_head,
    read_draft,
    refuse_misread_path,
    refuse_quantised_head,
    resolve_draft,
)
from vllm_bebop.head_checks import value_problems
from vllm_bebop.tensor_files import CONFIG_FILE, CheckpointError, read_json

PLUGIN = "bebop"
PLUGIN_GROUP = "vllm.general_plugins"


class Check(NamedTuple):
    """One row: what was checked, whether it is all right (None: suspicious), and what was found or how to mend it."""

    name: str
    ok: bool | None
    detail: str


def check_draft(model: str | Path, draft: str | Path) -> list[Check]:
    """Is this draft complete, finite, and made for this target?

    Args:
        model: the target's directory or Hub id; only its config.json is needed, weights improve the answer.
        draft: the draft's directory or Hub id.
    """
    try:
        model_dir = _model_dir(model)
        target_config = read_json(model_dir / CONFIG_FILE)
    except CheckpointError as error:
        return [Check("target", False, str(error))]
    try:
        path = resolve_draft(draft)
        if path.resolve() == model_dir.resolve():
            return check_model_head(model)
        found = read_draft(path, target_config, target_dir=model_dir)
        refuse_quantised_head(found, target_config)
    except DraftError as error:
        return [Check("draft", False, problem) for problem in error.problems]
    size = sum(entry.end - entry.begin for entry in found.tensors.values())
    what = f"complete {found.family.name} head, {found.num_layers} layer(s), {len(found.tensors)} tensors, {size} bytes"
    rows = [Check("draft", True, what)]
    if found.ignored:
        rows.append(Check("draft's copies", True, f"ignored, the target's are used: {', '.join(found.ignored)}"))
    rows += [Check("draft and target", None, warning) for warning in found.warnings]
    if not found.warnings:
        lineage = "trained for these weights" if "base_fingerprint" in found.metadata else "trained for unknown weights"
        rows.append(Check("draft and target", True, f"same family, sizes and numerics; {lineage}"))
    return rows


def check_model_head(model: str | Path) -> list[Check]:
    """Does the target's own checkpoint (directory, or Hub id if it is downloaded) carry a complete, finite head?"""
    try:
        refuse_misread_path(model)
        report = inspect_checkpoint_head(_model_dir(model))
    except CheckpointError as error:
        return [Check("the model's own head", False, problem) for problem in error.problems]
    if problems := value_problems(report.tensors):
        return [Check("the model's own head", False, problem) for problem in problems]
    what = f"complete {report.family.name} head, {report.num_layers} layer(s), {len(report.tensors)} tensors"
    return [Check("the model's own head", True, what + (", quantised: shapes not checked" if report.quantised else ""))]


def check_environment() -> list[Check]:
    """PyTorch, Triton, devices, vLLM's version, and whether vLLM will find and load the plugin."""
    return [_check_torch(), _check_triton(), *_check_vllm(), _check_plugin(), _check_allow_list()]


def _check_torch() -> Check:
    if find_spec("torch") is None:
        return Check("PyTorch", False, "not installed: install vLLM, which brings the PyTorch it was built for")
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["CPU only"]
    return Check("PyTorch", True, f"{torch.__version__}, {', '.join(devices)}")


def _check_triton() -> Check:
    if find_spec("triton") is not None:
        import triton

        return Check("Triton", True, triton.__version__)
    if find_spec("torch") is None:
        return Check("Triton", False, "not installed: vLLM brings it along with PyTorch")
    import torch

    if torch.cuda.is_available():
        return Check("Triton", False, "not installed: pip install triton")
    return Check("Triton", True, "not installed, nor needed on a CPU")


def _check_vllm() -> list[Check]:
    if find_spec("vllm") is None:
        return [Check("vLLM", False, "not installed: pip install 'vllm-bebop[vllm]'")]
    if find_spec("torch") is None:
        return [Check("vLLM", False, "cannot be loaded without PyTorch")]
    from vllm_bebop.engine.versions import check_versions

    return [Check(*row) for row in check_versions()]


def _check_plugin() -> Check:
    found = metadata.entry_points(group=PLUGIN_GROUP, name=PLUGIN)
    if not found:
        return Check("plugin", False, "vLLM cannot see it: install vllm-bebop into the environment that runs vLLM")
    return Check("plugin", True, f"entry point {found[PLUGIN].value}")


def _check_allow_list() -> Check:
    """VLLM_PLUGINS, if set, lists the only plugins that vLLM loads; set but empty, it loads none."""
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is None:
        return Check("VLLM_PLUGINS", True, "not set: every plugin is loaded")
    listed = PLUGIN in allowed.split(",")  # as vLLM reads it: no blanks around the names
    return Check("VLLM_PLUGINS", listed, repr(allowed) + ("" if listed else f" leaves the plugin out: add {PLUGIN!r}"))


def _model_dir(model: str | Path) -> Path:
    """A directory as it is; a Hub id from the local cache, without downloading weights."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), local_files_only=True))
    except Exception as error:  # malformed name or not in the cache: either way there is nothing to look at
        problem = "neither a directory nor a model in the local Hub cache: download it first"
        raise CheckpointError(problem, path=model) from error
