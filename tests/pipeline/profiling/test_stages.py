"""The loader cut short after each stage: windows start at different steps, and cold ones start cold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.loader.loader import stage_loader
from pipeline.loader.settings import LoaderSettings
from pipeline.profiling import stages
from pipeline.profiling.page_cache import cached_share, drop_cache
from pipeline.profiling.stages import drop_set, measure_stages, stage_windows
from pipeline.shards.reader import ShardSet
from tests.support.shard_fixtures import basis_of, sample, write_set

SETTINGS = LoaderSettings(batch=4, threads=1)


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    return write_set(tmp_path, [sample(number) for number in range(24)])


class Watched(ShardSet):
    """Records which samples each window reads first, and which share of the set is in memory then."""

    def __init__(self, of: ShardSet) -> None:
        super().__init__(of.folder, of.manifest, of.index, of.manifest_sha256)
        self.first_reads: list[tuple[float, list[int]]] = []
        self.fresh = False  # whether the next read belongs to a new window

    def read_ahead(self, ids: np.ndarray) -> None:
        """The same, noted if it is the first of a window."""
        if self.fresh:
            self.fresh = False
            self.first_reads.append((cached_share(self.tars), self.index["offset"][ids].tolist()))
        super().read_ahead(ids)


def test_a_part_of_a_set_has_the_samples_of_its_ids(shards: ShardSet):
    ids = np.array([5, 17, 3])
    for one, other in zip(shards.part(ids).jpegs(np.arange(3)), shards.jpegs(ids), strict=True):
        assert np.array_equal(one, other)
    assert len(shards) == 24


def test_cold_windows_start_cold_and_at_different_steps(
    shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The set is not in memory when a window starts, and no two windows start with the same batch."""
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
    assert [share for share, _ in watched.first_reads] == [0.0] * 6
    assert len({tuple(ids) for _, ids in watched.first_reads}) == 6
    assert min(stage.img_s for stage in (measured.read, measured.decode, measured.full, measured.reread)) > 0
    assert measured.set_bytes == sum(tar.stat().st_size for tar in shards.tars)


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
