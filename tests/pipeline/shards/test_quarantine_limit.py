"""The quarantine limit: all offenders are named, no empty set is published, and a repaired source is resumed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.imagenet.source import open_source
from pipeline.shards import settings
from pipeline.shards.build import TooManyQuarantined, make_split
from pipeline.shards.settings import ResizeSettings, ShardSettings
from pipeline.shards.transcode import Undecodable, decode
from pipeline.workers import IN_PROCESS, ignore
from tests.support.shard_fixtures import drawn_jpeg

SETTINGS = ShardSettings(shard_samples=4)
WHOLE = drawn_jpeg(1, 290, 270)


def source_of(folder: Path, bad: int) -> Path:
    """Twelve images of one class, of which the first `bad` have lost their end-of-image marker."""
    images = folder / "train" / "n01440764"
    images.mkdir(parents=True, exist_ok=True)
    for number in range(12):
        (images / f"n01440764_{number}.JPEG").write_bytes(WHOLE[:-2] if number < bad else WHOLE)
    return folder


def make(source: Path, out: Path, limit: int):
    return make_split(open_source(source).listing("train"), out, SETTINGS, IN_PROCESS, limit, ignore)


def test_all_images_over_the_limit_are_named_and_only_their_shards_are_redone(tmp_path: Path):
    with pytest.raises(TooManyQuarantined, match="2 of 12 images") as caught:
        make(source_of(tmp_path / "in", bad=2), tmp_path / "out", 1)
    assert [entry.key[-2:] for entry in caught.value.quarantined] == ["_0", "_1"]
    assert all("truncated" in entry.reason for entry in caught.value.quarantined)
    kept = len(list((tmp_path / "out/train.unfinished").glob("train-*.json")))
    outcome = make(source_of(tmp_path / "in", bad=0), tmp_path / "out", 1)
    assert kept >= 1 and outcome.shards_written == 3 - kept and outcome.manifest.samples == 12
    fresh = make(tmp_path / "in", tmp_path / "fresh", 1)
    assert outcome.manifest == fresh.manifest


def test_removing_the_offenders_may_change_the_default_shard_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Seven of twelve images remain, which by default are one per shard instead of two."""
    monkeypatch.setattr(settings, "MIN_SHARD_SAMPLES", 1)
    monkeypatch.setattr(settings, "MIN_SHARDS", 4)
    monkeypatch.setitem(globals(), "SETTINGS", ShardSettings())
    with pytest.raises(TooManyQuarantined, match="5 of 12 images"):
        make(source_of(tmp_path / "in", bad=5), tmp_path / "out", 1)
    for number in range(5):
        (tmp_path / "in/train/n01440764" / f"n01440764_{number}.JPEG").unlink()
    outcome = make(tmp_path / "in", tmp_path / "out", 1)
    assert len(outcome.manifest.shards) == 7 and outcome.manifest.settings["shard_samples"] == 1
    assert outcome.manifest == make(tmp_path / "in", tmp_path / "fresh", 1).manifest


def test_a_set_without_samples_is_never_published(tmp_path: Path):
    with pytest.raises(TooManyQuarantined, match="12 of 12 images"):
        make(source_of(tmp_path / "in", bad=12), tmp_path / "out", 100)
    assert not (tmp_path / "out/train").exists()


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_32_bit_images_are_scaled_by_their_range(kind: type, tmp_path: Path):
    ramp = np.tile(np.linspace(0, 1 if kind is np.float32 else 2**30, 300), (280, 1)).astype(kind)
    Image.fromarray(ramp).save(tmp_path / "ramp.tiff")
    pixels = decode((tmp_path / "ramp.tiff").read_bytes(), ResizeSettings())
    assert pixels[:, 0].max() == 0 and pixels[:, -1].min() == 255 and len(np.unique(pixels)) == 256


def test_32_bit_images_without_a_range_are_refused(tmp_path: Path):
    Image.fromarray(np.full((280, 300), np.nan, np.float32)).save(tmp_path / "nan.tiff")
    with pytest.raises(Undecodable, match="cannot be scaled"):
        decode((tmp_path / "nan.tiff").read_bytes(), ResizeSettings())
