# `make run`: environment, then the default suite, ending with a leaderboard. `make check`: environment, then linters,
# types and fast tests, beside each other. `make test`: environment, then all checks, those that train or start whole
# runs too.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SUITE ?= quick
STAMP := $(VENV)/.installed

.PHONY: run check test test-1 test-2 fast fast-1 fast-2 lint docs oldest clean
run: $(STAMP)
	$(BIN)/bench run $(SUITE)

check: $(STAMP)
	$(MAKE) --no-print-directory -O -j2 fast-2 lint fast-1

test: $(STAMP)
	$(MAKE) --no-print-directory -O -j2 test-1 lint test-2

# All tests in two parts: the first takes about as long on one core as the linters and the second on another.
HALF := tests/test_[a-n]*.py
test-1: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(wildcard $(HALF))

test-2: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(filter-out $(wildcard $(HALF)),$(wildcard tests/test_*.py))

fast: fast-1 fast-2

# The fast tests in two parts: the first takes with the linters about as long on one core as the second on another.
FIRST := tests/test_[a-l]*.py
fast-1: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" $(wildcard $(FIRST))

fast-2: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" $(filter-out $(wildcard $(FIRST)),$(wildcard tests/test_*.py))

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/pyright

docs: $(STAMP)
	$(BIN)/mkdocs build --strict

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(None if sys.version_info >= (3, 11) else 'Python 3.11 or newer is needed; set PYTHON=...')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt -e ".[dev]"
	touch $@

# the fast tests with the oldest versions that pyproject.toml allows, in an environment of their own
oldest:
	test -x .oldest/bin/uv || { $(PYTHON) -m venv .oldest && .oldest/bin/python -m pip install --quiet uv; }
	.oldest/bin/uv pip install --quiet --python .oldest/bin/python --resolution lowest-direct -e ".[dev]"
	OMP_NUM_THREADS=1 .oldest/bin/python -m pytest -q -m "not slow"

clean:
	rm -rf $(VENV) .oldest .pytest_cache .ruff_cache
