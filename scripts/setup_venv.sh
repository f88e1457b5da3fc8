#!/usr/bin/env bash
# Makes .venv with everything `make demo` and `make test` need; does nothing where it is up to date.
# With a GPU: the ordinary vLLM, whose own pins decide. Without: vLLM's CPU build from requirements/cpu.lock.
set -euo pipefail
cd "$(dirname "$0")/.."

stamp=.venv/.ready
wanted=$(cat requirements/cpu.lock pyproject.toml scripts/setup_venv.sh | sha256sum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then exit 0; fi

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' ||
  { echo "vllm-bebop needs Python 3.11 to 3.13, found $("$python" --version); set PYTHON" >&2; exit 1; }

echo "Setting up .venv (a few minutes the first time) ..."
"$python" -m venv .venv
log=.venv/setup.log
pip() { .venv/bin/python -m pip --disable-pip-version-check --quiet "$@" >"$log" 2>&1 || { cat "$log" >&2; exit 1; }; }
pip install 'pip>=25'

if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
  pip install 'setuptools>=77' wheel
  pip install --no-build-isolation -e '.[vllm]'
  # What vLLM brought along stays as it is: the rest must agree with it, or pip says what does not.
  .venv/bin/python -m pip freeze --exclude-editable >.venv/vllm.txt
  pip install --no-build-isolation -c .venv/vllm.txt -e '.[train,bench,dev]'
else
  pip install --no-deps -r requirements/cpu.lock
  pip install --no-deps --no-build-isolation -e .
  .venv/bin/python scripts/name_cpu_vllm.py
  # Beside the environment, not in it: only the test of Qwen3.5 wants it, and with a mend (tests/cpu_support).
  pip install --no-deps --upgrade --target .venv/torchvision torchvision==0.28.0
  .venv/bin/python -c 'import torch' ||
    { echo "This PyTorch build does not load without a GPU: let pip find PyTorch's CPU wheels and run again" >&2; exit 1; }
fi
echo "$wanted" > "$stamp"
