# A bare `make` lists the targets. Everything runs inside .venv, which `make install` creates and keeps up to date.

PYTHON ?= python3
TESTARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow lint fix bench clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "  PYTHON=python3.12    the interpreter that 'make install' builds .venv with (3.10 or newer)"
	@echo "  TESTARGS='-k loss'   further arguments for pytest"

install: $(STAMP) ## Create .venv with the tested versions (again only when pyproject.toml or constraints.txt change)

# torch goes first and alone: with the version settled, nothing later can pull in another build of it.
$(STAMP): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
		|| { echo "make: '$(PYTHON)' is not a Python >= 3.10 ($$("$(PYTHON)" --version 2>&1 | head -n 1));" \
			"name one, as in: make install PYTHON=python3.12" >&2; exit 1; }
	"$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e ".[train,dev]"
	@touch $@

quickstart: install ## Train the small default recipe on this machine: offline, on the CPU, in minutes
	$(BIN)/python training/run_stage.py
	$(BIN)/python training/publish.py pack runs/quickstart/student --name f2llm-quickstart
	$(BIN)/python training/publish.py verify runs/quickstart/packed/f2llm-quickstart

test: install ## Run the tests (all but those marked slow)
	$(BIN)/python -m pytest -m "not slow" -n auto --dist loadfile $(TESTARGS)

test-slow: install ## Run the tests marked slow
	$(BIN)/python -m pytest -m slow $(TESTARGS)

lint: install ## Check style, formatting and spelling; change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/typos

fix: install ## Repair what lint can repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/typos --write-changes

bench: install ## Measure against the stock implementations, side by side
	$(BIN)/python tests/benchmarks/run.py

clean: ## Remove .venv, caches and build products (runs/ stays: it holds trained models)
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .coverage htmlcov
	find . -type d -name __pycache__ -prune -exec rm -rf {} +
