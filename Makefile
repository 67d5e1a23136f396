# Every target makes its own .venv if it is not there.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: quickstart test fast check docs wheel hooks bench clean

quickstart: $(VENV)/ready ## a real model cut by 20%, recovered, measured: runs/quickstart
	$(BIN)/python -m prunelit fit --config configs/quickstart.yaml

# The floor, in percent of lines. Tracing lines makes a test two thirds slower, so the slow ones run without it.
COVERAGE := 95
test: $(VENV)/ready ## the whole test suite, and the coverage of its quick part
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow" --cov --cov-report=term --cov-fail-under=$(COVERAGE)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

fast: $(VENV)/ready ## the quick part of the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

check: $(VENV)/ready ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/ready ## the site, warnings are errors: docs/_build/html/index.html
	$(BIN)/python -m sphinx -q -W --keep-going docs docs/_build/html

wheel: $(VENV)/ready ## build it, install it into a new environment, use it in an empty folder
	.ci/check_wheel.sh $(BIN)/python

hooks: $(VENV)/ready ## the hooks of pre-commit on all files
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

bench: $(VENV)/ready ## cost of scoring against one forward pass, on the quickstart's model
	$(BIN)/python benchmarks/calibration_cost.py

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) docs/_build docs/made build dist *.egg-info .coverage*
