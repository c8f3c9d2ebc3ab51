# `make` explains itself. Everything happens in .venv and, for data and runs, in data/ and runs/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# The real set: make train IMAGENET=/path/to/the/three/ILSVRC2012/files
IMAGENET ?=
WORKERS ?= $(shell nproc)

ifeq ($(IMAGENET),)
SOURCE := data/sample
SHARDS := data/sample-256
RUN ?= sample
SHARD_OPTIONS := --shard-samples 256
# The sample is 1,800 drawn pictures of 12 classes, and the machine may have 2 cores: a net of an eighth of the width, and
# smaller batches, show in two minutes that it learns. Rates are the recipe's, of its first 20 epochs (LOG.md).
TRAIN_OPTIONS ?= --width 0.125 --batch 64 --steps 560 --log-every 14
else
SOURCE := $(IMAGENET)
SHARDS := data/imagenet-256
RUN ?= imagenet
SHARD_OPTIONS :=
TRAIN_OPTIONS ?=
endif

.DEFAULT_GOAL := help
.PHONY: help env sample shards train test lint bench gpu-check clean

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
	$(if $(IMAGENET),,$(BIN)/python tools/make_sample.py $(SOURCE) --workers $(WORKERS))

shards: sample ## shard sets of train and val, and the eigenbasis
	$(BIN)/python tools/make_shards.py $(SOURCE) $(SHARDS) --workers $(WORKERS) $(SHARD_OPTIONS)
	@test -f $(SHARDS)/train/eigenbasis.json || $(BIN)/python tools/compute_pca.py $(SHARDS)/train --workers $(WORKERS)

train: shards ## the whole road: sample, shards, eigenbasis, training, stall report
	$(BIN)/python tools/train.py $(SHARDS)/train --val $(SHARDS)/val --run $(RUN) --resume $(TRAIN_OPTIONS)

test: lint ## lint, types, tests
	$(BIN)/python -m pytest

lint: $(READY) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: shards ## what the feed supplies, by stage, and beside a DataLoader over webdataset and Pillow
	$(BIN)/python tools/bench_loader.py $(SHARDS)/train
	$(BIN)/python tools/bench_peers.py $(SHARDS)/train

gpu-check: $(READY) ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

clean: ## removes the environment and the caches; data/ and runs/ stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
