# `make run` and `make test` need Python 3.11 or newer and nothing else: they make their own environment.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
ARGS ?=

.PHONY: help install run compare test lint docs bench clean

help:  ## what there is to make
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

install: $(VENV)/installed  ## make the environment

run: install  ## the default federation: PISA, 10 clients of two classes each
	$(BIN)/pisa-fl $(ARGS)

compare: install  ## PISA, SISA and their rivals on two federations: pictures and tables
	$(BIN)/python -m experiments.study part $(ARGS)
	$(BIN)/python -m experiments.study whole $(ARGS)

# a worker more than CI has cores: those that test federations of processes mostly wait
test: install lint  ## everything CI checks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 $(ARGS)

lint: install  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install  ## pages of the API from the docstrings: build/api/index.html
	$(BIN)/python docs/api.py build/api

bench: install  ## speed and memory: experiments/benchmarks/README.md
	$(BIN)/python -m experiments.benchmarks $(ARGS)

clean:  ## remove the environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
