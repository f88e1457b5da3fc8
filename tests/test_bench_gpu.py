"""scripts/bench_gpu.sh: its steps exist, run in order, and failures are named."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCH_GPU = ROOT / "scripts" / "bench_gpu.sh"


def test_bench_gpu_names_steps_and_tests_that_exist() -> None:
    child = subprocess.run(["bash", BENCH_GPU, "nonsense"], capture_output=True, text=True)
    assert child.returncode == 2 and "unknown step nonsense" in child.stderr
    script = BENCH_GPU.read_text()
    (chosen,) = re.findall(r"-k '([^']+)'", script)
    sources = "".join(
        (ROOT / "tests" / f"test_kernels_{name}.py").read_text() for name in ("sampling", "verification", "loss")
    )
    names = re.findall(r"^def (test_\w+)", sources, re.MULTILINE)
    for word in chosen.split(" or "):
        assert any(word in name for name in names), word
    ((file, left_out),) = re.findall(r"--deselect (\S+)::(\S+)", script)
    assert f"def {left_out}(" in (ROOT / file).read_text()


@pytest.mark.parametrize(
    ("options", "minutes"),
    [([], ("9", "9")), (["--quick"], ("3.6", "1.575")), (["--quick", "--minutes", "2"], ("1.8", "1.8"))],
)
def test_bench_gpu_runs_each_step_and_names_what_failed(
    tmp_path: Path, options: list[str], minutes: tuple[str, str]
) -> None:
    """With a python that only notes what it is called with."""
    python, notes = tmp_path / "python", tmp_path / "notes"
    python.write_text(f'#!/bin/sh\necho "$@" >> {notes}\ncase "$*" in *selftest*) exit 1;; esac\n')
    python.chmod(0o755)
    command = ["bash", str(BENCH_GPU), *options, "--out", str(tmp_path)]
    child = subprocess.run(
        command, env={"PYTHON": str(python), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert child.returncode == 1 and child.stderr.strip().endswith("failed: selftest")
    quick = " --quick" if options else ""
    calls = {
        "selftest": "-m vllm_bebop.cli selftest --device cuda",
        "tests": "-m pytest -v",
        "kernels": f"benchmarks/bench_kernels.py time{quick} --out {tmp_path} --minutes {minutes[0]}",
        "loss": f"benchmarks/bench_loss.py time{quick} --out {tmp_path} --minutes {minutes[1]}",
        "races": f"benchmarks/bench_kernels.py races{quick} --out {tmp_path}",
        "plot": "benchmarks/bench_kernels.py plot",
    }
    order = ["kernels", "loss", "selftest", "races", "plot"] if options else list(calls)
    made = [line for line in notes.read_text().splitlines() if not line.startswith("-c ")]
    for step, call in zip(order, made, strict=True):
        assert call.startswith(calls[step]), step
