"""The feed cut short: every stage of every window, at places apart, cold where it is wanted so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.loader.loader import stage_loader
from pipeline.loader.settings import LoaderSettings
from pipeline.profiling.page_cache import cached_share, drop_cache
from pipeline.profiling.stages import forget, measure_stages, windows
from pipeline.shards.reader import ShardSet
from tests.support.shard_fixtures import basis_of, sample, write_set

SETTINGS = LoaderSettings(batch=4, threads=1)


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    return write_set(tmp_path, [sample(number) for number in range(24)])


class Watched(ShardSet):
    """Notes what is read and, before it is, how much of the set is in memory."""

    def __init__(self, of: ShardSet) -> None:
        super().__init__(of.folder, of.manifest, of.index, of.manifest_sha256)
        self.first_reads: list[tuple[float, list[int]]] = []

    def unmap(self) -> None:
        """What is mapped next is a window's."""
        super().unmap()
        self.fresh = True

    def jpegs(self, ids: np.ndarray) -> list[np.ndarray]:
        """As they are."""
        if self.__dict__.pop("fresh", False):
            self.first_reads.append((cached_share(self.tars), self.index["offset"][ids].tolist()))
        return super().jpegs(ids)


def test_a_part_is_those_samples(shards: ShardSet):
    ids = np.array([5, 17, 3])
    for one, other in zip(shards.part(ids).jpegs(np.arange(3)), shards.jpegs(ids), strict=True):
        assert np.array_equal(one, other)
    assert len(shards) == 24


def test_cold_windows_begin_cold_and_apart(shards: ShardSet, tmp_path: Path):
    """The set is out of memory when a window begins, and no two windows of a round begin with the same batch."""
    (tmp_path / "twin").mkdir()  # measuring the set itself would leave it mapped
    basis = basis_of(write_set(tmp_path / "twin", [sample(number) for number in range(24)]))
    drop_cache(shards.tars)
    if cached_share(shards.tars) > 0:
        pytest.skip("this file system does not give up its cached pages")
    watched, counted = Watched(shards), []
    rates = measure_stages(watched, basis, SETTINGS, 0.01, 2, counted.append, cold=True)
    assert len(counted) == windows(2)
    assert [share for share, _ in watched.first_reads] == [0.0] * 6
    assert len({tuple(ids) for _, ids in watched.first_reads}) == 6
    assert min(rate.img_s for rate in (rates.read, rates.decode, rates.full, rates.reread)) > 0
    assert rates.set_bytes == sum(tar.stat().st_size for tar in shards.tars)


def test_a_stage_may_begin_anywhere(shards: ShardSet):
    """From step 2 on it is the whole feed's third batch."""
    basis = basis_of(shards)
    whole = stage_loader(shards, basis, SETTINGS, "read")
    third = [next(whole).tolist() for _ in range(3)][2]
    for stage in ("read", "decode", "full"):
        assert next(stage_loader(shards, basis, SETTINGS, stage, 2)).tolist() == third


def test_what_stays_in_memory_cannot_be_measured_cold(shards: ShardSet):
    """Mapped by somebody else, who has touched it: the kernel keeps it."""
    other = shards.part(np.arange(24))
    assert sum(int(jpeg.sum()) for jpeg in other.jpegs(np.arange(24)))
    with pytest.raises(ValueError, match="stays in memory when dropped"):
        forget(shards)
