.PHONY: setup demo test test-versions bench bench-gpu

setup:
	@scripts/setup_venv.sh

demo: setup
	@.venv/bin/python benchmarks/demo.py

test: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/python -m pytest -n 2 --dist loadfile

# The engine tests on other versions of vLLM, candidates for the table in vllm_bebop/engine/versions.py.
test-versions: setup
	.venv/bin/python scripts/test_versions.py

bench: setup
	.venv/bin/python benchmarks/bench_acceptance.py

# On a GPU: the kernels are right, then how fast they are. Needs no vLLM; PYTHON may name another environment.
PYTHON ?= .venv/bin/python
bench-gpu:
	$(PYTHON) -m vllm_bebop.cli selftest --device cuda
	$(PYTHON) -m pytest tests/test_kernels_sampling.py tests/test_kernels_verification.py tests/test_kernels_loss.py
	$(PYTHON) benchmarks/bench_kernels.py time
	$(PYTHON) benchmarks/bench_loss.py time
