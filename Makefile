# Each target sets up what it needs: .venv with the package, and the development tools where they are used.
# PyBullet offers ready-made wheels up to Python 3.11; on a newer one pip compiles it, which takes some ten minutes.
PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-slow check format clean

demo: .venv/.installed  ## collect, train, evaluate; writes runs/demo/evaluation/report.html
	$(BIN)/diffusion-policy demo

# A process a core, each with one thread: the networks of tests are small. The files come in the order of tests/conftest.py:
# by number of tests, which is the default, those with few and long ones would come last, when only one process is left.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

test: .venv/.installed-dev  ## the default test suite
	$(PYTEST)

test-slow: .venv/.installed-dev  ## full counts and real trainings too
	$(PYTEST) --dist worksteal -m "slow or not slow"

check: .venv/.installed-dev  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: .venv/.installed-dev  ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the environment and caches; runs/ stays
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ..."; exit 2; }
	@echo "installing into .venv (once, some minutes) ..."
	$(PYTHON) -m venv .venv
	$(PIP) --editable .
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP) --editable ".[dev]"
	@touch $@
