"""Model runner V1 with the fused kernels, as on a GPU, gives the tokens that it gives with the reference."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.engines import ROOT
from tests.support.totals import assert_totals
from tests.support.v1_probe import answered
from vllm_bebop.bench.conditions import on_cpu
from vllm_bebop.kernels.backend import plain


def test_answers_of_the_kernels_are_those_of_the_reference():
    environ = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    if on_cpu():
        environ |= {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "tests/cpu_support")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.v1_probe"],
        cwd=ROOT,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=580,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    kernels, reference = json.loads(lines[-1].removeprefix("RESULT ")), answered(plain())
    assert kernels.pop("backend").startswith("Triton kernels")
    assert reference.pop("backend") == plain().name
    totals = kernels.pop("totals"), reference.pop("totals")
    for each in totals:
        assert_totals(each, kernels["accepted"])
    for name in ("tokens", "entropy_nats", "drafts", "accepted", "target_only"):  # the overlap is only estimated
        assert totals[0][name] == pytest.approx(totals[1][name], rel=1e-4)
    assert kernels == reference
