"""Where the tests of kernels run, and how their outputs are compared.

On the GPU where there is one. Elsewhere the same tests run on the CPU twice, each time in a process of their own,
because Triton asks when it is imported: once Triton's interpreter runs the kernels, once they are compiled for a GPU
and tests/ptx runs what came out.
"""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.requests import assert_bitwise_equal
from tests.support.without_a_gpu import ENVIRONMENTS
from vllm_bebop.kernels import reference
from vllm_bebop.kernels.philox import gumbel

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = "EMULATE_GPU" in os.environ
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED and not EMULATED else "cpu"
RUNS_HERE = INTERPRETED or EMULATED or DEVICE == "cuda"
if EMULATED:
    from tests.ptx import driver

    driver.install()
NAN, INF = float("nan"), float("inf")
TEMPERATURES = [0.0, 0.3, 1.0, 1.3]


def runs_kernels(test):
    """Marks a test that `test_on_the_cpu` runs where this process cannot."""
    test.__test__ = RUNS_HERE
    return test


def draws_many_samples(test):
    """Marks a test of a law: the emulator, a request per program, would take minutes for what equality tests show."""
    test.__test__ = RUNS_HERE and not EMULATED
    return test


def plants_faults(test):
    """Marks a test that patches device functions or the interpreter, which only works uncompiled."""
    test.__test__ = INTERPRETED
    return test


def repeats_on_a_gpu(test):
    """Marks a test that looks for races, which the interpreter cannot show: it runs programs one after another."""
    test.__test__ = DEVICE == "cuda"
    return test


def run_on_the_cpu(file: str, how: str) -> None:
    """The tests of a file in a process of their own; how: "interpreted" or "emulated"."""
    environment = os.environ | ENVIRONMENTS[how] | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr
    print(child.stdout)


def smallest_margin(run: Callable[[], object]) -> float:
    """The smallest score gap of any decision that the reference makes in `run`."""
    gaps = []
    draw, is_below_ratio = reference._draw, reference._is_below_ratio

    def gap(scores: Tensor) -> None:
        if scores.shape[-1] > 1:
            best = scores.topk(2, dim=-1).values
            gaps.append((best[..., 0] - best[..., 1]).nan_to_num(INF).min().item())

    def measured_draw(scores, block_logsumexp, seeds, positions, streams, attempt=0):
        token = draw(scores, block_logsumexp, seeds, positions, streams, attempt)
        if len(token):
            width, (seeds, positions) = scores.shape[2], (seeds[:, None], positions[:, None])
            blocks = torch.arange(scores.shape[1], device=scores.device)
            gap(block_logsumexp + gumbel(seeds, positions, streams[0], blocks, attempt))
            block = token // width
            inside = scores[torch.arange(len(token), device=scores.device), block]
            noisy = inside + gumbel(seeds, positions, streams[1], torch.arange(width, device=scores.device), attempt)
            assert torch.equal(noisy.argmax(dim=1), token % width), "the noise measured is not what was drawn with"
            gap(noisy)
        return token

    def measured_ratio(u, log_a, log_b):
        gaps.extend((u.log() - (log_a - log_b)).abs().flatten().tolist())
        return is_below_ratio(u, log_a, log_b)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_draw", measured_draw)
        patch.setattr(reference, "_is_below_ratio", measured_ratio)
        run()
    return min(gaps, default=INF)


def assert_equal_from_both_forms(a, b) -> None:
    """Interpreted or emulated, one launch computes what two do, bit for bit; on a GPU up to the last digits."""
    if DEVICE == "cpu":
        assert_bitwise_equal(a, b)
        return
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        close = {"rtol": 1e-5, "atol": 1e-6} if x.is_floating_point() else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(x, y, **close, equal_nan=True, msg=lambda m, n=field.name: f"{n}: {m}")


def assert_no_less_accurate(ours: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Our error is at most twice that of eager fp32 plus a few roundings; exact is fp64. NaN and -inf must agree."""
    assert torch.equal(ours.isnan(), exact.isnan()) and torch.equal(ours.isneginf(), exact.isneginf())
    finite = exact.isfinite()
    ours, eager, exact = ours[finite].double(), eager[finite].double(), exact[finite]
    if exact.numel():
        tolerance = 2 * (eager - exact).abs().max() + 1e-5 * (1 + exact.abs())
        assert ((ours - exact).abs() <= tolerance).all()
