# `make` lists the targets. Each one makes the virtual environment it needs.
PYTHON ?= python3
BIN := .venv/bin
# A process a core; who has nothing left to do takes tests from another.
ON_ALL_CORES := --numprocesses auto --dist worksteal

.PHONY: help train figures compare test test-slow test-slurm check format bench clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

train: .venv/ready ## train on two-moons: hinge loss, GroupSort, spectral norm 1
	$(BIN)/lipexp train loss=hinge act=groupsort

outputs/breast_cancer.csv: .venv/ready
	$(BIN)/python -c "from sklearn.datasets import load_breast_cancer as load; data = load(as_frame=True); \
	data.data.assign(diagnosis=data.target_names[data.target]).to_csv('$@', index=False)"

figures: .venv/ready ## draw all figures and check their claims; figure-NAME draws one of them
	$(BIN)/lipexp figures

compare: .venv/ready ## compare all constraints and activations on five problems; half an hour
	$(BIN)/lipexp figures compare

figure-%: .venv/ready
	$(BIN)/lipexp figures $*

test: .venv/ready ## the test suite, without the slow tests
	$(BIN)/pytest $(ON_ALL_CORES)

test-slow: .venv/ready ## the tests that train full-size networks
	$(BIN)/pytest $(ON_ALL_CORES) -m slow

test-slurm: .venv/ready ## the tests of sweeps through SLURM; they need the packages of `.ci/slurm install`
	$(BIN)/pytest -m slurm

check: .venv/ready ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/ready ## put the code into shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/ready ## speed, as ratios to other implementations
	$(BIN)/lipexp bench

clean: ## remove the virtual environment and all caches; outputs/ stays
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Built anew when a dependency or a pin changes, so that it never holds more than they say.
.venv/ready: pyproject.toml .ci/constraints.txt
	rm -rf .venv
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v < (3, 14) else f"lipexp needs Python 3.11 to 3.13, this is {v.major}.{v.minor}; try make PYTHON=python3.13")'
	$(PYTHON) -m venv .venv
	PIP_CONSTRAINT=.ci/constraints.txt $(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@
