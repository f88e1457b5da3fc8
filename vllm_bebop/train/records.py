"""Lines of JSONL and Parquet files; bad ones are counted and named, so that one of them does not end a long job."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from vllm_bebop.errors import UserError

Parsed = TypeVar("Parsed")

_SHOWN = 5


class DataError(UserError):
    """A line that cannot be used, or a file without a usable one. The message says what is expected."""


class BadLines:
    """What was left out, and why: `count` lines, the first few of them named as FILE:LINE in the text."""

    def __init__(self) -> None:
        self.count = 0
        self._shown: list[str] = []

    def add(self, place: str, reason: object) -> None:
        """Count one more."""
        self.count += 1
        if self.count <= _SHOWN:
            shown = f"{place}: {reason}".encode(errors="backslashreplace")  # what cannot be printed is quoted too
            self._shown.append(shown.decode())

    def __str__(self) -> str:
        if not self.count:
            return "no bad lines"
        more = [f"... and {self.count - _SHOWN} more"] if self.count > _SHOWN else []
        return "\n  ".join([f"{self.count} bad {'line' if self.count == 1 else 'lines'}", *self._shown, *more])


def read_lines(
    paths: Sequence[str | Path],
    parse: Callable[[Mapping[str, Any]], Parsed],
    bad_lines: BadLines,
    strict: bool = False,
) -> Iterator[tuple[str, Parsed]]:
    """Parse every line of some files, one after the other, without holding them in memory.

    Args:
        paths: files; *.parquet is read as Parquet, anything else as one JSON object per line (blank lines are skipped).
        parse: gets one line as a mapping; raises DataError for one that it cannot use.
        bad_lines: what `parse` refuses, and what is no JSON object, is added here.
        strict: a bad line is an error, raised once all are known.
    Yields:
        The place ("FILE:LINE", counted from 1) and the parsed line.
    Raises:
        DataError: a file is missing or not what its name says, no line is usable, or one is bad and `strict` is set.
    """
    usable = False
    for path in map(Path, paths):
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        for number, line in enumerate(_lines(path), start=1):
            place = f"{path}:{number}"
            try:
                if isinstance(line, bytes) and not line.strip():
                    continue
                parsed = parse(_json_object(line) if isinstance(line, bytes) else line)
            except DataError as error:
                bad_lines.add(place, error)
                continue
            usable = True
            yield place, parsed
    if strict and bad_lines.count:
        raise DataError(str(bad_lines))
    if not usable:
        raise DataError(f"{', '.join(map(str, paths))}: nothing to use; {bad_lines}")


def _lines(path: Path) -> Iterator[bytes | Mapping[str, Any]]:
    """The raw lines of a JSONL file, or the rows of a Parquet file."""
    if path.suffix != ".parquet":
        with path.open("rb") as file:
            yield from file
        return
    try:
        from datasets import load_dataset
        from pyarrow import ArrowException
    except ModuleNotFoundError as error:
        raise DataError(f"{path}: Parquet needs {error.name}, which is not installed: pip install datasets") from None

    try:
        # Streamed: what is kept is copied anyway, and a memory-mapped cache on disk would be one copy more.
        for row in load_dataset("parquet", data_files=str(path), split="train", streaming=True):
            yield _without_nulls(row)
    except ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from None


def _without_nulls(value: Any) -> Any:
    """Parquet gives all rows the same keys, at any depth; a key that a row did not have is null there."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _json_object(line: bytes) -> Mapping[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON ({error.msg}, column {error.colno})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 (byte {error.start + 1})") from None
    except (ValueError, RecursionError) as error:  # thousands of digits or brackets
        raise DataError(f"not JSON that Python reads ({error})") from None
    if not isinstance(record, dict):
        raise DataError(f"expected a JSON object, found a {type(record).__name__}")
    return record
