"""The draft on disk: read, validate, write. No vLLM import.

A draft is a directory:

    config.json                     the target's own, with at least one MTP layer
    model.safetensors               the head's tensors and nothing else, under their native names (or shards with
                                    model.safetensors.index.json)
    bebop.json                      optional: `format_version`, `base_fingerprint`, `loss`, `steps` (updates), `gamma`
                                    (draft steps trained together), `learning_rate`, the `sampling` policy trained for
                                    (temperature, top_k, top_p, min_p), and `data_sha256` and `start_sha256`, of the
                                    documents trained on and of the head started from (`head_digest`; of no tensors
                                    where that was made of the target's last layer)

Everything is checked here because vLLM loads a draft that lacks its input projection, or holds NaN, without a word.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_bebop.durable import new_directory, write_json
from vllm_bebop.families import Config, Family, FamilyError, recognise
from vllm_bebop.head_checks import (
    config_problems,
    config_warnings,
    is_quantised,
    missing_tensors,
    quantised_module,
    tensor_problems,
    value_problems,
    weight_name,
)
from vllm_bebop.tensor_files import (
    CONFIG_FILE,
    INDEX_FILE,
    CheckpointError,
    TensorEntry,
    add_checksums,
    element_checksum,
    fingerprint,
    list_tensors,
    read_json,
    read_tensors,
)

if TYPE_CHECKING:
    import torch

__all__ = [
    *("Draft", "DraftError", "HeadReport", "add_checksums", "draft_config", "element_checksum", "fingerprint"),
    *("head_digest", "head_tensor_names", "inspect_checkpoint_head", "read_draft", "refuse_misread_path"),
    *("refuse_quantised_head", "resolve_draft", "write_draft"),
]

METADATA_FILE = "bebop.json"
FORMAT_VERSION = 1

# vLLM re-reads the method from the draft's path (config/speculative.py, "Automatically detect the method").
_MISREAD_PATHS = {"eagle-": "eagle", "eagle3": "eagle3", "dflash": "dflash", "dspark": "dspark"}
_DEFAULT_SHARD_BYTES = 4 << 30


class DraftError(CheckpointError):
    """A draft that is refused. `problems` lists every reason found."""


@dataclass(frozen=True)
class Draft:
    """A validated draft.

    config: its config.json; metadata: its bebop.json, {} without one.
    tensors: the head's tensors by native name; copies of the target's embedding or lm_head are left out (`ignored`).
    warnings: what is suspicious but not wrong; to be shown to the user.
    """

    path: Path
    family: Family
    config: Config
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry] = field(repr=False)
    ignored: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def num_layers(self) -> int:
        """MTP layers."""
        return self.family.num_layers(self.config)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(native name, CPU tensor mapped from the file) of every head tensor, in file order."""
        return read_tensors(self.tensors)

    def checksum(self, dtype: torch.dtype) -> tuple[int, int, int]:
        """`element_checksum` of all head tensors together."""
        return add_checksums(*(element_checksum(tensor, dtype) for _, tensor in self.weights()))


@dataclass(frozen=True)
class HeadReport:
    """The complete MTP head of a target checkpoint. quantised: names were checked, but not shapes."""

    family: Family
    num_layers: int
    tensors: Mapping[str, TensorEntry] = field(repr=False)
    quantised: bool


def read_draft(path: str | Path, target_config: Config, target_dir: str | Path | None = None) -> Draft:
    """Validate a draft directory against its target. Reads every value once, to find NaN and Inf.

    Args:
        path: the directory; see `resolve_draft` for Hub names.
        target_config: the target's parsed config.json, as vLLM uses it.
        target_dir: the target's directory, to see whether the draft was trained for these weights; a difference is
            a warning. Anything but a directory is ignored.
    Raises:
        DraftError: with every problem found.
    """
    path = Path(path)
    if not path.is_dir():
        what = "is a file, not a directory" if path.exists() else "no such directory"
        raise DraftError(f"{what}: give the draft's directory", path=path)
    problems = _misread_path(path)
    try:
        config = read_json(path / CONFIG_FILE)
        family = recognise(config)
        family.expected_tensors(config)  # every size that the checks below need is there
    except CheckpointError as error:
        raise DraftError(*problems, *error.problems, path=path) from None
    except FamilyError as error:
        raise DraftError(*problems, str(error), path=path) from None
    problems += config_problems(family, config, target_config)
    metadata: dict[str, Any] = {}
    if (path / METADATA_FILE).exists():
        try:
            metadata = read_json(path / METADATA_FILE)
        except CheckpointError as error:
            problems += error.problems
        if (version := metadata.get("format_version", FORMAT_VERSION)) != FORMAT_VERSION:
            problems.append(f"{METADATA_FILE}: format_version {version} is not {FORMAT_VERSION}: update vllm-bebop")

    entries, unreadable = list_tensors(path)
    problems += unreadable
    ignored = tuple(sorted(name for name in entries if family.is_target_copy(name, config)))
    tensors = {name: entry for name, entry in entries.items() if name not in ignored}
    if not unreadable:
        problems += tensor_problems(family, config, tensors, target_config) + value_problems(tensors)
    if problems:
        raise DraftError(*problems, path=path)
    warnings = [*config_warnings(family, config, target_config), *_fingerprint_warnings(metadata, target_dir)]
    return Draft(path, family, config, metadata, tensors, ignored, tuple(warnings))


