# Two commands for everyone: `make run` and `make test`. The rest is for those who work on Tollgate.
# They need Python 3.11 or later, make and the package index; nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 8080
# Modules of tests that run at a time.
TEST_PROCESSES ?= 2
export PORT
# A virtual environment of somebody else's shell must not leak into ours.
unexport PYTHONPATH
unexport PYTHONHOME

.PHONY: run test lint format lock test-real clean help

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

run: $(VENV)/.run-stamp  ## install into .venv and serve on http://127.0.0.1:8080 (PORT and TOLLGATE_DATA_DIR override)
	@exec $(BIN)/tollgate serve

test: $(VENV)/.installed  ## the whole test suite, on Valkeys and Postgreses of its own (TEST_PROCESSES=2)
	@$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile

lint: $(VENV)/.installed  ## the checkers alone
	@$(BIN)/python -m pytest tests/test_tidy.py

format: $(VENV)/.installed  ## put the code into its form
	@$(BIN)/ruff check --fix -q . && $(BIN)/ruff format -q .

include make/real.mk
include make/bench.mk
include make/load.mk
include make/peers.mk
include make/chaos.mk
include make/proof.mk

clean:  ## remove .venv and caches (data folders stay)
	rm -rf $(VENV) .venv-real .venv-bench .venv-peers .venv-lock .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis *.egg-info

# The version check comes first: pip's own message about an old Python is a riddle.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Tollgate needs Python 3.11 or later; '$(PYTHON)' is older. Try: make PYTHON=python3.12 run"; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.run-stamp: requirements.lock pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.installed: requirements-dev.lock pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@ $(VENV)/.run-stamp
