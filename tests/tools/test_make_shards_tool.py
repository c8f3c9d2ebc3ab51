"""tools/make_shards.py on a tiny sample: its limit of damaged images, --verify, --repair and --part on a cluster."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.shard_fixtures import files_of
from tests.support.tool_runs import printed, tool


def test_a_truncated_image_over_the_limit_ends_with_1(end_to_end: Path, tmp_path: Path):
    options = ["--split", "train", "--max-quarantine", 0, "--workers", 1]
    done = tool("make_shards", end_to_end / "sample", tmp_path / "out", *options)
    printed(done, code=1)
    assert "1 of 48 images cannot be decoded, at most 0 are allowed" in done.stderr
    assert not (tmp_path / "out" / "train").exists()


def test_verify_names_a_fault_and_repair_removes_it(end_to_end: Path, tmp_path: Path):
    """--verify exits with 0 without a fault and with 1 with one; after --repair from the source it exits with 0."""
    shards, one = shutil.copytree(end_to_end / "shards", tmp_path / "shards"), ["--workers", 1]
    assert printed(tool("make_shards", shards, "--verify", "--deep", *one)).count("as it was written") == 2
    with (shards / "train" / "train-000001.tar").open("r+b") as file:
        file.seek(4000)
        file.write(b"changed")
    out = printed(tool("make_shards", shards, "--verify", "--json", tmp_path / "v.json", *one), code=1)
    assert "bytes changed" in out and "train-000001.tar" in out
    assert len(json.loads((tmp_path / "v.json").read_text())["train"]) == 1
    printed(tool("make_shards", end_to_end / "sample", shards, "--repair", "--shard-samples", 20, *one))
    printed(tool("make_shards", shards, "--verify", *one))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
def test_a_part_on_a_dask_cluster_and_one_without_give_the_bytes_of_one_run(end_to_end: Path, tmp_path: Path):
    """Two worker processes of a cluster with a dashboard on a free port do the first part."""
    distributed = pytest.importorskip("distributed")
    options = ["--split", "train", "--shard-samples", 8]
    printed(tool("make_shards", end_to_end / "sample", tmp_path / "one", *options, "--workers", 1))
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address="127.0.0.1:0"
    ) as cluster:
        engine = ["--engine", cluster.scheduler_address]
        printed(tool("make_shards", end_to_end / "sample", tmp_path / "out", *options, *engine, "--part", "1/2"))
    printed(tool("make_shards", end_to_end / "sample", tmp_path / "out", *options, "--workers", 1, "--part", "2/2"))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "one")