def inspect_checkpoint_head(model_dir: str | Path) -> HeadReport:
    """Require that a target checkpoint itself carries a complete head. Reads headers only.

    Raises:
        DraftError: unreadable, of no supported family, without a head, or with an incomplete one.
    """
    directory = Path(model_dir)
    try:
        config = read_json(directory / CONFIG_FILE)
        family = recognise(config)
        count = family.num_layers(config)
        expected = family.expected_tensors(config)
    except CheckpointError as error:
        raise DraftError(*error.problems, path=directory) from None
    except FamilyError as error:
        raise DraftError(str(error), path=directory) from None
    if not expected:
        problem = f"config.json says {family.layer_count_key} = {count}: the model has no MTP head; add a draft"
        raise DraftError(problem, path=directory)
    entries, problems = list_tensors(directory, allow_links=True)
    head = {name: entries[name] for name in entries if family.is_head_tensor(name, config)}
    head = {name: entry for name, entry in head.items() if not family.is_target_copy(name, config)}
    quantised = is_quantised(head)
    if not problems and not head:
        problems = [f"no tensor is named {family.prefixes(config)[0]}*: the head was lost on export; add a draft"]
    elif not problems:
        if quantised:
            problems = missing_tensors(family, config, {weight_name(name) for name in head})
        else:
            problems = tensor_problems(family, config, head, target_config=config)
    if problems:
        raise DraftError(*problems, path=directory)
    return HeadReport(family, count, head, quantised)


def head_tensor_names(model_dir: str | Path, config: Config) -> frozenset[str]:
    """The head's tensors, without copies of the target's: those stored in `model_dir`, or else every possible name."""
    family = recognise(config)
    if Path(model_dir).is_dir():
        stored, _ = list_tensors(Path(model_dir), allow_links=True)
        head = (name for name in stored if family.is_head_tensor(name, config))
        return frozenset(name for name in head if not family.is_target_copy(name, config))
    layouts = family.expert_layouts or (None,)
    return frozenset(name for layout in layouts for name in family.expected_tensors(config, layout))


def head_digest(directory: str | Path) -> str:
    """SHA-256 over the names and bytes of the head's tensors in a target's or a draft's directory.

    `fingerprint` is for the base model and leaves the head out; this tells a head that was trained anew from the old.

    Raises:
        CheckpointError: config.json is unreadable. FamilyError: it describes no supported head.
    """
    directory = Path(directory)
    names = head_tensor_names(directory, read_json(directory / CONFIG_FILE))
    entries, _ = list_tensors(directory, allow_links=True)
    digest = hashlib.sha256()
    for name in sorted(names):
        entry = entries[name]
        digest.update(f"{name} {entry.dtype} {entry.shape}".encode())
        with entry.file.open("rb") as stream:
            stream.seek(entry.begin)
            digest.update(stream.read(entry.end - entry.begin))
    return digest.hexdigest()


