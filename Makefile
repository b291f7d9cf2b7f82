# Two commands matter: `make run` and `make test`. Each sets up .venv first where that is not done yet.
#   make run ARGS="--profile smoke"     arguments for run_all.py (or for pytest, with `make test`)
#   make run PYTHON=python3.12          the interpreter that .venv is made with
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help run test cluster lab lint format setup clean

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
PORT ?= 8888

# also in .pre-commit-config.yaml; tests/test_project.py keeps the two equal
STRIP := --keep-id --extra-keys "metadata.papermill metadata.widgets metadata.language_info.version cell.metadata.execution cell.metadata.papermill"

help: ## say what can be made (the default)
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 10

# each notebook as plain text beside it, for reviews; also in .pre-commit-config.yaml
REVIEW := --to review//py:percent --opt notebook_metadata_filter=-all

run: setup ## run every notebook, results under results/latest (ARGS="--profile smoke" for the short way)
	@$(VENV)/bin/python run_all.py $(ARGS)

test: setup ## run the tests (ARGS="-k policy" for some of them)
	@$(VENV)/bin/python -m pytest $(ARGS)

# Beside the environment, not in it: where vLLM finds Ray it imports it, in every process of every probe and engine.
cluster: setup ## run the tests that need a Ray cluster, with a Ray that is deleted afterwards
	@ray=$$(mktemp -d); trap 'rm -rf "$$ray"' EXIT; \
	$(VENV)/bin/python -m pip install -qq --no-deps --target "$$ray" ray==2.60.0 msgpack==1.2.4; \
	PYTHONPATH=$$ray $(VENV)/bin/python -m pytest tests/test_cluster.py

lab: setup ## open the notebooks in JupyterLab, reachable from this machine only (PORT=8888)
	@$(VENV)/bin/python -m aiterlab.suite.lab --port=$(PORT) $(ARGS)

lint: setup ## check style, and that notebooks hold no outputs
	@$(VENV)/bin/python -m ruff check .
	@$(VENV)/bin/python -m ruff format --check .
	@find notebooks -name '*.ipynb' -not -path '*/.*' -exec $(VENV)/bin/nbstripout --verify $(STRIP) {} + \
	  || { echo 'a notebook holds outputs or run metadata: make format'; exit 1; }

format: setup ## mend what lint complains of, as far as a tool can
	@$(VENV)/bin/python -m aiterlab.suite.rewrite notebooks/*.ipynb
	@$(VENV)/bin/python -m ruff check --fix .
	@$(VENV)/bin/python -m ruff format .
	@find notebooks -name '*.ipynb' -not -path '*/.*' -exec $(VENV)/bin/nbstripout $(STRIP) {} +
	@$(VENV)/bin/python -m jupytext --quiet $(REVIEW) notebooks/*.ipynb

setup: ## set up .venv (done by all of the above)
	@PYTHON="$(PYTHON)" VENV="$(VENV)" environments/cpu/install.sh

clean: ## delete .venv, caches and every result but the reference records
	rm -rf $(VENV) .venv.lock .pytest_cache .ruff_cache .hypothesis build lib/*.egg-info
	find lib tests -name __pycache__ -type d -prune -exec rm -rf {} +
	find results -mindepth 1 -maxdepth 1 ! -name reference ! -name .gitkeep -exec rm -rf {} +
