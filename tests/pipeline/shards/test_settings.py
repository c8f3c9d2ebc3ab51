"""Shard settings: wrong values are refused, and a command line can import them without heavy libraries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.imagenet.source import LAYOUTS
from pipeline.shards.settings import (
    MAX_SHARD_SAMPLES,
    MIN_SHARD_SAMPLES,
    MIN_SHARDS,
    ResizeSettings,
    ShardSettings,
)
from tools import make_shards

ROOT = Path(__file__).parents[3]
HEAVY = {"PIL", "numba", "numpy", "nvidia.dali", "scipy", "torch"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"quality": 0}, "JPEG quality 0, expected 1 to 100"),
        ({"stored": "round"}, "'round', expected one of short-side, square"),
        ({"filter": "x"}, "'x', expected one of lanczos, bicubic, area"),
        ({"subsampling": "4"}, "'4', expected one of 4:2:0, 4:2:2, 4:4:4"),
    ],
)
def test_wrong_resize_settings_are_refused(wrong: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ResizeSettings(**wrong)


@pytest.mark.parametrize(
    ("images", "size"),
    [(1_281_167, 1024), (50_000, 1024), (49_152, 1024), (49_151, 512), (5_000, 64), (800, 16), (500, 16), (0, 16)],
)
def test_a_small_split_has_small_shards(images: int, size: int):
    """Both splits of ImageNet have the largest shards. A size that the user chose holds for any split."""
    assert ShardSettings().samples_per_shard(images) == size
    assert ShardSettings(shard_samples=300).samples_per_shard(images) == 300
    assert size in (MIN_SHARD_SAMPLES, MAX_SHARD_SAMPLES) or images / size >= MIN_SHARDS


def test_an_empty_shard_is_refused():
    with pytest.raises(ValueError, match="0 samples per shard, expected at least 1"):
        ShardSettings(shard_samples=0)


@pytest.mark.parametrize("tool", ["make_shards", "compute_pca", "bench_resize", "bench_pca", "bench_sharding"])
def test_help_needs_no_heavy_library(tool: str):
    """The module of the tool can be imported, and so its --help printed, without any of the heavy libraries."""
    code = f"import sys, tools.{tool}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []


def test_the_help_of_make_shards_lists_every_layout():
    """The parser does not import the layouts, so its text must be compared with them."""
    lines = str(make_shards.__doc__).splitlines()
    assert [line.split()[0] for line in lines if line.split() and line.split()[0] in LAYOUTS] == list(LAYOUTS)
