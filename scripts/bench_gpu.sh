#!/usr/bin/env bash
# On a GPU: the kernels are right, then how fast they are. Needs PyTorch, Triton, pytest and what pyproject.toml lists
# as dependencies; no vLLM and no network. Peers are measured where they are installed.
#
#   scripts/bench_gpu.sh [--quick] [--out DIR] [--minutes M] [STEP ...]
#
#   selftest   bebop selftest: laws, planted faults, and tokens against the reference's
#   tests      the kernels' tests on this GPU
#   kernels    sampling kernels: time and bandwidth at 84 sizes
#   loss       loss kernels: time and peak memory at 8 sizes
#   races      100,000 repeats of every form, each on scratch that holds nothing of the one before
#   sanitize   memcheck and racecheck over some of the tests, if compute-sanitizer is there
#   plot       draws what `kernels` measured
#
# Without STEP, all of them in this order; each is ended M minutes after it began (sanitize: each of its two tools), 10
# by default.
#
# --quick, for a GPU that is there for minutes only: kernels at 6 sizes, loss at one, selftest, races with 20,000
# repeats, plot; what matters most first, in at most 9 minutes. `kernels` and `loss` time nothing whose result is wrong.
#
# Results go to DIR, benchmarks/results by default. `kernels` and `loss` save after every measurement and skip what the
# JSON files in DIR hold already for this device, code and versions: to resume on another machine, bring those files.
# A step that fails does not keep the next ones from running; the last line names it.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1

python=${PYTHON:-python3} out=benchmarks/results asked= quick=() steps=() failed=()
tests=$(ls tests/test_kernels_*.py | grep -v compile) # that one compiles for other GPUs too, on any machine
while [ $# -gt 0 ]; do
  case $1 in
    --quick) quick=(--quick); shift ;;
    --out) out=$2; shift 2 ;;
    --minutes) asked=$2; shift 2 ;;
    -*) echo "unknown option $1" >&2; exit 2 ;;
    *) steps+=("$1"); shift ;;
  esac
done
if [ ${#steps[@]} -eq 0 ]; then
  steps=(selftest tests kernels loss races sanitize plot)
  [ ${#quick[@]} -eq 0 ] || steps=(kernels loss selftest races plot)
fi
declare -A quick_minutes=([kernels]=4 [loss]=1.75 [selftest]=1.25 [races]=1.75 [plot]=0.25)

limit() { timeout --kill-after=10 "$1m" "${@:2}"; } # MINUTES COMMAND ...

almost() { awk "BEGIN { print 0.9 * $1 }"; } # when to begin no further measurement

install() { # makes the package importable from this checkout, unless it is
  "$python" -c 'import vllm_bebop.kernels' 2>/dev/null ||
    limit 2 "$python" -m pip install --quiet --no-deps --no-build-isolation --no-index -e .
  "$python" -c 'import vllm_bebop.kernels'
}

run_selftest() { limit "$minutes" "$python" -m vllm_bebop.cli selftest --device cuda; }

run_tests() {
  local workers=()
  ! "$python" -c 'import xdist' 2>/dev/null || workers=(-n auto) # compiling takes most of the time
  # shellcheck disable=SC2086 # several files
  limit "$minutes" "$python" -m pytest -v --tb=short --maxfail=5 -p no:cacheprovider "${workers[@]}" $tests \
    --deselect tests/test_kernels_loss.py::test_loss_kernel_compiles_without_spills # for other GPUs too
}

time_with() { # SCRIPT
  limit "$minutes" "$python" "$1" time "${quick[@]}" --out "$out" --minutes "$(almost "$minutes")"
}

run_kernels() { time_with benchmarks/bench_kernels.py; }

run_loss() { time_with benchmarks/bench_loss.py; }

run_races() { limit "$minutes" "$python" benchmarks/bench_kernels.py races "${quick[@]}" --out "$out"; }

run_plot() { limit "$minutes" "$python" benchmarks/bench_kernels.py plot "$out"/kernels_*.json; }

run_sanitize() {
  if ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not installed: nothing is checked with it"
    return
  fi
  # Without the caching allocator, whose large blocks would hide an access past a tensor's end.
  for tool in memcheck racecheck; do
    # shellcheck disable=SC2086
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 limit "$minutes" compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$python" -m pytest -q -x -p no:cacheprovider $tests \
      -k 'edge_cases or by_slot or past_the_cache or wrong_counts or reuses_a_workspace or counts_ties' || return
  done
}

for step in "${steps[@]}"; do
  declare -F "run_$step" >/dev/null || { echo "unknown step $step" >&2; exit 2; }
done
install
for step in "${steps[@]}"; do
  echo "== $step, $(date +%T)"
  minutes=10
  [ ${#quick[@]} -eq 0 ] || minutes=${quick_minutes[$step]:-$minutes}
  minutes=${asked:-$minutes}
  "run_$step" || failed+=("$step") # bash does not heed -e in there
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
