# Everything here sets itself up on a fresh machine: the first target that needs it makes .venv with pinned versions.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/demo

.PHONY: test demo lint gpu-all gpu-check gpu-bench gpu-bench-full needs-torch clean

# Versions pinned in .ci/constraints.txt. The stamp is newer than what it was made from, or it is made again.
$(VENV)/.installed: pyproject.toml .ci/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt torch setuptools
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --editable '.[test]'
	touch $@

# Threads that wait for others give up their core, which the tests of the other process need.
test: $(VENV)/.installed lint
	@echo "The tests take about twelve minutes on two idle cores, and as much longer as other work makes them wait."
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Run again, it goes on where it was interrupted, or shows its results; make demo ARGS=--overwrite starts anew.
demo: $(VENV)/.installed
	$(BIN)/crate-mae demo --out $(OUT) $(ARGS)

# On a machine with a CUDA device, with the Python that PYTHON names; else with .venv's, where `make test` or `make demo` has made
# one; else with the one at hand. Nothing is installed.
AT_HAND = $(if $(filter file,$(origin PYTHON)),$(or $(wildcard $(BIN)/python),$(PYTHON)),$(PYTHON))

# Kernels compiled, then all below and counters, in 25 minutes: ARGS="--only check step" for pieces, ARGS=--dry-run for the plan.
gpu-all: needs-torch
	$(AT_HAND) -m benchmarks.gpu all $(ARGS)

# Tests, memory checker and times, in 8 minutes.
gpu-check: needs-torch
	$(AT_HAND) -m benchmarks.gpu check $(ARGS)

# What the table of targets needs, in 9 minutes; or every sweep, in hours.
gpu-bench: needs-torch
	$(AT_HAND) -m benchmarks.gpu bench $(ARGS)

gpu-bench-full: needs-torch
	$(AT_HAND) -m benchmarks.gpu bench --full $(ARGS)

needs-torch:
	@$(AT_HAND) -c 'import torch' 2>/dev/null || { echo "$(AT_HAND) cannot import torch: install it there, name another with PYTHON=..., or run make test, which makes .venv" >&2; exit 1; }

clean:
	rm -rf $(VENV) build dist *.egg-info
