"""From the verdict to its likely cause: rules over measured evidence; the first that fits decides.

A cause has a name and the figures that show it. `predict` takes the actions against it from there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.diagnosis.workload import Workload
from pipeline.host import Host, Pressure
from pipeline.profiling.storage_probe import StorageProbe

BURST_RATIO = 5.0  # 99th percentile over median of the time of reading a batch: from here on reads come in bursts
LARGE_IMAGE_AREA_RATIO = 2.0  # `decode_area_ratio`; ImageNet's images with a short side of 256 have 1.4
STRAGGLER_RATIO = 0.8  # `slowest_rank_ratio`: below it all ranks wait for the slowest one
SLOW_LAUNCH_SHARE = 0.9  # of a step's time: from here on the device waits for the host's launches
QUOTA_USED_SHARE = 0.8  # of the quota: a trainer that uses more is slowed down by it


@dataclass(frozen=True)
class Evidence:
    """What the rules look at.

    Attributes:
        verdict: the verdict to explain.
        workload: costs and resources.
        read_batch_s: median and 99th percentile of the seconds of reading a batch, the loader cut short after reading.
        probe: the file system of the set, and what a read of it costs.
        host: cores and memory that the job may use.
        pressure: what the kernel counted while loader and trainer worked.
        set_bytes: bytes of the set.
    """

    verdict: str
    workload: Workload
    read_batch_s: tuple[float, float] | None = None
    probe: StorageProbe | None = None
    host: Host | None = None
    pressure: Pressure = field(default_factory=Pressure)
    set_bytes: int = 0


@dataclass(frozen=True)
class Cause:
    """The likely cause of a stall.

    Attributes:
        name: a short name, as in the table of docs/stall-report.md.
        because: the figures that show it.
    """

    name: str
    because: str


def cause_of(evidence: Evidence) -> Cause:
    """The likely cause of `evidence.verdict`."""
    verdict, load = evidence.verdict, evidence.workload
    if verdict == "compute-bound":
        return _compute(evidence)
    if verdict == "unexplained":
        return Cause("slow callback", "time passes between steps, neither in next() nor in the training step")
    if is_held_up_by_a_rank(verdict, load):
        slow = f"rank {load.slowest_rank}'s loader supplies {load.rank_supplies[load.slowest_rank]:,.0f} img/s"
        return Cause("slow rank", f"{slow}, those of the others {load.other_ranks_supply:,.0f}")
    if verdict == "input-bound: storage":
        return _storage(evidence)
    if load.throttled:
        return _quota(evidence)
    if load.swapping and verdict == "contention":
        return Cause("swap", f"{evidence.pressure.swapped_in_bytes / 2**20:,.0f} MiB were read from swap meanwhile")
    short_of_cores = min(load.threads, load.cores) > load.free_cores or verdict == "contention"
    if short_of_cores and load.crowded:
        taken = f"{load.neighbour_cores:.1f} of {load.shared_cores:g} cores"
        return Cause("noisy neighbours", f"processes outside this job use {taken}")
    if verdict == "contention":
        return _contention(load)
    if verdict == "input-bound: transfer":
        return Cause("slow transfer", f"swapping halves between ranks takes {1000 * load.transfer_s:.2f} ms an image")
    if load.threads < load.cores:
        return Cause("few threads", f"the loader has {load.threads} threads on {load.cores:g} cores")
    if verdict == "input-bound: decode":
        return _decode(load)
    return Cause("expensive augmentation", f"augmentation takes {1000 * load.augment_cpu_s:.2f} CPU ms an image")


def is_held_up_by_a_rank(verdict: str, load: Workload) -> bool:
    """Whether all ranks wait for the loader of one. With contention: only if the loaders are too slow at all."""
    too_slow = verdict != "contention" or load.supply < load.demand
    return too_slow and load.slowest_rank_ratio < STRAGGLER_RATIO


def _compute(evidence: Evidence) -> Cause:
    load = evidence.workload
    if load.launch_s > SLOW_LAUNCH_SHARE / load.demand:
        took = f"{load.launch_s * load.demand:.0%} of a step's time"
        return Cause("slow launches", f"the host takes {took} to launch the step, and the device waits for it")
    if load.throttled and load.trainer_cores > QUOTA_USED_SHARE * load.cores:
        return _quota(evidence)
    return Cause("none", "the loader keeps up with the trainer")


def _quota(evidence: Evidence) -> Cause:
    load, pressure = evidence.workload, evidence.pressure
    allowed = f"the container may use {load.cores:g} of {load.shared_cores:g} cores"
    throttled = f"it was throttled in {load.throttled_share:.0%} of the quota's periods"
    seconds = f", {pressure.throttled_s:.1f} s in {pressure.wall_s:.1f} s" if pressure.throttled_s else ""
    return Cause("CPU quota", f"{allowed} (CPU quota); {throttled}{seconds}")


def _storage(evidence: Evidence) -> Cause:
    load, probe = evidence.workload, evidence.probe
    slow = f"reading takes {1000 * load.storage_s:.2f} ms an image"
    if probe is not None and probe.remote and load.faster_from_memory:
        return Cause("network folder", f"{probe}; {slow}")
    if evidence.read_batch_s is not None:
        p50_s, p99_s = evidence.read_batch_s
        if p99_s > BURST_RATIO * p50_s:
            usual = f"reading a batch takes {1000 * p50_s:.0f} ms (median)"
            return Cause("bursts", f"{usual}, but {1000 * p99_s:.0f} ms for one in a hundred")
    on = f"; {probe}" if probe is not None and probe.latency_s is not None else ""
    if not load.faster_from_memory:
        return Cause("slow storage", f"{slow}, and reading it again is no faster{on}")
    if load.fits_in_memory:
        memory = f"{1000 * load.memory_read_s:.2f} ms from memory, and the set fits there"
        return Cause("cold cache", f"{slow}, but {memory}{on}")
    if load.limit_hides_memory and evidence.host is not None:
        may = f"the set has {evidence.set_bytes / 2**30:.2f} GiB, and the container may use"
        left = f"{evidence.host.available_bytes / 2**30:.2f} GiB more of its limit of"
        return Cause("memory limit", f"{slow}; {may} {left} {(evidence.host.limit_bytes or 0) / 2**30:.2f}")
    return Cause("slow storage", f"{slow}, and memory is too small for the set{on}")


def _contention(load: Workload) -> Cause:
    if load.trainer_slows_loader:
        return Cause("shared cores", f"the trainer uses {load.trainer_cores:.1f} of {load.cores:g} cores")
    if load.asynchronous and load.slower_step_s > load.uneven_wait_s:
        longer = f"{load.slower_step_s * load.demand:.0%} longer"
        return Cause("shared device", f"a step takes {longer} beside the loader than on replayed batches")
    queue = f"a queue of {load.queue_depth} batches"
    return Cause("short queue", f"the loader is fast enough on average, but uneven, with {queue}")


def _decode(load: Workload) -> Cause:
    if load.decode_area_ratio > LARGE_IMAGE_AREA_RATIO:
        times = f"{load.decode_area_ratio:.1f} times as much"
        return Cause("large images", f"a crop requires decoding {times} as one of a stored square of 256")
    return Cause("few cores", f"decoding takes {1000 * load.decode_cpu_s:.2f} CPU ms an image")
