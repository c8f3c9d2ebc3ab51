"""From the part of the stall to its likely cause: rules over measured evidence, the first that fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from pipeline.diagnosis.predict import Load

NEIGHBOURLY = 0.25  # of the cores: other processes that take more are a cause
BURSTY = 5.0  # times the median: a batch that takes longer is a burst
LARGE = 2.0  # times what a square of 256 has to be decoded for a crop: the usual picture of ImageNet has 1.4
STRAGGLING = 0.8  # of the fastest rank's supply: slower, and all ranks wait for that one
OWN_CORES = 0.3  # cores: a trainer that takes fewer hardly gets into the feed's way


@dataclass(frozen=True)
class Evidence:
    """What rules look at. `batch_s`: seconds of a batch of reading alone, the median and the 99th percentile;
    `rank_supplies`: img/s of every rank's own feed (none, where there is one rank)."""

    verdict: str
    load: Load
    batch_s: tuple[float, float] | None = None
    rank_supplies: Sequence[float] = ()


@dataclass(frozen=True)
class Cause:
    """A word for it, and the figures that speak for it."""

    name: str
    because: str


def cause_of(e: Evidence) -> Cause:
    """The likely cause of `e.verdict`."""
    if e.verdict == "compute-bound":
        return Cause("none", "the feed keeps up")
    if e.verdict == "unexplained":
        return Cause("callback", "the time passes between steps, neither in next() nor in the step")
    # Contention is a slow rank's doing only where its feed holds the others up: not where all are fast enough.
    held_up = e.verdict != "contention" or e.load.supply < e.load.demand
    if held_up and e.rank_supplies and min(e.rank_supplies) < STRAGGLING * max(e.rank_supplies):
        slow = min(range(len(e.rank_supplies)), key=lambda rank: e.rank_supplies[rank])
        others = median(rate for rank, rate in enumerate(e.rank_supplies) if rank != slow)
        return Cause("slow rank", f"rank {slow} is fed {e.rank_supplies[slow]:,.0f} img/s, the others {others:,.0f}")
    if e.verdict == "input-bound: storage":
        return _storage(e)
    in_the_way = min(e.load.threads, e.load.cores) > e.load.free or e.verdict == "contention"
    if in_the_way and e.load.neighbours > NEIGHBOURLY * e.load.cores:
        return Cause("neighbours", f"other processes take {e.load.neighbours:.1f} of {e.load.cores:g} cores")
    if e.verdict == "contention":
        return _contention(e)
    if e.verdict == "input-bound: transfer":
        return Cause("transfer", f"batches wait for the {'bus' if e.load.ranks == 1 else 'other halves, or the bus'}")
    if e.load.threads < e.load.cores:
        return Cause("few threads", f"{e.load.threads} on {e.load.cores:g} cores")
    if e.verdict == "input-bound: decode":
        if e.load.area > LARGE:
            return Cause("large pictures", f"{e.load.area:.1f} times as much to decode for a crop as in squares of 256")
        return Cause("few cores", f"decoding takes {1000 * e.load.decode_s:.2f} CPU ms an image")
    return Cause("augmentation", f"it takes {1000 * e.load.augment_s:.2f} CPU ms an image")


def _storage(e: Evidence) -> Cause:
    if e.batch_s:
        p50, p99 = e.batch_s
        if p99 > BURSTY * p50:
            return Cause("bursts", f"a batch is read in {1000 * p50:.0f} ms, one in a hundred in {1000 * p99:.0f}")
    slow = f"reading takes {1000 * e.load.storage_s:.2f} ms an image"
    if not e.load.cold:
        return Cause("slow storage", f"{slow}, and reading it again is no faster")
    if not e.load.fits:
        return Cause("slow storage", f"{slow}, and memory is too small for the set")
    return Cause("cold cache", f"{slow}, {1000 * e.load.warm_s:.2f} ms from memory, which has room for the set")


def _contention(e: Evidence) -> Cause:
    if e.load.trainer_s * e.load.demand > OWN_CORES:
        return Cause("shared cores", f"training takes {e.load.trainer_s * e.load.demand:.1f} of {e.load.cores:g} cores")
    return Cause("short queue", f"the feed is fast enough in the mean, but uneven; {e.load.queue_depth} batches ahead")
