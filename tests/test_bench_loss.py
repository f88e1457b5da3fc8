"""The loss benchmark's own logic: failures, other losses, goals."""

import itertools
import json
from pathlib import Path

import pytest
import torch

import bench_loss


@pytest.mark.parametrize("error, message", [(torch.OutOfMemoryError("x"), "out of memory"), (TypeError("y\nz"), "y")])
def test_loss_records_what_fails(error: Exception, message: str) -> None:
    def run(case):
        raise error

    case = {"draft_hidden": torch.zeros(1, 2, 4), "lm_head": torch.zeros(8, 4)}
    measured = bench_loss.measure_variant("Liger (tv)", run, case)
    assert message in measured["error"]
    assert not bench_loss.failures([{"name": "Liger (tv)", **measured}])
    assert bench_loss.failures([{"name": bench_loss.OURS, **measured}])


def test_loss_says_whose_loss_is_another() -> None:
    size = {name: bench_loss.GOAL[name] for name in bench_loss.KEY[1:]}
    losses = {"plain torch": 0.5009, bench_loss.OURS: 0.5, "Liger (tv)": 0.502}
    entries = [{"name": name, **size, "loss": loss} for name, loss in losses.items()]
    entries += [{"name": "absent", **size, "error": "x"}, {"name": "alone", **size, "num_steps": 9, "loss": 0.5}]
    bench_loss.compare_losses(entries)
    assert [entry.get("is_same_loss") for entry in entries] == [True, True, False, None, None]


def test_loss_goes_on_after_a_failure_of_ours(monkeypatch, tmp_path: Path) -> None:
    def wrong(case):
        return (case["draft_hidden"] * 0).sum()

    monkeypatch.setattr(bench_loss, "our_loss", wrong)
    monkeypatch.setattr(bench_loss, "variants", lambda: {bench_loss.OURS: wrong, "peer": bench_loss.plain_loss})
    monkeypatch.setattr("vllm_bebop.kernels.linear_statistics.can_fuse", lambda _: False)  # put back afterwards
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for _ in range(2):
        (failed,) = bench_loss.time(is_quick=False, minutes=1.0, out=tmp_path, is_dry_run=True)
        assert "the gate is red" in failed
    content = json.loads((tmp_path / "loss_cpu.json").read_text())
    assert [(entry["name"], "error" in entry) for entry in content["entries"]] == [
        (bench_loss.OURS, True),
        ("peer", False),
    ]
    assert content["goal"]["reached"] is None


def test_loss_goal_needs_both_time_and_memory() -> None:
    assert bench_loss.goal([])["reached"] is None
    size = {name: bench_loss.GOAL[name] for name in bench_loss.KEY[1:]}
    for median, peak, reached in ((130, 1.5, True), (131, 1.0, False), (100, 1.6, False)):
        measured = {"name": bench_loss.OURS, **size, "median_ms": median, "peak_gb": peak}
        assert bench_loss.goal([measured])["reached"] is reached
    assert sorted(bench_loss.TIME_SIZES) == sorted(itertools.product((2048, 4096), (151_936, 248_320), (3, 5)))
    assert bench_loss.TIME_SIZES[0] == tuple(size.values())
