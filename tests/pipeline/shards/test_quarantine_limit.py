"""The quarantine limit: all offenders are named, no empty set is published, and a repaired source is resumed."""

from __future__ import annotations

import json
import struct
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from pipeline.imagenet.source import open_source
from pipeline.shards import settings
from pipeline.shards.build import TooManyQuarantined, make_split
from pipeline.shards.settings import ResizeSettings, ShardSettings
from pipeline.shards.transcode import Undecodable, decode, transcode
from pipeline.workers import IN_PROCESS, ignore
from tests.support.shard_fixtures import drawn_jpeg
from tools.make_shards import main

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


def test_shards_that_a_smaller_source_does_not_need_are_removed(tmp_path: Path):
    """After a failed run, the user removed most images instead of replacing the bad ones."""
    source, out = source_of(tmp_path / "in", bad=2), tmp_path / "out"
    with pytest.raises(TooManyQuarantined):
        make(source, out, 1)
    for number in [n for n in range(12) if n not in (3, 4, 5)]:
        (source / f"train/n01440764/n01440764_{number}.JPEG").unlink()
    manifest = make(source, out, 1).manifest
    assert (manifest.samples, len(manifest.shards)) == (3, 1)
    assert sorted(path.name for path in (out / "train").iterdir()) == [
        "_info.json",
        "index.npy",
        "manifest.json",
        "train-000000.idx",
        "train-000000.tar",
        "wids.json",
    ]


def test_damaged_records_of_a_run(tmp_path: Path):
    """A shard with a damaged journal entry is made again. A damaged plan is refused: its settings are unknown."""
    source, out = source_of(tmp_path / "in", bad=2), tmp_path / "out"
    with pytest.raises(TooManyQuarantined):
        make(source, out, 1)
    source_of(tmp_path / "in", bad=0)
    for path in (out / "train.unfinished").glob("train-*.json"):
        path.write_text("{")
    assert make(source, out, 1).shards_written == 3
    (out / "train").rename(out / "train.unfinished")
    (out / "train.unfinished/plan.json").write_text("[")
    with pytest.raises(ValueError, match=r"begun with other settings or source \(its record is damaged\)"):
        make(source, out, 1)


def test_the_json_file_is_written_over_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """It has all bad images, of which the screen shows some."""
    folders = [str(source_of(tmp_path / "in", bad=12)), str(tmp_path / "out")]
    options = ["--workers", "1", "--max-quarantine", "11", "--json", str(tmp_path / "a.json")]
    monkeypatch.setattr(sys, "argv", ["make_shards.py", *folders, *options])
    assert main() == 1
    assert "and 2 more; --json FILE lists all" in capsys.readouterr().err
    failed = json.loads((tmp_path / "a.json").read_text())["train"]
    assert "12 of 12 images cannot be decoded" in failed["error"]
    assert set(failed["quarantined"]) == {f"n01440764_{n}" for n in range(12)}


def test_a_split_without_images_is_an_error(tmp_path: Path):
    listing = open_source(source_of(tmp_path / "in", bad=0)).listing("train")
    empty = replace(listing, items=listing.items.take(np.empty(0, np.int64)))
    with pytest.raises(ValueError, match="train: no images in the source, expected at least 1"):
        make_split(empty, tmp_path / "out", SETTINGS, IN_PROCESS, 1, ignore)


def tiff_of_12_bits(values: np.ndarray) -> bytes:
    """An uncompressed grey TIFF; two values of 12 bits are packed into three bytes."""
    height, width = values.shape
    first, second = values.reshape(-1, 2).T.astype(int)
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8 + 2 + 9 * 12 + 4, 277: 1, 278: height}
    tags[279] = len(packed)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + packed


def test_12_bit_images_are_scaled_by_their_12_bits():
    """The largest of 12 bits is white, whatever the image's own range is."""
    ramp = np.tile(np.arange(0, 2048, 8), (256, 1))
    pixels = decode(tiff_of_12_bits(ramp), ResizeSettings())
    np.testing.assert_array_equal(pixels, np.repeat((ramp >> 4)[..., None], 3, 2))


def test_where_a_jpeg_cannot_be_decoded_smaller_it_is_decoded_whole(monkeypatch: pytest.MonkeyPatch):
    """The stored size is the same."""

    def refuse(*_: object) -> None:
        raise ValueError("no draft mode")

    settings, large = ResizeSettings(apply_exif=True), drawn_jpeg(1, 1040, 1100)  # EXIF: by Pillow
    assert decode(large, settings).shape == (275, 260, 3)
    expected = transcode(large, settings)
    monkeypatch.setattr(JpegImageFile, "draft", refuse)
    assert decode(large, settings).shape == (1100, 1040, 3)
    found = transcode(large, settings)
    assert (found.width, found.height) == (expected.width, expected.height)


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
