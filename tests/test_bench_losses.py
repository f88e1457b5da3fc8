"""What the benchmark of losses keeps of an earlier run: all that compares, and nothing else."""

import json
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

import bench_losses

RESULTS = sorted((bench_losses.ROOT / "benchmarks" / "results").glob("losses*.json"))
CODE = "vllm_bebop.bench.conditions._code_digest"


class Pool:
    """Stands in for the processes: trains nothing, and counts."""

    measured = 0

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, *_: object) -> Future:
        Pool.measured += 1
        by_rule = dict.fromkeys(
            ("rejection_sampling", "target_only"), dict.fromkeys((*bench_losses.DOMAINS, "mean"), 2.0)
        )
        future: Future = Future()
        future.set_result(dict.fromkeys(bench_losses.PURPOSES, by_rule))
        return future


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Run it on texts in `tmp_path`; returns how many heads it had to measure."""
    (tmp_path / "rollouts.jsonl").write_text("trained on")

    def make_texts(directory: Path) -> None:
        for name in (f"{purpose}_{domain}" for purpose in bench_losses.PURPOSES for domain in bench_losses.DOMAINS):
            path = directory / f"{name}.jsonl"
            path.write_text(path.read_text() if path.exists() else name)

    monkeypatch.setattr(bench_losses, "make_texts", make_texts)
    monkeypatch.setattr(bench_losses, "plot", lambda *_: None)
    monkeypatch.setattr(bench_losses, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(bench_losses.tiny_draft, "SCRATCH", tmp_path)
    monkeypatch.setattr(bench_losses.tiny_draft, "make_rollouts", lambda: None)

    def run(out: Path, *options: str, directory: Path = tmp_path) -> int:
        monkeypatch.chdir(directory)
        arguments = ["--texts", str(tmp_path / "texts"), "--out", str(out), "--losses", "kl", "tv", *options]
        monkeypatch.setattr(sys, "argv", ["bench_losses.py", *arguments])
        Pool.measured = 0
        bench_losses.main()
        return Pool.measured

    return run


def test_losses_go_on_from_any_directory(bench: Any, tmp_path: Path) -> None:
    out = tmp_path / "losses.json"
    assert bench(out, "--seeds", "0", directory=bench_losses.ROOT) == 7  # the start, 2 losses at 3 rates
    assert bench(Path("losses.json"), "--seeds", "0", "1") == 2  # the second seed, at the best rate
    assert bench(out, "--seeds", "0", "1") == 0
    assert json.loads(out.read_text())["conditions"]["model"] == "tiny_model/checkpoint"


@pytest.mark.parametrize("changed", ["code_sha256", "updates", "training_sha256", "evaluation_sha256"])
def test_losses_refuse_a_file_of_other_code_or_texts(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    out, options = tmp_path / "losses.json", []
    bench(out)
    before = out.read_bytes()
    if changed == "code_sha256":
        monkeypatch.setattr(CODE, lambda: "other")
    elif changed == "updates":
        options = ["--updates", "81"]
    else:
        text = {"training": "rollouts.jsonl", "evaluation": "texts/held_out_math.jsonl"}[changed.split("_")[0]]
        (tmp_path / text).write_text("another text")
    with pytest.raises(SystemExit, match=f"measured with another {changed}: give another --out, or remove it"):
        bench(out, *options)
    assert out.read_bytes() == before


@pytest.mark.parametrize("committed", RESULTS, ids=lambda path: path.stem)
def test_losses_do_not_mix_with_committed_results_that_name_no_texts(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, committed: Path
) -> None:
    content = json.loads(committed.read_text())
    conditions = content["conditions"]
    monkeypatch.setattr(bench_losses, "measured_with", lambda *_: conditions)  # the same code on the same machine
    out = tmp_path / "losses.json"
    out.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="another training_sha256, evaluation_sha256"):
        bench(out)
    assert json.loads(out.read_text()) == content
