"""The loader alone, cut short after each stage: as the page cache is, cold, and from memory.

Every window goes on in the epoch where the one before it has stopped. Otherwise a window would find in memory what the
window before it has read, and the disk would look faster than it is.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast, get_args

import numpy as np

from pipeline.loader.inputs import order_of
from pipeline.loader.loader import stage_batch_sizes
from pipeline.loader.order import Ids, steps_per_epoch
from pipeline.loader.settings import LoaderSettings, Stage
from pipeline.profiling.group import SINGLE_PROCESS, Group
from pipeline.profiling.page_cache import cached_share, cached_share_of_parts, drop_cache
from pipeline.profiling.storage_probe import StorageProbe, probe_storage
from pipeline.profiling.throughput import Throughput, lockstep_throughput, measure_throughput, throughput_by_rank
from pipeline.rgb_pca import Eigenbasis
from pipeline.shards.reader import ShardSet

STAGE_ROUNDS = 3
REREAD_BATCHES = 2  # batches that are read again and again: more than one, and few enough to stay in memory
NEXT_BATCHES = 64  # enough to know which share of what a run reads next is in memory
MAX_COLD_SHARE = 0.5  # of the set in memory after dropping it: with more, reads would not be cold


@dataclass(frozen=True)
class StageThroughput:
    """Throughput of the loader cut short after each stage.

    Attributes:
        read: reading alone.
        decode: reading and decoding.
        full: the whole loader.
        reread: reading the same few batches again and again, which come from memory if the kernel caches them.
        cached_share: share of the set, 0 to 1, that was in memory before the first window; None if the kernel does not
            show it to this user.
        set_bytes: bytes of the set's tars.
        next_step: the step of the epoch after the last one that a window may have read.
        image_bytes: mean bytes of an image as it is stored.
        probe: the file system and what a read of it costs; None if that was not measured.
        windows_cached_share: share of what the windows read that was in memory before; None if unknown.
    """

    read: Throughput
    decode: Throughput
    full: Throughput
    reread: Throughput
    cached_share: float | None
    set_bytes: int
    next_step: int = 0
    image_bytes: float = 0.0
    probe: StorageProbe | None = None
    windows_cached_share: float | None = None

    def over_ranks(self, group: Group) -> StageThroughput:
        """The stages of all ranks together, if each rank has measured its own loader and all wait for the slowest."""
        return self.each(lambda throughput: lockstep_throughput(throughput_by_rank(throughput, group)))

    def each(self, change: Callable[[Throughput], Throughput]) -> StageThroughput:
        """The same with `change` applied to every stage's throughput."""
        read, decode, full, reread = (change(one) for one in (self.read, self.decode, self.full, self.reread))
        return replace(self, read=read, decode=decode, full=full, reread=reread)

    @property
    def storage(self) -> dict[str, Any]:
        """Figures that distinguish cold reads from warm ones, for reports."""
        return {
            "set_bytes": self.set_bytes,
            "cached_share": self.cached_share,
            "read_img_s": self.read.img_s,
            "memory_img_s": self.reread.img_s,
            "windows_cached_share": self.windows_cached_share,
            "file_system": None if self.probe is None else self.probe.record(),
        }


def format_storage(storage: dict[str, Any]) -> str:
    """`StageThroughput.storage` as one line of text."""
    share = "an unknown share" if storage["cached_share"] is None else f"{storage['cached_share']:.0%}"
    text = (
        f"{share} of {storage['set_bytes'] / 2**20:,.0f} MiB was in memory; read at {storage['read_img_s']:,.0f} img/s,"
        f" from memory at {storage['memory_img_s']:,.0f}"
    )
    cached = storage["windows_cached_share"]
    return text if cached is None else f"{text}; {1 - cached:.0%} of the windows' reads were cold"


