"""Families besides the shipped model's, random weights: each loads with its own head, drafts, and keeps greedy text.

That drafts are what training computes is checked elsewhere, module against module; here only that they are used.
"""

import json
import subprocess
import sys

import pytest

from tests.support.engines import ROOT, environment_for_every_family, unsupported_families

FAMILIES = ("glm4_moe", "mimo", "qwen3_5", "qwen3_5_moe", "deepseek_v3")
UNSUPPORTED = unsupported_families()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(results by family, the end of all output) of the probe: one process, because importing vLLM takes so long."""
    # At these sizes a second thread only adds waiting: DeepSeek-V3's attention on a CPU is many small operations.
    environ = environment_for_every_family() | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.families_probe", str(tmp_path_factory.mktemp("models"))]
    command += [family for family in FAMILIES if family not in UNSUPPORTED]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=500)
    lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return {result["family"]: result for result in map(json.loads, lines)}, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_served(served, family):
    if family in UNSUPPORTED:
        pytest.skip(UNSUPPORTED[family])
    results, printed = served
    assert family in results, printed
    result = results[family]
    assert result["greedy"] == result["stock_greedy"]
    assert result["seeded"] == result["again"]
    assert result["accepted"][0] > 0.05 * result["rounds"]
