#!/usr/bin/env bash
# On a GPU: the kernels are right, then how fast they are. Needs PyTorch, Triton, pytest and what pyproject.toml lists as
# dependencies; no vLLM and no network. Peers are measured where they are installed.
#
#   scripts/bench_gpu.sh [--out DIR] [--minutes M] [STEP ...]
#
#   check      bebop selftest, and the kernels' tests on this GPU
#   kernels    sampling kernels: time and bandwidth at 84 sizes
#   loss       loss kernels: time and peak memory at 8 sizes
#   races      100,000 repeats, single launch against two
#   sanitize   memcheck and racecheck over some of the tests, if compute-sanitizer is there
#   plot       draws what `kernels` measured
#
# Without STEP, all of them in this order. Results go to DIR, benchmarks/results by default. `kernels` and `loss` save as
# they go, end after M minutes (8 by default), and go on where they stopped when they are started again; the other steps
# are ended after M minutes. A step that fails does not keep the next ones from running; the last line names it.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1

python=${PYTHON:-python3} out=benchmarks/results minutes=8 steps=() failed=()
tests=$(ls tests/test_kernels_*.py | grep -v compile) # that one compiles for other GPUs too, on any machine
while [ $# -gt 0 ]; do
  case $1 in
    --out) out=$2; shift 2 ;;
    --minutes) minutes=$2; shift 2 ;;
    -*) echo "unknown option $1" >&2; exit 2 ;;
    *) steps+=("$1"); shift ;;
  esac
done
[ ${#steps[@]} -gt 0 ] || steps=(check kernels loss races sanitize plot)

install() { # makes the package importable from this checkout, unless it is
  "$python" -c 'import vllm_bebop.kernels' 2>/dev/null ||
    "$python" -m pip install --quiet --no-deps --no-build-isolation --no-index -e .
  "$python" -c 'import vllm_bebop.kernels'
}

run_check() {
  local workers=()
  ! "$python" -c 'import xdist' 2>/dev/null || workers=(-n 8) # compiling takes most of the time
  # shellcheck disable=SC2086 # several files
  "$python" -m vllm_bebop.cli selftest --device cuda &&
    timeout "${minutes}m" "$python" -m pytest -q -p no:cacheprovider "${workers[@]}" $tests
}

run_kernels() { "$python" benchmarks/bench_kernels.py time --out "$out" --minutes "$minutes"; }

run_loss() { "$python" benchmarks/bench_loss.py time --out "$out" --minutes "$minutes"; }

run_races() { timeout "${minutes}m" "$python" benchmarks/bench_kernels.py races --out "$out"; }

run_plot() { "$python" benchmarks/bench_kernels.py plot "$out"/kernels_*.json; }

run_sanitize() {
  if ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not installed: nothing is checked with it"
    return
  fi
  # Without the caching allocator, whose large blocks would hide an access past a tensor's end.
  for tool in memcheck racecheck; do
    # shellcheck disable=SC2086
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "${minutes}m" compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$python" -m pytest -q -x -p no:cacheprovider $tests \
      -k 'edge_cases or by_slot or past_the_cache or wrong_counts or reuses_a_workspace or counts_ties' || return
  done
}

for step in "${steps[@]}"; do
  declare -F "run_$step" >/dev/null || { echo "unknown step $step" >&2; exit 2; }
done
install
for step in "${steps[@]}"; do
  echo "== $step"
  "run_$step" || failed+=("$step") # bash does not heed -e in there
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
