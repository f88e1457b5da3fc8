.PHONY: setup demo test test-versions bench

setup:
	@scripts/setup_venv.sh

demo: setup
	@.venv/bin/python benchmarks/demo.py

test: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/python -m pytest

# The engine tests on other versions of vLLM, candidates for the table in vllm_bebop/engine/versions.py.
test-versions: setup
	.venv/bin/python scripts/test_versions.py

bench: setup
	.venv/bin/python benchmarks/bench_acceptance.py
