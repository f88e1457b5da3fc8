.PHONY: setup demo test test-versions test-triton bench bench-gpu

setup:
	@scripts/setup_venv.sh

demo: setup
	@.venv/bin/python benchmarks/demo.py

# On a GPU one process: vLLM takes most of its memory.
TEST_PROCESSES = $(if $(shell nvidia-smi 2>/dev/null),1,2)
# Each has its share of the cores: with more threads than cores, those of so small models mostly wait for each other.
TEST_THREADS = $(shell expr \( $$(getconf _NPROCESSORS_ONLN) + $(TEST_PROCESSES) - 1 \) / $(TEST_PROCESSES))
# Files in the order of their names: by their number of tests, those that take minutes for two of them would come last.
test: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	OMP_NUM_THREADS=$(TEST_THREADS) .venv/bin/python -m pytest -n $(TEST_PROCESSES) --dist loadfile \
		--no-loadscope-reorder

# The engine tests on other versions of vLLM, candidates for the table in vllm_bebop/engine/versions.py.
test-versions: setup
	.venv/bin/python scripts/test_versions.py

# The kernels, emulated: compiled for other GPUs, and by the versions of Triton that come with other releases of PyTorch.
test-triton: setup
	@scripts/test_triton.sh

bench: setup
	.venv/bin/python benchmarks/bench_acceptance.py

# On a GPU: the kernels are right, then how fast they are. Needs no vLLM; PYTHON may name another environment, and
# STEPS some of scripts/bench_gpu.sh's, or its --quick: `make bench-gpu PYTHON=python3 STEPS="selftest kernels"`.
PYTHON ?= .venv/bin/python
bench-gpu:
	@PYTHON=$(PYTHON) scripts/bench_gpu.sh $(STEPS)
