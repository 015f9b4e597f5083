# Everything runs in .venv, which the first target makes: Python 3.11 or 3.12 and pip are all that is needed.

runs = $(shell $(1) -c 'import sys; sys.version_info[:2] in ((3, 11), (3, 12)) and print("$(1)")' 2>/dev/null)
PYTHON ?= $(or $(call runs,python3.11),$(call runs,python3.12),$(call runs,python3),$(error Python 3.11 or 3.12 is needed))
BIN := .venv/bin
CODE := slos_sglang patches programs

.PHONY: demo test test-fast test-e2e lint bench bench-policy bench-paper clean

demo: .venv/.stamp
	$(BIN)/slos-sglang demo

test: lint test-fast test-e2e

test-fast: .venv/.stamp
	$(BIN)/pytest -m "not e2e and not gpu"

test-e2e: .venv/.stamp
	$(BIN)/pytest -m "e2e and not gpu"

lint: .venv/.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy $(CODE)

bench: .venv/.stamp
	$(BIN)/python benchmarks/mixed_load.py
	$(BIN)/python benchmarks/overload.py
	$(BIN)/python benchmarks/program_budgets.py
	$(BIN)/python benchmarks/tool_gaps.py
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/cost_model.py
	$(BIN)/python benchmarks/report.py

# Simulated, about 20 minutes: are promises kept, how many are made, how long does it take to decide?
bench-policy: .venv/.stamp
	$(BIN)/python benchmarks/guarantee.py --seeds 5000
	$(BIN)/python benchmarks/guarantee.py --curve --seeds 8
	$(BIN)/python benchmarks/admission_optimum.py
	$(BIN)/python benchmarks/decisions.py
	$(BIN)/python benchmarks/report.py

# Simulated; ARGS=--quick takes under five minutes.
bench-paper: .venv/.stamp
	$(BIN)/python benchmarks/paper.py $(ARGS)
	$(BIN)/python benchmarks/report.py

clean:
	rm -rf .venv build out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv: .venv/.stamp

.venv/.stamp: requirements/cpu.txt requirements/cpu-nodeps.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements/cpu.txt
	$(BIN)/python -m pip install --no-deps -r requirements/cpu-nodeps.txt
	$(BIN)/python -m pip install --no-deps --no-build-isolation -e .
	touch $@
