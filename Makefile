PYTHON ?= python3
BIN := .venv/bin
# Most tests wait for processes of their own; more than two at once and the machine is what is tested.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal
.DEFAULT_GOAL := help
.PHONY: help run test quick check fix bench clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dtp needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,data,aws]' --group tests --group lint
	@touch $@

run: .venv/.installed  ## train the handwritten digits on two workers and watch it (headless without a terminal)
	@if [ -t 1 ]; then $(BIN)/dtp run --detach examples/digits.yaml && $(BIN)/dtp-tui digits; else $(BIN)/dtp run --headless examples/digits.yaml; fi

test: .venv/.installed  ## every test, the slow ones included
	$(PYTEST)

quick: .venv/.installed  ## the tests that take seconds
	$(PYTEST) -m 'not slow'

check: .venv/.installed  ## lint, format, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: .venv/.installed  ## repair what lint and format can repair by themselves
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.installed  ## measure beside the bare tools; writes benchmarks/results/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --group bench
	$(BIN)/python -m benchmarks

clean:  ## remove the environment and all caches
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
