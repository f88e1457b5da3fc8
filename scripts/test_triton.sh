#!/usr/bin/env bash
# Runs the tests of the kernels, compiled and emulated, for other GPUs than `make test` (compute capabilities) and with
# the versions of Triton that come with other releases of PyTorch: `make test-triton`, or `... scripts/test_triton.sh 3.6.0`.
set -euo pipefail
cd "$(dirname "$0")/.."

emulate() {  # a compute capability, and a folder with another Triton
  EMULATE_GPU=$1 OMP_NUM_THREADS=1 PYTHONPATH=${2:-} .venv/bin/python -m pytest -q -n 2 --dist loadfile \
    tests/test_ptx.py $(grep -l emulated tests/test_kernels_*.py)
}

if [ $# = 0 ]; then
  for capability in 80 100; do
    echo "=== compute capability $capability"
    emulate $capability
  done
fi
for version in ${@:-3.6.0 3.8.0 3.9.0}; do
  folder=.venv/triton/$version
  if [ ! -d "$folder" ]; then
    .venv/bin/python -m pip install --quiet --no-deps --target "$folder.new" "triton==$version"
    mv "$folder.new" "$folder"
  fi
  echo "=== Triton $version"
  emulate 90 "$folder"
done
