"""Fixtures made once per test session: a small synthetic dataset in ILSVRC's formats, its shard sets and eigenbasis."""

from __future__ import annotations

import signal
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

torch.set_num_threads(1)  # the tests use small networks, for which more threads only add synchronisation

# Whoever starts the tests in the background (nohup, some CI runners) ignores these signals, and children inherit that.
# The processes that the tests stop must receive them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the three ILSVRC files of the synthetic dataset."""
    folder = tmp_path_factory.mktemp("sample")
    make_sample(folder, SAMPLE, workers=IN_PROCESS, progress=ignore)
    return folder


@pytest.fixture(scope="session")
def shard_root(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shard sets `train` (with its eigenbasis) and `val`. Tests that change it work on a copy."""
    root = tmp_path_factory.mktemp("shards")
    for split in ("train", "val"):
        make_split(open_source(sample).listing(split), root, SHARD_SETTINGS, IN_PROCESS, 10, ignore)
    shards = open_shards(root / "train")
    rgb_pca.save(rgb_pca.measure(shards, IN_PROCESS, ignore), rgb_pca.eigenbasis_path(root / "train"))
    return root


@pytest.fixture(scope="session")
def train_shards(shard_root: Path) -> ShardSet:
    """The opened shard set `train`."""
    return open_shards(shard_root / "train")