def measure_stages(
    shards: ShardSet,
    basis: Eigenbasis,
    settings: LoaderSettings,
    seconds: float,
    rounds: int = STAGE_ROUNDS,
    progress: Callable[[int], None] = lambda n: None,
    cold: bool = False,
    group: Group = SINGLE_PROCESS,
    start_step: int = 0,
) -> StageThroughput:
    """Measures all stages of this process's loader in turn.

    Each window goes on in the epoch where the one before it has stopped, so that nothing is read twice.

    Args:
        shards: the shard set.
        basis: its eigenbasis.
        settings: of this process's loader, with its share of the batch and its own seed.
        seconds: length of a window.
        rounds: windows of each stage.
        progress: called with 1 after each window; there are `stage_windows(rounds)`.
        cold: drop the set from the page cache before each window of a stage.
        group: ranks that measure at the same time; all start together.
        start_step: the step of the epoch at which the first window starts.

    Returns:
        The stages of this process. `StageThroughput.over_ranks` gives those of all ranks.

    Raises:
        ValueError: `cold`, but the set stays in memory (a file system in memory, or another process reads it).
    """
    group.largest(0)  # a barrier
    cached, stages = known_cached_share(shards), get_args(Stage)
    if cold:
        drop_set(shards)
    windows = _StageWindows(shards, basis, settings, cold, start_step)

    def reread() -> Iterator[int]:
        few = shards.part(np.arange(min(len(shards), REREAD_BATCHES * settings.batch)))
        return stage_batch_sizes(few, basis, settings, "read")

    factories: dict[str, Callable[[], Iterator[int]]] = {stage: partial(windows.sizes, stage) for stage in stages}
    factories["reread"] = reread
    assert settings.prefetched_batches > REREAD_BATCHES  # so that discarded batches have read all of them once
    measured = measure_throughput(factories, seconds, rounds, progress, settings.prefetched_batches)
    read, decode, full, again = (measured[name] for name in (*stages, "reread"))
    sizes = sum(tar.stat().st_size for tar in shards.tars), windows.next_step, float(shards.index["size"].mean())
    return StageThroughput(read, decode, full, again, cached, *sizes)


class _StageWindows:
    """Windows of stages, each of which goes on in the epoch where the one before it has stopped."""

    def __init__(
        self, shards: ShardSet, basis: Eigenbasis, settings: LoaderSettings, cold: bool, start_step: int
    ) -> None:
        self._shards, self._basis, self._settings, self._cold = shards, basis, settings, cold
        self._steps, self._position = steps_per_epoch(len(shards), settings.batch), start_step

    @property
    def next_step(self) -> int:
        """The step after the last one that may have been read."""
        return self._position % self._steps

    def sizes(self, stage: Stage) -> Iterator[int]:
        """Batch sizes of a new window of a stage."""
        if self._cold:
            drop_set(self._shards)
        sizes = stage_batch_sizes(self._shards, self._basis, self._settings, stage, self.next_step)
        self._position += self._settings.prefetched_batches
        with closing(cast(Generator[int], sizes)) as batches:
            for size in batches:
                self._position += 1
                yield size


def stage_windows(rounds: int = STAGE_ROUNDS) -> int:
    """Number of windows that `measure_stages` takes."""
    return rounds * (len(get_args(Stage)) + 1)


def known_cached_share(shards: ShardSet) -> float | None:
    """The share of the set that is in memory; None if the kernel does not show it to this user."""
    try:
        return cached_share(shards.tars)
    except ValueError:
        return None


def cached_share_of(shards: ShardSet, ids: Ids) -> float | None:
    """The share of the bytes of these samples that is in memory; None if the kernel does not show it to this user."""
    rows = shards.index[ids]
    cached = pages = 0
    for number in np.unique(rows["shard"]):
        those = rows[rows["shard"] == number]
        offsets, sizes = those["offset"].astype(np.int64), those["size"].astype(np.int64)
        try:
            some, all_pages = cached_share_of_parts(shards.tars[number], offsets, sizes)
        except ValueError:
            return None
        cached, pages = cached + some, pages + all_pages
    return cached / pages if pages else 1.0


def probe_epoch(shards: ShardSet, settings: LoaderSettings, epoch: int = 0) -> StorageProbe:
    """Probes the storage near the samples that come last in an epoch. Call it first, while the set is cold."""
    return probe_storage(shards, order_of(shards, settings, epoch)[::-1])


def next_cached_share(shards: ShardSet, settings: LoaderSettings, epoch: int, step: int) -> float | None:
    """Share in memory of what a run reads next, from a step of an epoch on; None if the kernel does not show it."""
    return cached_share_of(shards, next_ids(shards, settings, epoch, step)[: NEXT_BATCHES * settings.batch])


def next_ids(shards: ShardSet, settings: LoaderSettings, epoch: int, step: int) -> Ids:
    """The samples that a run reads next, from a step of an epoch on to the end of the next epoch."""
    steps = steps_per_epoch(len(shards), settings.batch)
    epoch, step = epoch + step // steps, step % steps
    now, then = (order_of(shards, settings, number) for number in (epoch, epoch + 1))
    return np.concatenate([now[step * settings.batch : steps * settings.batch], then])


def drop_set(shards: ShardSet) -> None:
    """Drops the set from the page cache.

    Raises:
        ValueError: most of the set stays in memory.
    """
    drop_cache(shards.tars)
    share = known_cached_share(shards)
    if share is not None and share > MAX_COLD_SHARE:
        raise ValueError(
            f"{shards.folder}: {share:.0%} of it stays in memory when dropped; cold reads require a set on a disk that"
            " no other process reads"
        )
