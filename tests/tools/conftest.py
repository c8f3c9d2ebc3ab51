"""A fixture for the tests of the tools: an end-to-end run on a tiny sample."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tool_runs import TINY, printed, tool


@pytest.fixture(scope="session")
def end_to_end(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `sample`, `shards` and run `a`, each made by its tool. 47 images, 5 steps an epoch, 2 epochs.

    Tests must not change what is in it; they may add runs of their own.
    """
    root = tmp_path_factory.mktemp("end_to_end")
    shards = root / "shards"
    printed(tool("make_sample", root / "sample", "--classes", 3, "--train", 16, "--val", 4, "--workers", 1))
    printed(tool("make_shards", root / "sample", shards, "--workers", 2, "--shard-samples", 20))
    printed(tool("compute_pca", shards / "train", "--workers", 1, "--json", root / "pca.json"))
    run = ["--runs", root, "--run-name", "a", "--epochs", 2, *TINY]
    assert "verdict" in printed(tool("train", shards / "train", "--val", shards / "val", *run))
    return root
