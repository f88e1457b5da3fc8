"""A draft stitched into its target: one full checkpoint that stock vLLM, SGLang and Transformers load. No vLLM import.

    config.json                       the target's, with as many MTP layers as the draft has
    model-*.safetensors               the target's shards, byte for byte; rewritten only where an old head is taken out
    mtp.safetensors                   the draft's tensors, under their native names
    model.safetensors.index.json      names both
    tokenizer files and the like      the target's

Shards are copied, never hard-linked: a program that rewrites a linked file in place would change both directories,
and nobody would know. Where the file system can share blocks (XFS, Btrfs), the kernel does so for a copy, which then
costs neither space nor time.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from vllm_bebop.draft import inspect_checkpoint_head, read_draft, refuse_misread_path
from vllm_bebop.durable import new_directory, write_json
from vllm_bebop.families import Config, Family, FamilyError, recognise, text_config
from vllm_bebop.tensor_files import CONFIG_FILE, INDEX_FILE, CheckpointError, TensorEntry, list_tensors, read_json

HEAD_FILE = "mtp.safetensors"

_SINGLE_FILE = "model.safetensors"  # loaders take it for the whole checkpoint, whatever an index beside it says
_RENAMED_SINGLE_FILE = "model-00001-of-00001.safetensors"
_WEIGHT_FILES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".h5", ".msgpack"),
    *(".safetensors.index.json", ".bin.index.json"),
)
_CHUNK_BYTES = 16 << 20


class MergeError(CheckpointError):
    """A merge that is refused or failed. `problems` lists the reasons."""


@dataclass(frozen=True)
class MergedCheckpoint:
    """num_replaced: tensors of the target's own head that were left out; warnings: to be shown to the user."""

    path: Path
    family: Family
    num_head_tensors: int
    num_replaced: int
    warnings: tuple[str, ...]


def merge(model_dir: str | Path, draft_dir: str | Path, out: str | Path) -> MergedCheckpoint:
    """Write a full checkpoint of `model_dir`'s target with `draft_dir`'s head, all or nothing.

    Files are streamed, whatever their size, into a temporary directory beside `out`. Every tensor is then compared with
    its source, bit by bit, and all is on the disk before the directory gets its name. An old head is left out; copies
    of the target's embedding or lm_head that lie among it (DeepSeek, GLM) stay. Other files of `model_dir` are copied,
    its subdirectories and weights in other formats are not. Shows a progress bar.

    Args:
        model_dir: the target's directory, with or without a head.
        draft_dir: see `vllm_bebop.draft`.
        out: the directory to create.
    Raises:
        MergeError: `out` is taken, the target is unreadable, the disk is too small, or what was written reads back
            differently.
        DraftError: the draft is invalid, or does not belong to this target.
    """
    model_dir, out = Path(model_dir), Path(out).absolute()
    refuse_misread_path(out)  # vLLM reads the method from the path of whatever holds the head
    if out.exists():
        raise MergeError("exists: choose another directory", path=out)
    for owner, directory in (("target", model_dir), ("draft", Path(draft_dir))):
        if not directory.is_dir():
            raise MergeError(f"no such directory: give the {owner}'s", path=directory)
    target_config = read_json(model_dir / CONFIG_FILE)
    try:
        family = recognise(target_config)
        draft_layers = family.num_layers(read_json(Path(draft_dir) / CONFIG_FILE))
    except FamilyError as error:
        raise MergeError(str(error), path=model_dir) from None
    config = _with_layers(target_config, family, draft_layers)
    draft = read_draft(draft_dir, config, model_dir)
    stored, problems = list_tensors(model_dir, allow_links=True)
    if problems:
        raise MergeError(*problems, path=model_dir)
    kept = {name: entry for name, entry in stored.items() if not _is_head(name, family, target_config, config)}

    total = sum(entry.end - entry.begin for entry in (*kept.values(), *draft.tensors.values()))
    out.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(out.parent).free) < total:
        raise MergeError(f"needs {total} bytes, {free} are free there: choose another disk", path=out)
    with new_directory(out) as temporary:
        for file in _other_files(model_dir):
            shutil.copyfile(file, temporary / file.name)
        write_json(temporary / CONFIG_FILE, config)
        with tqdm(total=2 * total, unit="B", unit_scale=True, unit_divisor=1024) as progress:
            progress.set_description("writing")
            files = dict(_write_shards(stored, kept, temporary, progress))
            head_file = _unused_name(files.values())
            _write_safetensors(temporary / head_file, draft.tensors.values(), {"format": "pt"}, progress)
            names = {name: files[entry.file] for name, entry in kept.items()}
            names |= dict.fromkeys(draft.tensors, head_file)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
            write_json(temporary / INDEX_FILE, index)
            progress.set_description("verifying")
            _verify(temporary, {**kept, **draft.tensors}, progress)
        inspect_checkpoint_head(temporary)
        if out.exists():
            raise MergeError("has appeared in the meantime: choose another directory", path=out)
    return MergedCheckpoint(out, family, len(draft.tensors), len(stored) - len(kept), draft.warnings)


