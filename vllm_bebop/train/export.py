"""A trained head as a draft directory (`vllm_bebop.draft`), in the dtype that its target's checkpoint is served in."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vllm_bebop.draft import Draft, DraftError, draft_config, fingerprint, write_draft
from vllm_bebop.families import text_config
from vllm_bebop.tensor_files import CONFIG_FILE, read_json
from vllm_bebop.train.heads import MTPHead, head_tensors

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def export_draft(head: MTPHead, model_directory: str | Path, out: str | Path, metadata: Mapping[str, Any]) -> Draft:
    """Write the head as a draft, all or nothing; every tensor is read back and compared.

    Args:
        head: in any dtype; its tensors are rounded to the checkpoint's (config.json's `dtype`; bf16 if it has none),
            but for the router's score-correction bias, which stays fp32.
        model_directory: the target that the head was trained for: gives the config and the fingerprint.
        out: the directory to create. A draft written by us is replaced, anything else refused.
        metadata: for bebop.json, see `vllm_bebop.draft`; `base_fingerprint` is added.
    Raises:
        DraftError: `out` is not ours to replace, or the head is no valid draft (NaN, Inf, a dtype too narrow).
    """
    config = read_json(Path(model_directory) / CONFIG_FILE)
    dtype = checkpoint_dtype(config)
    tensors = {name: tensor.detach().to("cpu", _stored_as(name, dtype)) for name, tensor in head_tensors(head).items()}
    described = {"base_fingerprint": fingerprint(model_directory), **metadata}
    return write_draft(out, tensors, draft_config(config, num_layers=1), described, overwrite=True)


def _stored_as(name: str, dtype: torch.dtype) -> torch.dtype:
    """Rounded, a bias of 10 or 30 whose entries differ in the second decimal would send most tokens elsewhere."""
    return torch.float32 if name.endswith(".e_score_correction_bias") else dtype


def checkpoint_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype that a parsed config.json names, under its present or its former key; bf16 without one.

    Raises:
        DraftError: a dtype in which no head is stored.
    """
    levels = (config, text_config(config))
    named = [level[key] for level in levels for key in ("dtype", "torch_dtype") if level.get(key) is not None]
    if not named:
        return torch.bfloat16
    if (dtype := _DTYPES.get(str(named[0]).removeprefix("torch."))) is None:
        raise DraftError(f"config.json: dtype {named[0]!r} is none of {', '.join(_DTYPES)}: correct it")
    return dtype
