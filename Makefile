# make demo and make test need Python 3.11 or later, make, and the network of a package index; everything else they install.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install check tools test storm marathon test-gpu bench-gpu demo clean
help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP)  ## create .venv with the pinned, tested versions
$(STAMP): pyproject.toml .ci/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --editable '.[dev,bnb,onnx,openpilot,ray]'
	touch $@

check: $(STAMP)  ## format, lint, types, layers
	$(BIN)/ruff format --check --quiet omni_cli tests
	$(BIN)/ruff check --quiet omni_cli tests
	$(BIN)/mypy
	$(BIN)/lint-imports

tools:  # the tests inject faults into system calls and clocks with them; those that need one that lacks are skipped by name
	@command -v strace >/dev/null && command -v faketime >/dev/null || \
	{ apt-get update --quiet && apt-get install --yes --quiet strace faketime; } || \
	echo 'strace or faketime lacks and cannot be installed: the tests that need it are skipped'

test: check tools  ## everything that CI runs, one process a core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

storm: $(STAMP) tools  ## every fault of the catalogue: kills, full disks, flipped bits, hubs that lie
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'storm or fault' --numprocesses auto --dist loadfile

marathon: $(STAMP)  ## what takes long: how well the recipes learn for three seeds, kills of every kind of training, full-size clips
	$(BIN)/python -m pytest -m marathon

test-gpu: $(STAMP)  ## the tests that need a GPU; they fail, and do not skip, where torch sees none
	$(BIN)/python -m pytest -m gpu

bench-gpu: $(STAMP)  ## train 7 billion random weights on this GPU, beside stock TRL, into bench-gpu.json and a table
	$(BIN)/omni bench gpu $(BENCH)

demo: $(STAMP)  ## from nothing to a measured model in the folder demo/, explained
	$(BIN)/omni demo --dir demo

clean:  ## remove the virtual environment and the caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
