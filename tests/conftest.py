"""Fixtures: a small sample in ILSVRC's own files, its shard sets and eigenbasis, made once per test session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline import eigenbasis
from pipeline.sample import SampleSettings, make_sample
from pipeline.sharder import ShardSettings, make_split
from pipeline.shards import ShardSet, open_shards
from pipeline.sources import open_source
from pipeline.workers import ALONE, ignore

SAMPLE = SampleSettings(classes=4, train_images=12, val_images=5, min_side=150, max_side=220, seed=7)
SHARD_SETTINGS = ShardSettings(seed=7, shard_samples=20)


torch.set_num_threads(1)  # small nets: more threads would only wait for one another


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three ILSVRC files."""
    folder = tmp_path_factory.mktemp("sample")
    make_sample(folder, SAMPLE, workers=ALONE, progress=ignore)
    return folder


@pytest.fixture(scope="session")
def shard_root(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train` (with its eigenbasis) and `val` of the sample. Tests that change it work on a copy."""
    root = tmp_path_factory.mktemp("shards")
    for split in ("train", "val"):
        make_split(open_source(sample).listing(split), root, SHARD_SETTINGS, ALONE, 10, ignore)
    shards = open_shards(root / "train")
    eigenbasis.save(eigenbasis.measure(shards, ALONE, ignore), root / "train" / "eigenbasis.json")
    return root


@pytest.fixture(scope="session")
def train_shards(shard_root: Path) -> ShardSet:
    return open_shards(shard_root / "train")