def _with_layers(config: Config, family: Family, num_layers: int) -> dict[str, Any]:
    """The target's config with its layer count set where it already stands, else beside the language model's sizes."""
    changed: dict[str, Any] = json.loads(json.dumps(dict(config)))
    key = family.layer_count_key
    levels = [level for level in (changed, text_config(changed)) if level.get(key) is not None]
    for level in levels or [text_config(changed)]:
        level[key] = num_layers  # type: ignore[index]  # a fresh copy: the mapping is a dict
    return changed


def _is_head(name: str, family: Family, target_config: Config, config: Config) -> bool:
    """Part of an old head, under as many layers as the target had or is to have; copies of the target's own are not."""
    return any(family.is_head_tensor(name, c) and not family.is_target_copy(name, c) for c in (target_config, config))


def _other_files(model_dir: Path) -> Iterator[Path]:
    for file in sorted(model_dir.iterdir()):
        if file.is_file() and not file.name.startswith(".") and not file.name.endswith(_WEIGHT_FILES):
            yield file


def _write_shards(
    stored: Mapping[str, TensorEntry], kept: Mapping[str, TensorEntry], directory: Path, progress: tqdm
) -> Iterator[tuple[Path, str]]:
    """(the target's file, its name in `directory`) of each shard that still holds a tensor."""
    for file in sorted({entry.file for entry in kept.values()}):
        name = _RENAMED_SINGLE_FILE if file.name == _SINGLE_FILE else str(file.name)
        held = [entry for entry in stored.values() if entry.file == file]
        left = [entry for entry in held if entry.name in kept]
        if len(left) == len(held):
            with file.open("rb") as source, (directory / name).open("wb") as destination:
                size = sum(entry.end - entry.begin for entry in held)
                header = file.stat().st_size - size
                _copy(source, 0, header, destination)
                _copy(source, header, size, destination, progress)
        else:
            _write_safetensors(directory / name, left, _metadata(file), progress)
        yield file, name


def _unused_name(names: Iterable[str]) -> str:
    """HEAD_FILE, unless a shard of the target with more than a head in it is called so."""
    return HEAD_FILE if HEAD_FILE not in set(names) else f"bebop-{HEAD_FILE}"


def _metadata(file: Path) -> dict[str, str]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return json.loads(stream.read(length)).get("__metadata__", {})


def _write_safetensors(path: Path, entries: Iterable[TensorEntry], metadata: Mapping[str, str], progress: tqdm) -> None:
    """A safetensors file of tensors that lie in other ones, of any dtype."""
    # Larger items first, so that every tensor stays aligned; else in the order of the files.
    ordered = sorted(entries, key=lambda e: (-((e.end - e.begin) // max(1, prod(e.shape))), e.file, e.begin))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for entry in ordered:
        end = offset + entry.end - entry.begin
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as destination:
        destination.write(len(text).to_bytes(8, "little") + text)
        for entry in ordered:
            with entry.file.open("rb") as source:
                _copy(source, entry.begin, entry.end - entry.begin, destination, progress)


def _copy(source: BinaryIO, begin: int, size: int, destination: BinaryIO, progress: tqdm | None = None) -> None:
    """Append bytes begin .. begin + size of `source`, inside the kernel where it can."""
    destination.flush()
    position, end = begin, begin + size
    while position < end:
        wanted = min(_CHUNK_BYTES, end - position)
        try:
            copied = os.copy_file_range(source.fileno(), destination.fileno(), wanted, position)
        except (AttributeError, OSError):  # not on this system, or not between these two file systems
            copied = os.write(destination.fileno(), os.pread(source.fileno(), wanted, position))
        if copied == 0:
            raise MergeError("has become shorter while it was copied: try again", path=source.name)
        position += copied
        if progress is not None:
            progress.update(copied)


def _verify(directory: Path, sources: Mapping[str, TensorEntry], progress: tqdm) -> None:
    """Raise MergeError unless `directory` holds exactly these tensors, bit by bit."""
    written, problems = list_tensors(directory)
    if not problems and written.keys() != sources.keys():
        problems = [f"{name} is not where it belongs" for name in sorted(written.keys() ^ sources.keys())[:5]]
    for name, entry in sources.items() if not problems else ():
        found = written[name]
        if (found.dtype, found.shape) != (entry.dtype, entry.shape) or not _same_bytes(found, entry, progress):
            problems.append(f"{name} reads back differently than it was written: check the disk")
    if problems:
        raise MergeError(*problems, path=directory)


def _same_bytes(found: TensorEntry, source: TensorEntry, progress: tqdm) -> bool:
    with found.file.open("rb") as ours, source.file.open("rb") as theirs:
        ours.seek(found.begin)
        theirs.seek(source.begin)
        left = source.end - source.begin
        while left:
            data = ours.read(min(_CHUNK_BYTES, left))
            if not data or data != theirs.read(len(data)):
                return False
            left -= len(data)
            progress.update(len(data))
    return True
