"""tools/make_shards.py on a tiny sample: its limit of damaged images, --verify and --repair."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

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
