"""Everything that can be wrong with a head: its config, and the names, shapes, dtypes and values of its tensors.

Each function returns the problems it finds, one sentence each with the remedy; none raises.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vllm_bebop.families import PER_EXPERT, STACKED, Config, Family, FamilyError, recognise, text_config
from vllm_bebop.tensor_files import TensorEntry, read_tensors

FLOAT_DTYPES = ("BF16", "F16", "F32")  # safetensors' names
# Companions of a quantised weight in compressed-tensors, FP8, ModelOpt, GPTQ and AWQ checkpoints.
_QUANTISED = (
    *(".weight_packed", ".weight_scale", ".weight_scale_inv", ".weight_scale_2", ".weight_shape", ".weight_zero_point"),
    *(".input_scale", ".qweight", ".qzeros", ".scales", ".g_idx"),
)
# Of the KV cache. Beside a quantised target vLLM takes them up, though the head itself is not quantised.
CACHE_SCALES = (
    *(".q_scale", ".k_scale", ".v_scale", ".kv_scale", ".prob_scale"),
    *(".q_zero_point", ".k_zero_point", ".v_zero_point"),
)
# Sizes aside, what a head must share with its target to mean the same there.
_NUMERICS = ("rms_norm_eps", "hidden_act", "rope_theta", "partial_rotary_factor")
# Where these methods list the modules that they leave alone; others have ways of their own.
_EXCEPTIONS = {
    "fp8": ("ignored_layers", "modules_to_not_convert"),
    "compressed-tensors": ("ignore",),
    "bitsandbytes": ("llm_int8_skip_modules",),
}
_LISTED = 5  # names shown before "and N more"


def config_problems(family: Family, config: Config, target_config: Config) -> list[str]:
    """Why a draft of this config cannot serve this target."""
    try:
        target_family = recognise(target_config)
    except FamilyError as error:
        return [str(error)]
    if family is not target_family:
        return [f"config.json describes a {family.name} head, the target is {target_family.name}: use another draft"]
    problems = [
        f"config.json: {key} is {ours}, the target's is {theirs}: the draft belongs to another model"
        for key, ours, theirs in family.differing_sizes(config, target_config)
    ]
    key, count = family.layer_count_key, family.num_layers(config)
    if count == 0:
        problems.append(f"config.json says {key} = 0: set it to the number of MTP layers that the draft holds")
    elif count != (theirs := family.num_layers(target_config)):
        problems.append(
            f"config.json says {key} = {count}, the target's says {theirs}, and vLLM builds the head after the "
            f"target's: set {key} = {count} there, in config.json or with --hf-overrides"
        )
    return problems


def tensor_problems(
    family: Family, config: Config, tensors: Mapping[str, TensorEntry], target_config: Config
) -> list[str]:
    """Names, shapes and dtypes against the config."""
    try:
        expected = family.expected_tensors(config, _expert_layout(family, set(tensors)))
    except FamilyError as error:
        return [str(error)]
    if not expected:
        return []  # no MTP layers: reported with the config
    problems = missing_tensors(family, config, set(tensors))
    accepted = CACHE_SCALES if _quantisation(target_config)[0] is not None else ()
    if unexpected := sorted(name for name in set(tensors) - set(expected) if not name.endswith(accepted)):
        hint = ""
        if any(name.endswith(_QUANTISED) for name in unexpected):
            hint = "; the head is quantised: store bf16, fp16 or fp32"
        elif not all(family.is_head_tensor(name, config) for name in unexpected):
            hint = f"; a draft holds only the head, {family.prefixes(config)[0]}*, not the target's backbone"
        problems.append(f"unexpected tensors: {_some(unexpected)}{hint}")
    for name in sorted(set(tensors) & set(expected)):
        if tensors[name].shape != expected[name]:
            found, implied = list(tensors[name].shape), list(expected[name])
            problems.append(f"{name} has shape {found}, config.json implies {implied}")
    for dtype in sorted({entry.dtype for entry in tensors.values()} - set(FLOAT_DTYPES)):
        names = sorted(name for name, entry in tensors.items() if entry.dtype == dtype)
        problems.append(f"unsupported dtype {dtype} of {_some(names)}: store bf16, fp16 or fp32")
    return problems


def missing_tensors(family: Family, config: Config, names: set[str]) -> list[str]:
    """Expected names that are not among `names`, as one problem."""
    missing = sorted(set(family.expected_tensors(config, _expert_layout(family, names))) - names)
    return [f"the {family.name} head lacks {len(missing)} tensors: {_some(missing)}"] if missing else []


def _expert_layout(family: Family, names: set[str]) -> str | None:
    if not family.expert_layouts:
        return None
    return STACKED if any(name.endswith("mlp.experts.gate_up_proj") for name in names) else PER_EXPERT


def value_problems(tensors: Mapping[str, TensorEntry]) -> list[str]:
    """NaN and Inf. Reads every value of the tensors whose dtype can hold one."""
    problems = []
    floats = {name: entry for name, entry in tensors.items() if entry.dtype in FLOAT_DTYPES}
    for name, tensor in read_tensors(floats):
        if bad := sum(int((~chunk.isfinite()).sum()) for chunk in tensor.reshape(-1).split(1 << 24)):
            problems.append(f"{name} has {bad} NaN or infinite values among {tensor.numel()}: export the head again")
    return problems


def config_warnings(family: Family, config: Config, target_config: Config) -> list[str]:
    """What is suspicious, though vLLM would serve it."""
    warnings = []
    for key in _NUMERICS:
        ours, theirs = _numeric(config, key), _numeric(target_config, key)
        if None not in (ours, theirs) and ours != theirs:
            of_draft, of_target = f"{ours} in the draft's config.json", f"{theirs} in the target's"
            used, other = (of_target, of_draft) if family.built_after == "target" else (of_draft, of_target)
            warnings.append(f"{key} is {other}, and {used}, which is used")
    method, _ = _quantisation(target_config)
    if method not in (None, *_EXCEPTIONS) or quantised_module(family, config, target_config) is not None:
        warnings.append(
            f"the target is quantised ({method}), and so is the head that vLLM builds for it unless the target's "
            "quantization_config excludes the head; the draft's tensors are not quantised"
        )
    return warnings


def quantised_module(family: Family, config: Config, target_config: Config) -> str | None:
    """A module of the head that the target's quantization_config surely quantises; None: it does not, or may not."""
    method, quantisation = _quantisation(target_config)
    groups = quantisation.get("config_groups") or {"": {"targets": ["Linear"]}}  # compressed-tensors: of which layers
    if method not in _EXCEPTIONS or not any("Linear" in group.get("targets", ()) for group in groups.values()):
        return None
    exceptions = [str(entry) for key in _EXCEPTIONS[method] for entry in quantisation.get(key) or ()]
    # One of attention, one of the MLP, both of which no method renames or fuses with others.
    modules = (name.removesuffix(".weight") for name in family.expected_tensors(config))
    projections = (module for module in modules if module.endswith((".o_proj", ".down_proj")))
    return next((module for module in projections if not _is_listed(module, exceptions)), None)


