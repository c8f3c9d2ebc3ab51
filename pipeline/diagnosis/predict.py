"""What a change would bring, by a simple model that is scaled to the measurements; the actions that follow, ranked.

    loader   = slowest_rank_ratio * min(threads, effective_cores) / loader_cpu_s
    supply   = 1 / (max(storage_s, 1 / loader) + transfer_s)
    together = min(1 / (1 / demand + between_s + uneven_wait_s), supply, free_cores / (loader_cpu_s + trainer_cpu_s))

All are img/s and the words are those of `Workload`. A prediction is the measured throughput times the model's ratio of
after and before, so whatever the model leaves out is assumed to stay in proportion. docs/stall-report.md lists its
limits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, Literal

from pipeline.diagnosis.causes import QUOTA_USED_SHARE, STRAGGLER_RATIO, Cause
from pipeline.diagnosis.workload import Workload

Change = Literal[
    "threads",
    "queue",
    "callback",
    "square",
    "memory",
    "memory limit",
    "disk",
    "reads",
    "transfer",
    "neighbours",
    "slow rank",
    "cores",
    "quota",
    "swap",
]
BATCH_END_LOSS = 0.12  # share of the time of many cores: threads wait for one another at the end of each batch
MIN_GAIN = 1.02  # predicted / measured: an action that gains less is not listed
LEADING_GAIN_SHARE = 0.25  # of the best gain: an action with this much may come before the best one
# Decoding a crop requires entropy decoding of all rows down to the crop's end, which goes with the image's area, and
# the rest (inverse transform, colour), which goes with the crop. CROP_DECODE_COST is the cost of the rest, in units of
# the former for a stored square of 256; measured on 500 photographs.
CROP_DECODE_COST = 1.25
EQUAL_RATIO = 1.1  # supply / demand: below it a faster step would soon wait for the loader
DEEPER_QUEUE = 4  # batches: what to try if a queue was too short
UNEVEN_WAIT_SHARE = 0.05  # of the time: from here on uneven waits are worth a deeper queue
NEIGHBOURS_WORTH_STOPPING = 0.1  # cores

# The changes that remove each cause. `ranked_actions` puts them first, so that report and cause never disagree.
REMEDIES: dict[str, tuple[Change, ...]] = {
    "none": (),
    "slow callback": ("callback",),
    "slow rank": ("slow rank",),
    "bursts": ("memory", "disk"),
    "network folder": ("memory", "disk", "reads"),
    "memory limit": ("memory limit",),
    "slow storage": ("disk",),
    "cold cache": ("memory",),
    "CPU quota": ("quota",),
    "swap": ("swap",),
    "slow launches": (),
    "noisy neighbours": ("neighbours",),
    "shared cores": ("cores",),
    "shared device": (),  # the model knows nothing of a GPU's work besides the demand
    "short queue": ("queue",),
    "slow transfer": ("transfer",),
    "few threads": ("threads",),
    "large images": ("square",),
    "few cores": ("cores",),
    "expensive augmentation": ("cores",),
}
STORAGE_CAUSES = ("network folder", "memory limit", "bursts", "slow storage", "cold cache")
LIMITS = {
    "storage": "reading",
    "loader": "the CPU time of decoding and augmenting",
    "transfer": "swapping halves between ranks",
    "trainer": "the training step",
    "shared cores": "the cores that loader and trainer share",
}


def effective_cores(cores: float) -> float:
    """Cores in use by more threads than cores: all of one core, less of several (measured: 1.88 of 2)."""
    return cores * (1 - BATCH_END_LOSS * (1 - 1 / max(1.0, cores)))


def resource_limits(load: Workload) -> dict[str, float]:
    """img/s that each resource allows by itself, lowest first: the first is the bottleneck, the second comes next."""
    cores = load.ranks * effective_cores(load.free_cores / load.ranks)
    found = {
        "loader": load.slowest_rank_ratio * min(load.threads, cores) / load.loader_cpu_s,
        "trainer": 1 / (1 / load.demand + load.between_s + load.uneven_wait_s),
    }
    if load.storage_s:
        found["storage"] = 1 / load.storage_s
    if load.transfer_s:
        found["transfer"] = 1 / load.transfer_s
    if load.trainer_cpu_s:
        found["shared cores"] = load.free_cores / (load.loader_cpu_s + load.trainer_cpu_s)
    return dict(sorted(found.items(), key=lambda item: item[1]))


def model_supply(load: Workload) -> float:
    """img/s of the loader alone by the model, not scaled to measurements."""
    limits = resource_limits(load)
    before_transfer = min(limits.get("storage", limits["loader"]), limits["loader"])
    return 1 / (1 / before_transfer + load.transfer_s) if load.transfer_s else before_transfer


def model_together(load: Workload) -> float:
    """img/s of the real run by the model, not scaled to measurements."""
    return min(*resource_limits(load).values(), model_supply(load))


def predicted_supply(before: Workload, after: Workload) -> float:
    """img/s of the loader alone once `before` has become `after`."""
    return before.supply * model_supply(after) / model_supply(before)


def predicted_together(before: Workload, after: Workload) -> float:
    """img/s of the real run once `before` has become `after`: at most the predicted supply and the demand."""
    scaled = before.together * model_together(after) / model_together(before)
    return min(scaled, predicted_supply(before, after), after.demand)


@dataclass(frozen=True)
class Action:
    """A change and what it is predicted to bring.

    Attributes:
        change: its kind.
        text: the change in words, as an instruction.
        settings: loader settings that make the change; empty if it takes more than settings.
        supply: predicted img/s of the loader alone.
        together: predicted img/s of the real run.
    """

    change: Change
    text: str
    settings: dict[str, Any]
    supply: float
    together: float

    def __str__(self) -> str:
        return f"{self.text}: predicted {self.together:,.0f} img/s (the loader alone {self.supply:,.0f})"


@dataclass(frozen=True)
class _Candidate:
    """A change that could be made: its kind, in words, the settings for it, and the workload after it."""

    change: Change
    text: str
    after: Workload
    settings: dict[str, Any] | None = None

    def predicted(self, before: Workload) -> Action:
        """The action, with its predictions."""
        supply, together = predicted_supply(before, self.after), predicted_together(before, self.after)
        return Action(self.change, self.text, self.settings or {}, supply, together)


def ranked_actions(load: Workload, cause: Cause) -> list[Action]:
    """The changes that are worth making, best first.

    Predicted throughput ranks them. Two kinds come before a better one if they bring a quarter of the best gain: first
    what removes the cause, then changes of settings, which cost nothing.
    """
    candidates = [*_loader_changes(load), *_storage_changes(load), *_resource_changes(load)]
    if cause.name in STORAGE_CAUSES:  # while the loader waits for storage, neighbours take nothing from it
        candidates = [candidate for candidate in candidates if candidate.change != "neighbours"]
    actions = [candidate.predicted(load) for candidate in candidates]
    worth = [action for action in actions if action.together >= MIN_GAIN * load.together]
    best = max((action.together for action in worth), default=load.together)
    leading = load.together + LEADING_GAIN_SHARE * (best - load.together)

    def rank(action: Action) -> tuple[bool, bool, float]:
        leads = action.together >= leading
        removes_cause = action.change in REMEDIES[cause.name]
        return (not (leads and removes_cause), not (leads and action.settings), -action.together)

    return sorted(worth, key=rank)


def _loader_changes(load: Workload) -> Iterator[_Candidate]:
    """Changes of the loader, of what is stored, and of the loop around it."""
    if load.threads < load.cores:
        threads = ceil(load.cores / load.ranks) + 1  # of a rank; one more keeps the cores busy at the end of a batch
        after = replace(load, threads=threads * load.ranks)
        yield _Candidate("threads", f"--threads {threads}", after, {"threads": threads})
    lacks_time = load.throttled or load.crowded or load.swapping  # then the queue is not what makes waits uneven
    if load.uneven_wait_s * load.together > UNEVEN_WAIT_SHARE and load.queue_depth < DEEPER_QUEUE and not lacks_time:
        waits_s = load.uneven_wait_s * load.queue_depth / DEEPER_QUEUE
        after = replace(load, uneven_wait_s=waits_s, queue_depth=DEEPER_QUEUE)
        yield _Candidate("queue", f"a queue of {DEEPER_QUEUE} batches", after, {"queue_depth": DEEPER_QUEUE})
    if load.between_s:
        yield _Candidate("callback", "take what runs between steps out of the loop", replace(load, between_s=0.0))
    if load.decode_area_ratio > 1:
        share = (1 + CROP_DECODE_COST) / (load.decode_area_ratio + CROP_DECODE_COST)
        after = replace(load, decode_cpu_s=load.decode_cpu_s * share)
        if not load.reads_wait_to_begin:  # then fewer bytes take less time
            after = replace(after, storage_s=load.storage_s * load.square_bytes_ratio)
        yield _Candidate("square", "shard with --stored square", after)


def _storage_changes(load: Workload) -> Iterator[_Candidate]:
    """Changes of where the set is read from."""
    if load.faster_from_memory and load.fits_in_memory:
        after = replace(load, storage_s=load.memory_read_s)
        yield _Candidate("memory", "read the set into memory first, it fits", after)
    elif load.storage_s:
        yield _Candidate("disk", _other_storage(load), replace(load, storage_s=0.0))
    if load.limit_hides_memory and load.faster_from_memory:
        text = "raise the container's memory limit, so that the set stays cached"
        yield _Candidate("memory limit", text, replace(load, storage_s=load.memory_read_s))
    if load.remote and load.reads_wait_to_begin:
        text = "more and larger reads at a time (NFS: nconnect, rsize; FUSE: max_background, max_read)"
        yield _Candidate("reads", text, replace(load, storage_s=load.bandwidth_s))


def _other_storage(load: Workload) -> str:
    if load.remote:
        return "copy the set to a local disk"
    return f"a faster disk{', or memory for the set' * load.faster_from_memory}"


def _resource_changes(load: Workload) -> Iterator[_Candidate]:
    """Changes of the machines."""
    if load.transfer_s:
        yield _Candidate("transfer", "a faster link between the ranks", replace(load, transfer_s=0.0))
    if load.slowest_rank_ratio < STRAGGLER_RATIO:
        text = f"find what slows down the loader of rank {load.slowest_rank}"
        # `storage_s` is the slowest rank's, since it was measured; the CPU's limit gets the ratio in the model.
        after = replace(load, rank_supplies=(), storage_s=load.storage_s * load.slowest_rank_ratio)
        yield _Candidate("slow rank", text, after)
    if load.neighbour_cores >= NEIGHBOURS_WORTH_STOPPING and not load.throttled:
        after = replace(load, neighbour_cores=0.0)
        if load.crowded:  # then waits are uneven because of the neighbours
            after = replace(after, uneven_wait_s=0.0)
        yield _Candidate("neighbours", "stop what else runs on these cores", after)
    if load.throttled:
        yield _without_quota(load)
        return  # more cores do not help below a quota
    if load.swapping:
        text = "free memory, or use fewer ranks or a smaller batch"
        yield _Candidate("swap", text, replace(load, uneven_wait_s=0.0, slower_step_s=0.0))
    lacking = max(1, ceil(load.demand * (load.loader_cpu_s + load.trainer_cpu_s) - load.free_cores))
    after = replace(load, cores=load.cores + lacking, threads=load.threads + lacking)
    threads = ceil(after.threads / load.ranks)
    yield _Candidate("cores", f"{lacking} more core{'s' * (lacking > 1)}, --threads {threads}", after)


def _without_quota(load: Workload) -> _Candidate:
    """All cores of the affinity instead of a quota's. A trainer that used up the quota gets faster as well.

    The job uses up its quota, so neighbours do not limit it yet; they would on the cores that it gains.
    """
    cores, threads = load.affinity_cores, ceil(load.affinity_cores / load.ranks) + 1
    after = replace(load, cores=cores, threads=max(load.threads, threads * load.ranks), uneven_wait_s=0.0)
    if load.trainer_cores > QUOTA_USED_SHARE * load.cores:
        after = replace(after, demand=load.demand * cores / load.cores)
    text = f"raise the container's CPU quota from {load.cores / load.hosts:g} to {cores / load.hosts:g} cores"
    if load.crowded:
        text, after = f"{text}, free of other processes", replace(after, neighbour_cores=0.0)
    return _Candidate("quota", f"{text}, --threads {threads}", after)


def advice(load: Workload, cause: Cause, actions: list[Action]) -> str:
    """The line under the verdict: the cause and the first action, or why no action helps. One line, no full stop."""
    ratio = load.supply / load.demand
    keeps_up = f"the loader supplies {ratio:.{1 if ratio >= EQUAL_RATIO else 2}f} times what the trainer consumes"
    if cause.name == "slow launches":
        return f"{keeps_up}; {cause.name}: launch fewer, larger kernels, or use a host with faster cores"
    if not actions:
        if cause.name == "none" and ratio < EQUAL_RATIO:
            return f"{keeps_up}: both are about equally fast, and a faster step alone would wait for the loader"
        if cause.name == "none":
            return f"{keeps_up}: only a faster training step trains faster"
        limit = next(iter(resource_limits(load)))
        return f"{cause.name}; no change is predicted to gain {MIN_GAIN - 1:.0%} or more, the limit is {LIMITS[limit]}"
    first = actions[0]
    gain = f"predicted {first.together:,.0f} img/s ({first.together / load.together - 1:+.0%})"
    if cause.name == "none":
        return f"{keeps_up}; first change: {first.text}, {gain}"
    if first.change not in REMEDIES[cause.name]:
        return f"{cause.name}, but another change gains most: {first.text}, {gain}"
    return f"{cause.name}; first change: {first.text}, {gain}"
