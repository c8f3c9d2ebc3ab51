"""Fixtures: a small sample in ILSVRC's own files, its shard sets and eigenbasis, made once per test session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline import rgb_pca
from pipeline.imagenet.source import open_source
from pipeline.shards.build import make_split
from pipeline.shards.reader import ShardSet, open_shards
from pipeline.synthetic.dataset import make_sample
from pipeline.workers import IN_PROCESS, ignore
from tests.support.shard_fixtures import SAMPLE, SHARD_SETTINGS

torch.set_num_threads(1)  # small nets: more threads would only wait for one another


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three ILSVRC files."""
    folder = tmp_path_factory.mktemp("sample")
    make_sample(folder, SAMPLE, workers=IN_PROCESS, progress=ignore)
    return folder


@pytest.fixture(scope="session")
def shard_root(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train` (with its eigenbasis) and `val` of the sample. Tests that change it work on a copy."""
    root = tmp_path_factory.mktemp("shards")
    for split in ("train", "val"):
        make_split(open_source(sample).listing(split), root, SHARD_SETTINGS, IN_PROCESS, 10, ignore)
    shards = open_shards(root / "train")
    rgb_pca.save(rgb_pca.measure(shards, IN_PROCESS, ignore), root / "train" / "eigenbasis.json")
    return root


@pytest.fixture(scope="session")
def train_shards(shard_root: Path) -> ShardSet:
    return open_shards(shard_root / "train")
