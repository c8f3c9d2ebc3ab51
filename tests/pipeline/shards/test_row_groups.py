"""Parquet: each row group is read once, in file order, in bounded memory, and the set is that of any row-group size."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.imagenet import item_reader, parquet
from pipeline.imagenet.source import open_source
from pipeline.shards import build, row_groups
from pipeline.shards.bottleneck import StageSeconds, find_bottleneck
from pipeline.shards.build import Outcome, make_split
from pipeline.shards.settings import ResizeSettings, ShardSettings
from pipeline.workers import IN_PROCESS, ignore
from tests.support.shard_fixtures import drawn_jpeg

pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
SETTINGS = ShardSettings(ResizeSettings(short_side=32), shard_samples=4)
IMAGES = [drawn_jpeg(n, 40, 32) for n in range(20)]


def write(path: Path, images: list[bytes | None], group: int, **options: Any) -> None:
    """A parquet file with `group` rows per row group; labels alternate."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [f"{path.stem[:7]}_{n}.jpg" for n in range(len(images))]
    rows = [{"bytes": data, "path": name} for data, name in zip(images, names, strict=True)]
    table = pa.table({"image": rows, "label": [n % 2 for n in range(len(images))]})
    pq.write_table(table, path, group, **options)


def source_of(root: Path, group: int) -> Path:
    """Two files, one of which has a row without an image."""
    write(root / "train-0.parquet", IMAGES[:12], group)
    write(root / "train-1.parquet", [*IMAGES[12:], None], group)
    return root


def make(source: Path, out: Path) -> Outcome:
    return make_split(open_source(source).listing("train"), out, SETTINGS, IN_PROCESS, 1, ignore)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(file, row group) of each read, in order. Images must not be read in another way."""
    found: list[tuple[str, int]] = []
    real = parquet.row_images

    def counted(path: Path, groups: Any, *rest: Any) -> Iterator[tuple[int, bytes]]:
        found.extend((path.name, group) for group in groups)
        return real(path, groups, *rest)

    def refused(*_: object) -> None:
        raise AssertionError("a shard reads a parquet file")

    monkeypatch.setattr(row_groups, "row_images", counted)
    monkeypatch.setattr(item_reader, "ParquetRows", refused)
    return found


def test_each_row_group_is_read_once_in_file_order(reads: list[tuple[str, int]], tmp_path: Path):
    """Six shards need images from all groups. The temporary files are removed."""
    outcome = make(source_of(tmp_path / "in", 3), tmp_path / "out")
    assert len(outcome.manifest.shards) == 6
    assert reads == [*(("train-0.parquet", n) for n in range(4)), *(("train-1.parquet", n) for n in range(3))]
    assert [q.reason for q in outcome.manifest.quarantined] == ["no image bytes"]
    assert not (tmp_path / "out/train" / row_groups.FOLDER).exists()


def test_row_groups_do_not_change_the_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One row per group, all in one group, groups that are units of their own, and reading without unpacking."""
    expected = make(source_of(tmp_path / "1", 1), tmp_path / "out1").manifest.shards
    assert make(source_of(tmp_path / "99", 99), tmp_path / "out99").manifest.shards == expected
    monkeypatch.setattr(row_groups, "UNIT_BYTES", 1)
    assert make(tmp_path / "1", tmp_path / "units").manifest.shards == expected
    monkeypatch.setattr(row_groups, "is_parquet", lambda name: False)
    assert make(tmp_path / "1", tmp_path / "direct").manifest.shards == expected


@pytest.mark.parametrize("rows", [400, 1600])
def test_memory_does_not_grow_with_the_row_group(rows: int, tmp_path: Path):
    """pyarrow holds less than 2 MB at any time, of row groups of 4 and 16 MB."""
    images: list[bytes | None] = [bytes([n % 251]) * 10_000 for n in range(rows)]
    path = tmp_path / "train-0.parquet"
    write(path, images, rows, write_batch_size=8, data_page_size=50_000, use_dictionary=False, compression="none")
    before, held = pa.total_allocated_bytes(), []
    for row, data in parquet.row_images(path, [0], 0, 0, set(range(rows))):
        held.append(pa.total_allocated_bytes() - before)
        assert data == images[row]
    assert len(held) == rows
    assert max(held) < 2_000_000


def test_an_interrupted_run_keeps_what_is_unpacked(
    reads: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The next run reads no row group again, and makes the same set."""
    source, real = source_of(tmp_path / "in", 3), build.run_job
    made: list[str] = []

    def failing(job: Any) -> Any:
        if made:
            raise KeyboardInterrupt
        made.append(job.name)
        return real(job)

    with monkeypatch.context() as patch:
        patch.setattr(build, "run_job", failing)
        with pytest.raises(KeyboardInterrupt):
            make(source, tmp_path / "out")
    assert len(reads) == 7
    outcome = make(source, tmp_path / "out")
    assert (len(reads), outcome.shards_written) == (7, 5)
    assert outcome.manifest == make(source, tmp_path / "fresh").manifest


def test_one_shard_reads_the_file_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In file order, which reads each group once, too: nothing is unpacked."""
    monkeypatch.setattr(row_groups, "row_images", None)
    write(tmp_path / "in/train-0.parquet", list(IMAGES[:4]), 2)
    assert make(tmp_path / "in", tmp_path / "out").manifest.samples == 4


def test_too_small_a_disk_is_an_error_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    with pytest.raises(
        ValueError, match=r"unpacking the parquet files takes 0\.0 GB there .* choose an OUT on a larger"
    ):
        make(source_of(tmp_path / "in", 3), tmp_path / "out")


def test_a_file_that_has_changed_is_named(tmp_path: Path):
    """Between the listing and the work."""
    listing = open_source(source_of(tmp_path / "in", 3)).listing("train")
    write(tmp_path / "in/train-1.parquet", list(IMAGES), 3)
    with pytest.raises(ValueError, match=r"train-1.parquet: changed since it was listed"):
        make_split(listing, tmp_path / "out", SETTINGS, IN_PROCESS, 1, ignore)


def test_the_bottleneck_names_row_groups():
    found = find_bottleneck(StageSeconds(1, 1, 1, 1, 1, row_groups_s=9), 7, 2, 2, 100)
    assert found.part == "row groups"
    assert "row groups 64%, idle 0%; each parquet row group was read once and unpacked" in str(found)
    assert "row groups" not in str(find_bottleneck(StageSeconds(9, 1, 1, 1, 1), 7, 2, 2, 100))
