# `make` lists the targets. Everything is written to .venv, data/, runs/ and benchmarks/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# ImageNet: make train IMAGENET=/folder/of/the/ILSVRC2012/files
# IMAGENET, RUN, WORKERS, TRAIN_OPTIONS, ... reach tools/run_all.py as environment variables; its --help lists them.
RUN_ALL := $(BIN)/python tools/run_all.py

# Each worker process imports torch and DALI and makes the test data that its tests need: more than 8 gain nothing.
PYTEST := $(BIN)/python -m pytest
PARALLEL := --numprocesses auto --maxprocesses 8 --dist loadfile

# `make check` leaves out tests that start many processes, start a Dask cluster, or measure for seconds.
FAST := -m 'not slow' --ignore tests/model/parallel

# The shard set of `make soak`.
SHARDS ?= $(or $(DATA),data)/$(if $(IMAGENET),imagenet-256,sample-256)/train

.DEFAULT_GOAL := help
.PHONY: help env sample shards pca train check test lint notebook soak bench bench-baselines bench-startup gpu-check clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 17
	@echo "ImageNet: make train IMAGENET=/folder/of/the/ILSVRC2012/files"

env: $(READY) ## install the environment into .venv (Python 3.11 or newer)

$(READY): pyproject.toml constraints.txt constraints-cuda.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is older than Python 3.11; choose another: make env PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --constraint constraints-cuda.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps timm  # a test uses its reader alone
	@touch $@

sample: $(READY) ## draw the synthetic sample dataset into data/sample (nothing to do if IMAGENET is set)
	$(RUN_ALL) sample

shards: $(READY) ## make the shard sets of train and val
	$(RUN_ALL) shards

pca: $(READY) ## make the shard sets and compute their PCA eigenbasis
	$(RUN_ALL) pca

train: $(READY) ## run all stages: sample, shards, eigenbasis, training, stall report
	$(RUN_ALL) train

check: lint ## check before each commit, in about a minute: lint, types, fast tests
	$(PYTEST) $(PARALLEL) $(FAST) --quiet

test: lint ## check everything: lint, types, all tests
	$(PYTEST) $(PARALLEL)

lint: $(READY) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

soak: pca ## run the long tests, for hours: kills, a full disk, planted stalls (an idle machine, root)
	$(BIN)/python -m tests.soak.plan
	$(BIN)/python -m tests.soak.damaged_images
	$(BIN)/python -m tests.soak.kill_shards
	$(BIN)/python -m tests.soak.kill_ranks
	$(BIN)/python -m tests.soak.full_disk
	$(BIN)/python -m tests.soak.random_stops
	$(BIN)/python -m tests.soak.planted_stalls $(SHARDS)

bench: $(READY) ## measure the data loader by stage, and compare it with the baselines
	$(RUN_ALL) bench

bench-baselines: $(READY) ## compare the data loader with bare decoding, SPDL and a DataLoader (webdataset, Pillow)
	$(RUN_ALL) baselines

bench-startup: $(READY) ## measure how long --help of each tool takes
	$(BIN)/python tools/bench_startup.py

gpu-check: $(READY) ## check what needs a CUDA device: tests, pixels, throughput, stall report; writes to benchmarks/
	$(RUN_ALL) gpu-check

notebook: sample pca ## run docs/alexnet.py and write docs/alexnet.ipynb with its outputs (after `make train`)
	$(BIN)/pip install --quiet --constraint constraints.txt --constraint constraints-cuda.txt --editable '.[notebook]'
	$(BIN)/jupytext --quiet --to ipynb --output docs/alexnet.ipynb docs/alexnet.py
	$(BIN)/jupyter-execute --inplace docs/alexnet.ipynb

clean: ## remove the environment and the caches; data/ and runs/ stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
