"""A directory of safetensors, read without loading it: which file holds which tensor, and what its bytes add up to.

Headers are parsed here rather than by the safetensors package so that a bad file is named together with its remedy, and
so that a model of hundreds of gigabytes can be listed and sampled by reading kilobytes.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_bebop.errors import UserError
from vllm_bebop.families import FamilyError, recognise

if TYPE_CHECKING:
    import torch

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_SAMPLE_BYTES = 64
# What a head takes from its base model.
_DENSELY_SAMPLED = ("embed_tokens.weight", "lm_head.weight", "model.norm.weight", "language_model.norm.weight")

_UINT64 = 2**64 - 1
_CHUNK_ELEMENTS = 1 << 22  # bounds the int64 temporaries of a checksum to about 100 MB


class CheckpointError(UserError):
    """A directory that cannot be read as a checkpoint. `problems`: one sentence each, with place and remedy."""

    def __init__(self, *problems: str, path: str | Path | None = None):
        self.problems = problems
        listed = problems[0] if len(problems) == 1 else "\n  - ".join(("", *problems))
        super().__init__(listed if path is None else f"{path}: {listed}")


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies. dtype is safetensors' name ("BF16"); begin and end are byte offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object. Raises CheckpointError naming the file if it is missing, malformed, or no object."""
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.name} is missing: copy it from the target model", path=path.parent) from None
    except OSError as error:
        raise CheckpointError(
            f"{path.name} cannot be read ({error}): check its permissions", path=path.parent
        ) from None
    except ValueError as error:  # malformed JSON or UTF-8
        raise CheckpointError(f"{path.name} is not valid JSON ({error})", path=path.parent) from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path.name} holds a {type(parsed).__name__}, not a JSON object", path=path.parent)
    return parsed


def list_tensors(directory: Path, allow_links: bool = False) -> tuple[dict[str, TensorEntry], list[str]]:
    """Every tensor of the safetensors files in `directory`, and every problem met on the way.

    With an index, the files are those that it names; without, all *.safetensors.

    Args:
        directory: an existing directory.
        allow_links: follow symbolic links out of the directory. Without it only the Hub cache's links are followed
            (snapshots/<commit>/file -> ../../blobs/<hash>).
    Returns:
        entries by tensor name, and problems, one sentence each; no problems means that all is well.
    """
    problems: list[str] = []
    index: dict[str, str] = {}
    if (directory / INDEX_FILE).exists():
        try:
            index = read_json(directory / INDEX_FILE).get("weight_map", {})
        except CheckpointError as error:
            return {}, list(error.problems)
        if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
            return {}, [f"{INDEX_FILE}: weight_map must map tensor names to file names"]
        files = sorted(set(index.values()))
    else:
        files = sorted(file.name for file in directory.glob("*.safetensors"))
    if not files:
        return {}, [_no_safetensors(directory)]

    entries: dict[str, TensorEntry] = {}
    for file in files:
        if problem := _refuse_file(directory, file, allow_links):
            problems.append(problem)
            continue
        try:
            header = read_header(directory / file)
        except ValueError as error:
            problems.append(str(error))
            continue
        for entry in header:
            if (other := entries.get(entry.name)) is not None:
                problems.append(f"{entry.name} is in both {other.file.name} and {file}: keep one")
            entries[entry.name] = entry
    for name, file in sorted(index.items()):
        if not problems and name not in entries:
            problems.append(f"{INDEX_FILE} says that {name} is in {file}, which does not hold it: rebuild the index")
    return entries, problems


def read_header(file: Path) -> list[TensorEntry]:
    """The tensors of one safetensors file. Raises ValueError: truncated or corrupted, naming the file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        corrupted = ValueError(f"{file.name}: the safetensors header is corrupted: copy the file again")
        if len(prefix) < 8 or 8 + length > size:
            # A plausible length that the file does not reach is a short copy; any other is no safetensors at all.
            if len(prefix) < 8 or length <= _MAX_HEADER_BYTES:
                raise ValueError(f"{file.name}: truncated at {size} bytes, inside its header: copy the file again")
            raise corrupted
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            entries = [
                TensorEntry(name, t["dtype"], tuple(t["shape"]), file, *(8 + length + o for o in t["data_offsets"]))
                for name, t in header.items()
            ]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise corrupted from None
    needed = max((entry.end for entry in entries), default=8 + length)
    if needed != size:
        what = f"truncated at {size} of {needed} bytes" if needed > size else f"{size - needed} bytes too long"
        raise ValueError(f"{file.name}: {what}: copy the file again")
    if not all(_is_consistent(entry, 8 + length) for entry in entries):
        raise corrupted
    return entries


def _is_consistent(entry: TensorEntry, data_begins: int) -> bool:
    item_bytes = _ITEM_BYTES.get(entry.dtype)  # unknown: left to the caller, who knows which dtypes will do
    size = entry.end - entry.begin
    return entry.begin >= data_begins and size >= 0 and item_bytes in (None, size // max(1, prod(entry.shape)))


def read_tensors(entries: Mapping[str, TensorEntry]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, CPU tensor mapped from the file) of each entry, in file order."""
    from safetensors import safe_open

    for file, group in _by_file(entries):
        with safe_open(file, framework="pt") as stored:
            for entry in group:
                yield entry.name, stored.get_tensor(entry.name)


def _by_file(entries: Mapping[str, TensorEntry]) -> Iterator[tuple[Path, Iterator[TensorEntry]]]:
    in_file_order = sorted(entries.values(), key=lambda entry: (entry.file, entry.begin))
    return groupby(in_file_order, key=lambda entry: entry.file)


