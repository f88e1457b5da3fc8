#!/usr/bin/env bash
# On a GPU: the kernels are right, then how fast they are. Needs PyTorch, Triton, pytest and what pyproject.toml lists as
# dependencies; no vLLM and no network. Peers are measured where they are installed.
#
#   scripts/bench_gpu.sh [--out DIR] [--minutes M] [STEP ...]
#
#   install    makes the package importable from this checkout, unless it is
#   check      bebop selftest, and the kernels' tests on this GPU
#   kernels    sampling kernels: time and bandwidth at 84 sizes
#   loss       loss kernels: time and peak memory at 8 sizes
#   races      100,000 repeats, single launch against two
#   sanitize   memcheck and racecheck over some of the tests, if compute-sanitizer is there
#   plot       draws what `kernels` measured
#
# Without STEP, all of them in this order. Results go to DIR, benchmarks/results by default. `kernels` and `loss` save as
# they go, end after M minutes, and go on where they stopped when they are started again.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1

python=${PYTHON:-python3} out=benchmarks/results limit=() steps=()
tests=$(ls tests/test_kernels_*.py | grep -v compile) # that one compiles for other GPUs too, on any machine
while [ $# -gt 0 ]; do
  case $1 in
    --out) out=$2; shift 2 ;;
    --minutes) limit=(--minutes "$2"); shift 2 ;;
    -*) echo "unknown option $1" >&2; exit 2 ;;
    *) steps+=("$1"); shift ;;
  esac
done
[ ${#steps[@]} -gt 0 ] || steps=(install check kernels loss races sanitize plot)

run_install() {
  "$python" -c 'import vllm_bebop.kernels' 2>/dev/null ||
    "$python" -m pip install --quiet --no-deps --no-build-isolation --no-index -e .
  "$python" -c 'import vllm_bebop.kernels'
}

run_check() {
  "$python" -m vllm_bebop.cli selftest --device cuda
  local workers=()
  ! "$python" -c 'import xdist' 2>/dev/null || workers=(-n 8) # compiling takes most of the time
  # shellcheck disable=SC2086 # several files
  "$python" -m pytest -q -p no:cacheprovider "${workers[@]}" $tests
}

run_kernels() { "$python" benchmarks/bench_kernels.py time --out "$out" "${limit[@]}"; }

run_loss() { "$python" benchmarks/bench_loss.py time --out "$out" "${limit[@]}"; }

run_races() { "$python" benchmarks/bench_kernels.py races --out "$out"; }

run_plot() { "$python" benchmarks/bench_kernels.py plot "$out"/kernels_*.json; }

run_sanitize() {
  if ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not installed: nothing is checked with it"
    return
  fi
  # Without the caching allocator, whose large blocks would hide an access past a tensor's end.
  for tool in memcheck racecheck; do
    # shellcheck disable=SC2086
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$python" -m pytest -q -x -p no:cacheprovider $tests \
      -k 'edge_cases or by_slot or wrong_counts or reuses_a_workspace or counts_ties'
  done
}

for step in "${steps[@]}"; do
  declare -F "run_$step" >/dev/null || { echo "unknown step $step" >&2; exit 2; }
  echo "== $step"
  "run_$step"
done
