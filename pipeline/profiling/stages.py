"""The loader alone, cut short after each stage: as the page cache is, cold, and from memory.

Every window starts at another step of the epoch. Otherwise a window would find in memory what the window before it has
read, and the disk would look faster than it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any, get_args

import numpy as np

from pipeline.loader.loader import stage_batch_sizes
from pipeline.loader.order import steps_per_epoch
from pipeline.loader.settings import LoaderSettings, Stage
from pipeline.profiling.group import SINGLE_PROCESS, Group
from pipeline.profiling.page_cache import cached_share, drop_cache
from pipeline.profiling.throughput import Throughput, lockstep_throughput, measure_throughput, throughput_by_rank
from pipeline.rgb_pca import Eigenbasis
from pipeline.shards.reader import ShardSet

STAGE_ROUNDS = 3
REREAD_BATCHES = 2  # batches that are read again and again: more than one, and few enough to stay in memory
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
    """

    read: Throughput
    decode: Throughput
    full: Throughput
    reread: Throughput
    cached_share: float | None
    set_bytes: int

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
        }


def format_storage(storage: dict[str, Any]) -> str:
    """`StageThroughput.storage` as one line of text."""
    share = "an unknown share" if storage["cached_share"] is None else f"{storage['cached_share']:.0%}"
    return (
        f"{share} of {storage['set_bytes'] / 2**20:,.0f} MiB was in memory; read at {storage['read_img_s']:,.0f} img/s,"
        f" from memory at {storage['memory_img_s']:,.0f}"
    )


def measure_stages(
    shards: ShardSet,
    basis: Eigenbasis,
    settings: LoaderSettings,
    seconds: float,
    rounds: int = STAGE_ROUNDS,
    progress: Callable[[int], None] = lambda n: None,
    cold: bool = False,
    group: Group = SINGLE_PROCESS,
) -> StageThroughput:
    """Measures all stages of this process's loader in turn.

    Args:
        shards: the shard set.
        basis: its eigenbasis.
        settings: of this process's loader, with its share of the batch and its own seed.
        seconds: length of a window.
        rounds: windows of each stage.
        progress: called with 1 after each window; there are `stage_windows(rounds)`.
        cold: drop the set from the page cache before each window of a stage.
        group: ranks that measure at the same time; all start together.

    Returns:
        The stages of this process. `StageThroughput.over_ranks` gives those of all ranks.

    Raises:
        ValueError: `cold`, but the set stays in memory (a file system in memory, or another process reads it).
    """
    group.largest(0)  # a barrier
    cached = known_cached_share(shards)
    if cold:
        drop_set(shards)
    stages, steps, windows_done = get_args(Stage), steps_per_epoch(len(shards), settings.batch), count()

    def sizes(stage: Stage) -> Iterator[int]:
        if cold:
            drop_set(shards)
        start = next(windows_done) * steps // (rounds * len(stages))
        return stage_batch_sizes(shards, basis, settings, stage, start)

    def reread_sizes() -> Iterator[int]:
        few = shards.part(np.arange(min(len(shards), REREAD_BATCHES * settings.batch)))
        return stage_batch_sizes(few, basis, settings, "read")

    factories: dict[str, Callable[[], Iterator[int]]] = {stage: partial(sizes, stage) for stage in stages}
    factories["reread"] = reread_sizes
    assert settings.prefetched_batches > REREAD_BATCHES  # so that discarded batches have read all of them once
    measured = measure_throughput(factories, seconds, rounds, progress, settings.prefetched_batches)
    return StageThroughput(**measured, cached_share=cached, set_bytes=sum(tar.stat().st_size for tar in shards.tars))


def stage_windows(rounds: int = STAGE_ROUNDS) -> int:
    """Number of windows that `measure_stages` takes."""
    return rounds * (len(get_args(Stage)) + 1)


def known_cached_share(shards: ShardSet) -> float | None:
    """The share of the set that is in memory; None if the kernel does not show it to this user."""
    try:
        return cached_share(shards.tars)
    except ValueError:
        return None


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
