# `make` explains itself. Everything happens in .venv and, for data and runs, in data/ and runs/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# The real set: make train IMAGENET=/path/to/the/three/ILSVRC2012/files
# This and RUN, WORKERS, TRAIN_OPTIONS, ... reach tools/run_all.py as environment variables; its --help lists them.
RUN_ALL := $(BIN)/python tools/run_all.py

.DEFAULT_GOAL := help
.PHONY: help env sample shards pca train test lint bench bench-baselines gpu-check clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12
	@echo "For the real set: make train IMAGENET=/folder/of/the/ILSVRC2012/files"

env: $(READY) ## the environment, in .venv (Python 3.11 or newer)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is older than Python 3.11; name another: make env PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps timm  # a test uses its reader, which needs none of them
	@touch $@

sample: $(READY) ## drawn pictures in ILSVRC2012's own files, in data/sample (nothing where IMAGENET is given)
	$(RUN_ALL) sample

shards: $(READY) ## shard sets of train and val
	$(RUN_ALL) shards

pca: $(READY) ## shard sets and their eigenbasis
	$(RUN_ALL) pca

train: $(READY) ## the whole road: sample, shards, eigenbasis, training, stall report
	$(RUN_ALL) train

test: lint ## lint, types, tests
	$(BIN)/python -m pytest

lint: $(READY) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY) ## what the feed supplies, by stage, and beside its peers
	$(RUN_ALL) bench

bench-baselines: $(READY) ## the feed beside bare decoding, SPDL, and a DataLoader over webdataset and Pillow
	$(RUN_ALL) baselines

gpu-check: $(READY) ## what needs a CUDA device: tests, pixels, rates, stall report, into one file of benchmarks/
	$(RUN_ALL) gpu-check

clean: ## removes the environment and the caches; data/ and runs/ stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
