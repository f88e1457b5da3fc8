#!/usr/bin/env bash
# Runs the tests of the kernels, compiled and emulated, with other versions of Triton: `make test-triton`, or
# `scripts/test_triton.sh 3.6.0`. The versions are those of the PyTorch releases that people have.
set -euo pipefail
cd "$(dirname "$0")/.."

for version in ${@:-3.6.0 3.8.0}; do
  folder=.venv/triton/$version
  if [ ! -d "$folder" ]; then
    .venv/bin/python -m pip install --quiet --no-deps --target "$folder.new" "triton==$version"
    mv "$folder.new" "$folder"
  fi
  echo "=== Triton $version"
  EMULATE_GPU=1 OMP_NUM_THREADS=1 PYTHONPATH=$folder .venv/bin/python -m pytest -q -n 2 --dist loadfile \
    tests/test_ptx.py tests/test_kernels_*.py
done