def write_draft(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    config: Config,
    metadata: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
    shard_bytes: int = _DEFAULT_SHARD_BYTES,
) -> Draft:
    """Write a draft, all or nothing: into a temporary directory, validated and compared bit by bit, then renamed.

    Args:
        path: the directory to create.
        tensors: the head's tensors by native name, in fp32, bf16 or fp16.
        config: see `draft_config`.
        metadata: for bebop.json; format_version is added.
        overwrite: replace an existing draft at `path`. A directory that is no draft is never replaced.
        shard_bytes: more than one file is written beyond this size.
    Raises:
        DraftError: `path` is taken, or what was to be written is no valid draft.
    """
    import torch
    from safetensors.torch import save_file

    path = Path(path).absolute()
    if path.exists() and not overwrite:
        raise DraftError("exists: choose another directory or pass overwrite=True", path=path)
    refuse_destination(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_directory(path, overwrite=True) as temporary:
        shards = _shards(tensors, shard_bytes)
        index: dict[str, str] = {}
        for number, names in enumerate(shards, start=1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            save_file({n: tensors[n].detach().cpu().contiguous() for n in names}, temporary / file, {"format": "pt"})
            index |= dict.fromkeys(names, file)
        if len(shards) > 1:
            total = sum(tensor.nbytes for tensor in tensors.values())
            write_json(temporary / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": index})
        write_json(temporary / CONFIG_FILE, config)
        write_json(temporary / METADATA_FILE, {"format_version": FORMAT_VERSION, **(metadata or {})})
        for weights in temporary.glob("*.safetensors"):
            shutil.copymode(temporary / CONFIG_FILE, weights)  # safetensors lets nobody but the owner read them
        try:
            written = read_draft(temporary, config)
        except DraftError as error:
            raise DraftError(*error.problems, path=path) from None
        for name, tensor in written.weights():
            original = tensors[name].detach().cpu().contiguous()
            if not torch.equal(tensor.view(torch.uint8), original.view(torch.uint8)):
                raise DraftError(f"{name} reads back differently than it was written: check the disk", path=path)
    return read_draft(path, config)


def draft_config(target_config: Config, num_layers: int | None = None) -> dict[str, Any]:
    """A config.json for a draft of this target: its own, unquantised, with `num_layers` MTP layers (None: as is)."""
    config = json.loads(json.dumps(dict(target_config)))
    inner: dict[str, Any] = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    for level in (config, inner):
        level.pop("quantization_config", None)
    if num_layers is not None:
        key = recognise(config).layer_count_key
        config.pop(key, None)
        inner[key] = num_layers
    return config


def refuse_misread_path(path: str | Path) -> None:
    """Raise DraftError if vLLM would take the draft at `path` for another method's because of how it is called."""
    if problems := _misread_path(path):
        raise DraftError(*problems, path=path)


def refuse_quantised_head(draft: Draft, target_config: Config) -> None:
    """Raise DraftError if vLLM would build a quantised head after the target's config: the draft is not quantised."""
    if (module := quantised_module(draft.family, draft.config, target_config)) is not None:
        problem = (
            f"the target is quantised, its head included ({module}), and the draft is not: serve an unquantised "
            "target, or list the head's modules among the exceptions of its quantization_config"
        )
        raise DraftError(problem, path=draft.path)


def resolve_draft(name_or_path: str | Path, revision: str | None = None, download_dir: str | None = None) -> Path:
    """The draft's directory: `name_or_path` itself if it exists, else the Hub repository of that name, downloaded.

    Args:
        download_dir: the Hub cache to use, where vLLM will look for the weights; None: the usual one.
    Raises:
        DraftError: neither, or vLLM would misread the resulting path.
    """
    path = Path(name_or_path).expanduser()
    if not path.exists():
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.safetensors"]
        try:
            found = snapshot_download(
                str(name_or_path), revision=revision, cache_dir=download_dir, allow_patterns=patterns
            )
            path = Path(found)
        except Exception as error:  # not found, gated, offline, malformed: the Hub's own message says which
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            problem = f"neither an existing directory nor a Hub repository that can be fetched ({reason})"
            raise DraftError(problem, path=name_or_path) from error
    refuse_misread_path(path)
    return path


def refuse_destination(path: Path) -> None:
    """Raises: DraftError, if no draft may be written to `path`: vLLM would misread it, or what is there is not ours."""
    refuse_misread_path(path)
    if path.exists() and not (path / METADATA_FILE).is_file():
        raise DraftError(f"exists and holds no {METADATA_FILE}: not ours to replace, remove it yourself", path=path)


def _misread_path(path: str | Path) -> list[str]:
    return [
        f"its path contains {substring!r}, from which vLLM concludes method {method!r}: rename the directory"
        for substring, method in _MISREAD_PATHS.items()
        if substring in str(path).lower()
    ]


def _fingerprint_warnings(metadata: Mapping[str, Any], target_dir: str | Path | None) -> list[str]:
    trained_for = metadata.get("base_fingerprint")
    if trained_for is None or target_dir is None or not Path(target_dir).is_dir():
        return []
    try:
        found = fingerprint(target_dir)
    except (CheckpointError, OSError) as error:  # weights in another format, or only a config, for load_format dummy
        return [f"could not tell whether the draft was trained for these weights: {error}"]
    if found == trained_for:
        return []
    return [
        f"the draft was trained for a base model with fingerprint {str(trained_for)[:12]}, this one has {found[:12]}: "
        "expect lower acceptance, the more the weights have moved"
    ]


def _shards(tensors: Mapping[str, torch.Tensor], shard_bytes: int) -> list[list[str]]:
    """Names in order, split so that no file but one of a single tensor exceeds shard_bytes."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, tensor in tensors.items():
        if shards[-1] and used + tensor.nbytes > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += tensor.nbytes
    return shards
