# Every target makes its own .venv if it is not there.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: quickstart test fast check docs bench clean

quickstart: $(VENV)/ready ## a real model cut by 20%, recovered, measured: runs/quickstart
	$(BIN)/python -m prunelit fit --config configs/quickstart.yaml

test: $(VENV)/ready ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

fast: $(VENV)/ready ## the tests that take under two minutes together
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

check: $(VENV)/ready ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/ready ## the site, warnings are errors: docs/_build/html/index.html
	$(BIN)/python -m sphinx -q -W --keep-going docs docs/_build/html

bench: $(VENV)/ready ## cost of scoring against one forward pass, on the quickstart's model
	$(BIN)/python benchmarks/calibration_cost.py

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) docs/_build docs/made build *.egg-info