def _quantisation(config: Config) -> tuple[str | None, Mapping[str, Any]]:
    """quant_method and quantization_config; None and {} for a model that is not quantised."""
    found = config.get("quantization_config") or text_config(config).get("quantization_config") or {}
    if not isinstance(found, Mapping):
        return str(found), {}
    return (str(found.get("quant_method")) if found else None), found


def _is_listed(module: str, exceptions: list[str]) -> bool:
    """By its name, that of a part of its path, or a regular expression ("re:...")."""
    return any(
        re.match(entry[3:], module) if entry.startswith("re:") else f".{entry}." in f".{module}."
        for entry in exceptions
    )


def _numeric(config: Config, key: str) -> Any:
    text = text_config(config)
    rope = text.get("rope_parameters")
    return text.get(key, rope.get(key) if isinstance(rope, Mapping) else None)


def weight_name(name: str) -> str:
    """The unquantised name behind a quantised weight's: "fc.weight_packed" and "fc.qweight" stand for "fc.weight"."""
    for suffix in _QUANTISED:
        if name.endswith(suffix):
            return name.removesuffix(suffix) + ".weight"
    return name


def is_quantised(tensors: Mapping[str, TensorEntry]) -> bool:
    """True if any tensor is stored in fewer than 16 bits, or belongs to one that is."""
    return any(name.endswith(_QUANTISED) or entry.dtype not in FLOAT_DTYPES for name, entry in tensors.items())


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
