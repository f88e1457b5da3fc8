"""What appears on the disk appears whole: in which order it gets there, and what an error leaves behind."""

import os
from pathlib import Path

import pytest

from vllm_bebop.durable import new_directory, write_file


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is put onto the disk and renamed, by its name then, in order."""
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(descriptor: int) -> None:
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def record_rename(source: Path, destination: Path) -> None:
        events.append(f"rename {Path(source).name} {Path(destination).name}")
        rename(source, destination)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    monkeypatch.setattr(os, "replace", record_rename)
    return events


def test_new_directory_is_on_the_disk_before_it_has_its_name(tmp_path: Path, order: list[str]) -> None:
    with new_directory(tmp_path / "made") as directory:
        (directory / "a").write_text("1")
        (directory / "b").write_text("2")
        assert not (tmp_path / "made").exists()
    temporary = directory.name
    assert sorted(order[:2]) == ["sync a", "sync b"]
    assert order[2:] == [f"sync {temporary}", f"rename {temporary} made", f"sync {tmp_path.name}"]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert (tmp_path / "made" / "a").read_text() == "1"


def test_new_directory_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="in the block"), new_directory(tmp_path / "made"):
        raise RuntimeError("in the block")
    assert not list(tmp_path.iterdir())
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "taken").touch()
    with pytest.raises(OSError, match="not empty"), new_directory(tmp_path / "made"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_write_file_replaces_at_once_or_not_at_all(
    tmp_path: Path, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_file(path, b"old")
    temporary = order[0].removeprefix("sync ")
    assert order == [f"sync {temporary}", f"rename {temporary} file", f"sync {tmp_path.name}"]

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old" and [each.name for each in tmp_path.iterdir()] == ["file"]
