"""The feed alone, cut short after each stage: how fast it is as the page cache stands, cold, and from memory.

Every window begins at another place of the set, or it would find in memory what the window before it has read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any, get_args

import numpy as np

from pipeline.loader.graphs import Stage
from pipeline.loader.loader import stage_batch_sizes
from pipeline.loader.order import steps_per_epoch
from pipeline.loader.settings import LoaderSettings
from pipeline.profiling.page_cache import cached_share, drop_cache
from pipeline.profiling.throughput import Throughput, measure_throughput
from pipeline.rgb_pca import Eigenbasis
from pipeline.shards.reader import ShardSet

ROUNDS = 3
REREAD = 2  # batches that are read over and over: the fewest that are not one


@dataclass(frozen=True)
class StageThroughput:
    """`read`, `decode` (reading, too) and `full` (all of it); `reread` is reading the same few batches again and again,
    from memory if the kernel keeps anything there. Before the first window `cached` of the set, 0 to 1, was in memory
    (None: the kernel does not say it to us). The set has `set_bytes`."""

    read: Throughput
    decode: Throughput
    full: Throughput
    reread: Throughput
    cached: float | None
    set_bytes: int

    def each(self, change: Callable[[Throughput], Throughput]) -> StageThroughput:
        """With every rate changed."""
        read, decode, full, reread = (change(rate) for rate in (self.read, self.decode, self.full, self.reread))
        return replace(self, read=read, decode=decode, full=full, reread=reread)

    @property
    def storage(self) -> dict[str, Any]:
        """What tells cold from warm, for reports."""
        rates = {"read": self.read.img_s, "reread": self.reread.img_s}
        return {"set_bytes": self.set_bytes, "cached": self.cached, **rates}


def storage_in_words(storage: dict[str, Any]) -> str:
    """How cold the set was, and what that costs, on one line."""
    share = "an unknown share" if storage["cached"] is None else f"{storage['cached']:.0%}"
    return (
        f"{share} of {storage['set_bytes'] / 2**20:,.0f} MiB was in memory; read at {storage['read']:,.0f} img/s,"
        f" from memory at {storage['reread']:,.0f}"
    )


def measure_stages(
    shards: ShardSet,
    basis: Eigenbasis,
    settings: LoaderSettings,
    seconds: float,
    rounds: int = ROUNDS,
    progress: Callable[[int], None] = lambda n: None,
    cold: bool = False,
) -> StageThroughput:
    """Measures all stages in turn, in windows of `seconds`; `progress` counts them, `windows(rounds)` in all.

    `cold` has the kernel forget the set before each window but those of `reread`. On a file system that forgets
    nothing, as in memory, that changes nothing: ValueError.
    """
    cached = known_share(shards)
    if cold:
        forget(shards)
    stages = get_args(Stage)
    steps, windows_done = steps_per_epoch(len(shards), settings.batch), count()

    def feed(stage: Stage) -> Iterator[int]:
        if cold:
            forget(shards)
        start = next(windows_done) * steps // (rounds * len(stages))
        return stage_batch_sizes(shards, basis, settings, stage, start)

    def feed_few() -> Iterator[int]:
        few = shards.part(np.arange(min(len(shards), REREAD * settings.batch)))
        return stage_batch_sizes(few, basis, settings, "read")

    feeds: dict[str, Callable[[], Iterator[int]]] = {stage: partial(feed, stage) for stage in stages}
    feeds["reread"] = feed_few
    assert settings.prefetched_batches > REREAD
    rates = measure_throughput(feeds, seconds, rounds, progress, settings.prefetched_batches)
    return StageThroughput(**rates, cached=cached, set_bytes=sum(tar.stat().st_size for tar in shards.tars))


def windows(rounds: int = ROUNDS) -> int:
    """How many windows `measure_stages` has."""
    return rounds * (len(get_args(Stage)) + 1)


def known_share(shards: ShardSet) -> float | None:
    """The share of the set that is in memory; None where only its owner may know."""
    try:
        return cached_share(shards.tars)
    except ValueError:
        return None


def forget(shards: ShardSet) -> None:
    """Has the kernel forget the set; ValueError where most of it stays in memory."""
    shards.unmap()  # the kernel keeps what is mapped
    drop_cache(shards.tars)
    share = known_share(shards)
    if share is not None and share > 0.5:
        raise ValueError(
            f"{shards.folder}: {share:.0%} of it stays in memory when dropped; cold reads want a set on a real disk "
            "that no other process reads"
        )