def _refuse_file(directory: Path, file: str, allow_links: bool) -> str | None:
    """Why a file named by the index, or found in the directory, must not be opened; None if it may be."""
    if Path(file).is_absolute() or ".." in Path(file).parts:
        return f"{INDEX_FILE} names {file!r}, outside the directory: file names must be relative to it"
    if not file.endswith(".safetensors"):
        return f"{INDEX_FILE} names {file!r}: only .safetensors files are read"
    path = directory / file
    if not path.is_file():
        return f"{file} is missing, though {INDEX_FILE} names it" if not path.is_symlink() else f"{file}: dangling link"
    if not allow_links and not path.resolve().is_relative_to(_own_root(directory)):
        return f"{file} is a link to {path.resolve()}, outside the directory: put the file itself there"
    return None


def _own_root(directory: Path) -> Path:
    """What links may lead into: the directory, or the whole repository cache if it is a snapshot in the Hub cache."""
    directory = directory.resolve()
    repository = directory.parent.parent
    in_hub_cache = directory.parent.name == "snapshots" and repository.name.startswith("models--")
    return repository if in_hub_cache else directory


def _no_safetensors(directory: Path) -> str:
    pickles = sorted(file.name for file in directory.iterdir() if file.suffix in _PICKLE_SUFFIXES)
    if pickles:
        return f"holds only pickles ({', '.join(pickles)}), which can run code when opened: convert them to safetensors"
    return "holds no .safetensors file"


def fingerprint(model_dir: str | Path) -> str:
    """A cheap, stable identity of a base model, to tell whether a draft was trained for it.

    sha256 over every tensor's name, dtype and shape, and over a few sampled bytes of every tensor but the routed
    experts (embedding, lm_head and final norm: 16 samples; others: one). Reads kilobytes of a model of any size.
    Equal for the same tensors sharded or ordered differently, and with or without an MTP head. Different when any
    training has moved the weights, and also when a tensor is renamed, converted, or dropped (a tied lm_head).

    Raises:
        CheckpointError: no readable safetensors.
    """
    directory = Path(model_dir)
    if not directory.is_dir():
        raise CheckpointError("is not a directory", path=directory)
    entries, problems = list_tensors(directory, allow_links=True)
    if problems:
        raise CheckpointError(*problems, path=directory)
    try:
        config = read_json(directory / CONFIG_FILE)
        family = recognise(config)
        entries = {name: entry for name, entry in entries.items() if not family.is_head_tensor(name, config)}
    except (CheckpointError, FamilyError):
        pass  # a model without a known head: every tensor is the base model's

    digests: dict[str, bytes] = {}
    for file, group in _by_file(entries):
        with file.open("rb") as stream:
            for entry in group:
                digest = hashlib.sha256(f"{entry.name} {entry.dtype} {entry.shape}".encode())
                for offset in _sample_offsets(entry):
                    stream.seek(offset)
                    digest.update(stream.read(min(_SAMPLE_BYTES, entry.end - offset)))
                digests[entry.name] = digest.digest()
    return hashlib.sha256(b"".join(digests[name] for name in sorted(digests))).hexdigest()


def _sample_offsets(entry: TensorEntry) -> list[int]:
    """Where to sample a tensor's bytes, relative to its own length so that resharding does not matter."""
    if ".experts." in entry.name:
        return []
    samples = 16 if entry.name.endswith(_DENSELY_SAMPLED) else 1
    span = max(0, entry.end - entry.begin - _SAMPLE_BYTES)
    return [entry.begin + span * (i + 1) // (samples + 1) for i in range(samples)]


def element_checksum(tensor: torch.Tensor, dtype: torch.dtype) -> tuple[int, int, int]:
    """An order-independent checksum of a tensor's elements, to compare what an engine holds with what a file holds.

    With b the bit patterns of the elements in `dtype`, as unsigned integers: (number of elements, sum of b, sum of
    mix(b)), both sums modulo 2^64. Fusing q, k, v into one matrix or stacking experts permutes elements and so leaves
    it unchanged; `add_checksums` joins the parts. Any single changed element changes it; a swap of two does not.

    Args:
        tensor: any shape, floating point, any device; memory for at most 4 M int64 elements is used beside it.
        dtype: float32, bfloat16 or float16: what the engine holds, since the conversion rounds.
    """
    import torch

    integer, mask = (torch.int32, 0xFFFFFFFF) if dtype.itemsize == 4 else (torch.int16, 0xFFFF)
    plain = mixed = 0
    for chunk in tensor.detach().reshape(-1).split(_CHUNK_ELEMENTS):
        bits = chunk.to(dtype).view(integer).to(torch.int64) & mask
        plain += int(bits.sum())
        mixed += int(_mix(bits).sum())  # wraps modulo 2^64, as int64 does
    return tensor.numel(), plain & _UINT64, mixed & _UINT64


def add_checksums(*checksums: tuple[int, int, int]) -> tuple[int, int, int]:
    """The checksum of all the elements together."""
    count, plain, mixed = (sum(part) for part in zip(*checksums, strict=True)) if checksums else (0, 0, 0)
    return count, plain & _UINT64, mixed & _UINT64


def _mix(bits: torch.Tensor) -> torch.Tensor:
    """A bijection of non-negative int64 below 2^32 that is far from linear (splitmix64's multiply and shift)."""
    mixed = (bits + 1) * -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number
    mixed = (mixed ^ ((mixed >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9; logical shift
    return mixed ^ ((mixed >> 27) & 0x1FFFFFFFFF)
