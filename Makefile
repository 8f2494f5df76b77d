# Everything here sets itself up on a fresh machine: the first target that needs it makes .venv with pinned versions.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/demo

.PHONY: test demo lint gpu-check gpu-bench gpu-bench-full clean

# Versions pinned in .ci/constraints.txt. The stamp is newer than what it was made from, or it is made again.
$(VENV)/.installed: pyproject.toml .ci/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt torch setuptools
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --editable '.[test]'
	touch $@

test: $(VENV)/.installed lint
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Run again, it goes on where it was interrupted, or shows its results; make demo ARGS=--overwrite starts anew.
demo: $(VENV)/.installed
	$(BIN)/crate-mae demo --out $(OUT) $(ARGS)

# On a machine with a CUDA device, with the Python that is there; installs nothing. Tests, memory checker and times, in 8 minutes.
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check $(ARGS)

# On a machine with a CUDA device, with the Python that is there: what the table of targets needs, in 9 minutes; or every sweep, in hours.
gpu-bench:
	$(PYTHON) -m benchmarks.gpu_bench $(ARGS)

gpu-bench-full:
	$(PYTHON) -m benchmarks.gpu_bench --full $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info
