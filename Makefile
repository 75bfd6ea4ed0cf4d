# Everything one does here, a word each. `make` alone lists them.
#
# Nothing has to be installed by hand: Python 3.11 or newer with its venv module, and make. What the project needs goes
# into .venv (by uv where it is there, else by pip); .venv/.ready-* say that this has been done for the pyproject.toml
# at hand.

VENV := .venv
PYTHON ?=
RUN := $(VENV)/bin/python -m
export PYTHON
export NO_MKDOCS_2_WARNING := 1

.PHONY: help demo test soak check format docs stack launchers trainers bench clean
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.ready-demo ## train a classifier on digits, logged into MLflow's local store (a minute, once installed)
	@$(VENV)/bin/python examples/digits.py

test: $(VENV)/.ready-dev ## all tests
	$(RUN) pytest $(ARGS)

soak: $(VENV)/.ready-dev ## crash, damage and fuzz tests at full length, and a page of what they did (two hours)
	@$(VENV)/bin/python scripts/soak.py $(ARGS)

check: $(VENV)/.ready-dev ## format, lint, types, import rules, the docs and every block in them
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(RUN) mypy
	$(VENV)/bin/lint-imports --no-logo
	$(RUN) mkdocs build --strict --quiet
	$(RUN) pytest -q tests/docs

format: $(VENV)/.ready-dev ## put the code into the form that `check` asks for
	$(RUN) ruff format .
	$(RUN) ruff check --fix .

docs: $(VENV)/.ready-dev ## serve the documentation at http://127.0.0.1:8000, rebuilt at each change
	$(RUN) mkdocs serve

stack: ## have the real collector, Prometheus, Loki, Kafka, ...: what is not on PATH is built (Go, Maven; 11 minutes)
	@$(or $(PYTHON),$(firstword $(wildcard $(VENV)/bin/python) python3)) scripts/stack.py build $(ARGS)

launchers: ## have SLURM, sshd, mpirun, sshfs, ... which tests start for real: installs what is missing (Debian; root)
	@scripts/system_packages.sh

trainers: ## have PyTorch and Ray for the tests of real launchers, outside of .venv (2 GB; a minute, once downloaded)
	@$(or $(PYTHON),$(firstword $(wildcard $(VENV)/bin/python) python3)) scripts/trainers.py build

bench: $(VENV)/.ready-dev ## the numbers: import time, the price of a call, the way to the backends
	@for file in benchmarks/*.py; do echo; echo "== $$file"; $(VENV)/bin/python "$$file" || exit 1; done

clean: ## remove what was built here; runs, and MLflow's store, stay
	rm -rf $(VENV) site build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.ready-%: pyproject.toml scripts/environment.sh
	@scripts/environment.sh $*
