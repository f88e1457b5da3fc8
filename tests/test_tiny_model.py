"""The shipped model follows from its seed: two small builds, each in a process of its own, agree byte for byte."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.engines import ROOT

SMALL_BUILD = """
import sys
from pathlib import Path

import build, corpus

whole = corpus.load(build.SEED)
few = corpus.Corpus(*({domain: texts[:8] for domain, texts in side.items()} for side in whole))
corpus.load = lambda seed: few
build.HERE = Path(sys.argv[1])
build.CHECKPOINT, build.HELD_OUT = build.HERE / "checkpoint", build.HERE / "held_out"
build.CONTEXT, build.BASE_STEPS, build.HEAD_STEPS = 64, 6, 4
build.main()
"""


def small_build(directory: Path) -> dict[str, bytes]:
    directory.mkdir()
    command = [sys.executable, "-c", SMALL_BUILD, str(directory)]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}  # so little work: threads would only wait for each other
    done = subprocess.run(command, cwd=ROOT / "tiny_model", env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def test_build_is_the_same_twice(tmp_path):
    first, second = (small_build(tmp_path / name) for name in ("first", "second"))
    shipped = [file for folder in ("checkpoint", "held_out") for file in (ROOT / "tiny_model" / folder).iterdir()]
    assert first.keys() == {str(file.relative_to(ROOT / "tiny_model")) for file in shipped}
    assert first == second
    record = json.loads(first["checkpoint/build.json"])
    assert record["base"]["steps"] == 6 and record["head"]["steps"] == 4
