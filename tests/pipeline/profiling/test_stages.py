"""The loader cut short after each stage: windows start at different steps, and cold ones start cold."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.loader.inputs import order_of
from pipeline.loader.loader import stage_loader
from pipeline.loader.settings import LoaderSettings
from pipeline.profiling import stages
from pipeline.profiling.page_cache import cached_share, drop_cache
from pipeline.profiling.stages import cached_share_of, drop_set, measure_stages, next_ids, stage_windows
from pipeline.shards.reader import ShardSet
from tests.support.shard_fixtures import basis_of, sample, write_set

SETTINGS = LoaderSettings(batch=4, threads=1)


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    return write_set(tmp_path, [sample(number) for number in range(24)])


class Watched(ShardSet):
    """Records which share of the set is in memory when a window starts."""

    def __init__(self, of: ShardSet) -> None:
        super().__init__(of.folder, of.manifest, of.index, of.manifest_sha256)
        self.first_shares: list[float] = []
        self.fresh = False  # whether the next read belongs to a new window

    def read_ahead(self, ids: np.ndarray) -> None:
        """The same, noted if it is the first of a window."""
        if self.fresh:
            self.fresh = False
            self.first_shares.append(cached_share(self.tars))
        super().read_ahead(ids)


def test_a_part_of_a_set_has_the_samples_of_its_ids(shards: ShardSet):
    ids = np.array([5, 17, 3])
    for one, other in zip(shards.part(ids).jpegs(np.arange(3)), shards.jpegs(ids), strict=True):
        assert np.array_equal(one, other)
    assert len(shards) == 24


def test_cold_windows_start_cold(shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The set is not in memory when a window starts."""
    (tmp_path / "twin").mkdir()
    basis = basis_of(write_set(tmp_path / "twin", [sample(number) for number in range(24)]))
    drop_cache(shards.tars)
    if cached_share(shards.tars) > 0:
        pytest.skip("this file system keeps its cached pages")
    watched, counted = Watched(shards), []

    def drop(tars: list[Path]) -> None:
        drop_cache(tars)
        watched.fresh = True

    monkeypatch.setattr(stages, "drop_cache", drop)
    measured = measure_stages(watched, basis, SETTINGS, 0.01, 2, counted.append, cold=True)
    assert len(counted) == stage_windows(2)
    assert watched.first_shares == [0.0] * 6
    assert min(stage.img_s for stage in (measured.read, measured.decode, measured.full, measured.reread)) > 0
    assert measured.set_bytes == sum(tar.stat().st_size for tar in shards.tars)


def test_no_window_reads_what_an_earlier_one_has_read(shards: ShardSet, monkeypatch: pytest.MonkeyPatch):
    """Each window starts beyond what the one before it has read and read ahead, and so does what comes next. Only the
    stage that reads the same few batches again and again has a set of its own."""
    started = list[list[int]]()

    def counted(part: ShardSet, basis: object, settings: LoaderSettings, stage: str, start: int = 0) -> Iterator[int]:
        window = [start, 0]
        if len(part) == 24:
            started.append(window)
        while True:
            window[1] += 1
            yield settings.batch

    monkeypatch.setattr(stages, "stage_batch_sizes", counted)
    monkeypatch.setattr(stages, "steps_per_epoch", lambda samples, batch: 10**9)
    measured = measure_stages(shards, basis_of(shards), SETTINGS, 1e-4, 2, start_step=7)
    assert started[0][0] == 7 and len(started) == 6
    ends = [start + taken + SETTINGS.prefetched_batches for start, taken in started]
    assert [start for start, _ in started[1:]] + [measured.next_step] == ends


def test_a_run_reads_the_rest_of_its_epoch_next_and_then_the_following_one(shards: ShardSet):
    """24 samples in batches of 5 are 4 steps; the tail of 4 samples is dropped."""
    settings = LoaderSettings(batch=5)
    now, then = (order_of(shards, settings, epoch) for epoch in (3, 4))
    assert next_ids(shards, settings, 3, 3).tolist() == [*now[15:20], *then]
    assert next_ids(shards, settings, 2, 4 + 3).tolist() == [*now[15:20], *then]


def test_the_share_of_some_samples_that_is_in_memory(tmp_path: Path):
    """Half of the samples are read, and they are far enough apart to share no page."""
    samples = [replace(sample(number), jpeg=sample(number).jpeg + bytes(20_000)) for number in range(16)]
    shards = write_set(tmp_path, samples, 8)
    drop_cache(shards.tars)
    if cached_share(shards.tars) > 0:
        pytest.skip("this file system keeps its cached pages")
    for row in shards.index[::2]:
        with shards.tars[row["shard"]].open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            os.pread(file.fileno(), int(row["size"]), int(row["offset"]))
    share = cached_share_of(shards, np.arange(0, 16, 2))
    assert share == 1
    other = cached_share_of(shards, np.arange(1, 16, 2))
    assert other is not None and other < 0.4


def test_a_stage_can_start_at_any_step(shards: ShardSet):
    """A stage that starts at step 2 gives the whole loader's third batch first."""
    basis = basis_of(shards)
    whole = stage_loader(shards, basis, SETTINGS, "read")
    third = [next(whole).tolist() for _ in range(3)][2]
    for stage in ("read", "decode", "full"):
        assert next(stage_loader(shards, basis, SETTINGS, stage, 2)).tolist() == third


def test_a_set_that_stays_in_memory_cannot_be_measured_cold(shards: ShardSet):
    """The kernel keeps pages that another process has mapped and read."""
    mapped = [np.memmap(tar, np.uint8, "r") for tar in shards.tars]
    assert sum(int(tar.sum()) for tar in mapped)
    with pytest.raises(ValueError, match="stays in memory when dropped"):
        drop_set(shards)
