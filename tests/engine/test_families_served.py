"""Families besides the shipped model's, random weights: GLM-4.x MoE and Qwen3.5 load, draft, and keep greedy text.

DeepSeek-V3 (MLA refuses small heads on a CPU) and MiMo (its config is remote code) cannot be served here; the names and
shapes of their heads are checked against vLLM's own modules in tests/test_families.py.
"""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.support.engines import ROOT


@pytest.mark.parametrize("family", ["glm4_moe", "qwen3_5"])
def test_family_is_served(family, tmp_path):
    # scripts/setup_venv.sh puts torchvision, which vLLM's Qwen3.5 imports, beside the environment.
    torchvision = Path(sysconfig.get_path("data")) / "torchvision"
    environ = os.environ | {"PYTHONPATH": f"{ROOT / 'tests/cpu_support'}:{torchvision}"}
    command = [sys.executable, "-m", "tests.support.families_probe", family, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=400)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    result = json.loads(lines[-1].removeprefix("RESULT "))
    assert result["greedy"] == result["stock_greedy"]
    assert result["seeded"] == result["again"]
    assert result["accepted"][0] > 0.05 * result["rounds"]
