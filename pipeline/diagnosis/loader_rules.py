"""What limits a loader of any make, and what to change: rules over CPU use, in the terms of torch's DataLoader.

The loader on trial cannot be cut short after reading or decoding, so the CPU says what its time is spent on: a worker
that waits for storage, a network or a lock uses no CPU, a worker that decodes uses a whole core.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

BUSY_SHARE = 0.5  # of a worker's time on a CPU: from here on its work is the limit, below it what it waits for
FULL_SHARE = 0.85  # of cores: from here on none is left
RESTART_SHARE = 0.1  # of the loader's time between epochs: from here on the end of an epoch is the limit
RESERVE = 1.1  # a loader should supply this much more than the demand
LIMITS = {
    "epoch ends": "epoch ends",
    "cores": "CPU work",
    "neighbours": "CPU work",
    "main process": "CPU work",
    "one process": "CPU work",
    "few workers": "CPU work",
    "waiting": "waiting",
}
"""For each cause, the part of the stall in which it shows."""


@dataclass(frozen=True)
class LoaderFacts:
    """What a loader says about itself. None: it does not say.

    Attributes:
        kind: its class.
        num_workers: worker processes; 0 if it works in the main process.
        prefetch_factor: batches that each worker prepares ahead.
        pin_memory: whether batches are copied into pinned memory.
        persistent_workers: whether workers live on at the end of an epoch.
    """

    kind: str
    num_workers: int | None = None
    prefetch_factor: int | None = None
    pin_memory: bool | None = None
    persistent_workers: bool | None = None

    @property
    def prefetched(self) -> int:
        """Batches that may be made before they are asked for."""
        workers = 4 if self.num_workers is None else self.num_workers
        return workers * (self.prefetch_factor or 2) + 1


def facts_of(loader: object) -> LoaderFacts:
    """The settings of a torch DataLoader, of a webdataset.WebLoader and of wrappers that hold one."""
    kind, found = f"{type(loader).__module__}.{type(loader).__qualname__}", loader
    for inner in _inside(loader):
        if isinstance(getattr(inner, "num_workers", None), int):
            found = inner
            break
    names = ("num_workers", "prefetch_factor", "pin_memory", "persistent_workers")
    values: dict[str, Any] = {name: getattr(found, name, None) for name in names}
    known: dict[str, Any] = {name: v for name, v in values.items() if isinstance(v, int)}  # a bool is an int
    return LoaderFacts(kind, **known)


def _inside(loader: object) -> Iterator[object]:
    yield loader
    for name in ("dataloader", "loader", "base_dataloader"):
        if (inner := getattr(loader, name, None)) is not None:
            yield inner
    stages = getattr(loader, "pipeline", None)  # webdataset
    if isinstance(stages, list):
        yield from stages


@dataclass(frozen=True)
class LoaderEvidence:
    """What the rules look at. Cores are means over the windows of the loader alone, unless a name says otherwise.

    Attributes:
        supply: img/s of the loader alone.
        demand: img/s of the trainer.
        facts: the loader's own settings.
        cores: cores that this process may use.
        workers: worker processes.
        worker_cores: cores that they use.
        main_cores: cores that the main thread uses.
        thread_cores: cores that the main process's other threads use.
        neighbour_cores: cores that processes outside this job use.
        trainer_cores: cores that the trainer uses on replayed batches.
        restart_share: share of the loader's time that starting its epochs adds.
        delay_ratio: seconds that its processes waited for a core for each of their CPU seconds; None if unknown.
    """

    supply: float
    demand: float
    facts: LoaderFacts
    cores: float
    workers: int
    worker_cores: float
    main_cores: float
    thread_cores: float
    neighbour_cores: float
    trainer_cores: float
    restart_share: float
    delay_ratio: float | None = None

    @property
    def loader_cores(self) -> float:
        """Cores that the loader uses alone."""
        return self.worker_cores + self.main_cores + self.thread_cores

    @property
    def busy_share(self) -> float:
        """Share of the time, 0 to 1, for which the loader's workers, or without workers its process, compute or wait
        for a core to compute on."""
        wanted = 1 + (self.delay_ratio or 0.0)
        if not self.workers:
            return min(1.0, wanted * (self.main_cores + self.thread_cores))
        # Without the kernel's word on waiting for cores, workers that are more than cores cannot all compute.
        most = min(self.workers, self.cores) if self.delay_ratio is None else self.workers
        return min(1.0, wanted * self.worker_cores / most)

    @property
    def cpu_ms(self) -> float:
        """CPU milliseconds of an image."""
        return 1000 * self.loader_cores / self.supply


@dataclass(frozen=True)
class LoaderCause:
    """What limits the loader.

    Attributes:
        name: a key of `LIMITS`.
        because: the figures that show it.
    """

    name: str
    because: str


def cause_of_slow_loader(e: LoaderEvidence) -> LoaderCause:
    """What limits a loader that is slower than its trainer; the first rule that fits decides."""
    full = e.loader_cores + e.neighbour_cores >= FULL_SHARE * e.cores
    if full and e.neighbour_cores > e.loader_cores and (e.delay_ratio is None or e.busy_share >= BUSY_SHARE):
        return LoaderCause("neighbours", f"other processes use {e.neighbour_cores:.1f} of {e.cores:g} cores")
    if e.restart_share >= RESTART_SHARE:
        return LoaderCause("epoch ends", f"starting the next epoch takes {e.restart_share:.0%} of the loader's time")
    if full and e.loader_cores > e.neighbour_cores:
        return LoaderCause("cores", f"the loader uses {e.loader_cores:.1f} of {e.cores:g} cores")
    if e.workers and e.main_cores >= FULL_SHARE:
        return LoaderCause("main process", f"its thread is busy for {e.main_cores:.0%} of the time, beside the workers")
    if e.busy_share < BUSY_SHARE:
        of = f"its {e.workers} worker processes compute" if e.workers else "its process computes"
        return LoaderCause("waiting", f"{of} for {e.busy_share:.0%} of the time and wait for the rest")
    if e.workers:
        busy = f"{e.workers} worker process{'es' * (e.workers > 1)} compute for {e.busy_share:.0%} of the time"
        return LoaderCause("few workers", f"{busy}, and {e.cores - e.loader_cores:.1f} of {e.cores:g} cores are idle")
    return LoaderCause("one process", f"it computes for {e.busy_share:.0%} of the time, without worker processes")


@dataclass(frozen=True)
class LoaderAction:
    """A change of the loader.

    Attributes:
        what: in the loader's own terms.
        img_s: img/s together with the trainer that it would give; None if that cannot be computed.
    """

    what: str
    img_s: float | None = None

    def __str__(self) -> str:
        return self.what if self.img_s is None else f"{self.what}: about {self.img_s:,.0f} img/s"


def actions_for(cause: LoaderCause, e: LoaderEvidence) -> list[LoaderAction]:
    """What to change against a slow loader, the most promising change first."""
    if cause.name == "epoch ends":
        faster = e.supply / (1 - min(e.restart_share, 0.99))
        endless = "let the loader repeat without end"
        kept = f"persistent_workers=True, or {endless}"
        starts_workers = e.workers > 0 and e.facts.persistent_workers is False
        return [LoaderAction(kept if starts_workers else endless, min(faster, e.demand))]
    if cause.name == "neighbours":
        return [LoaderAction("end the other processes, or give this job cores of its own")]
    if cause.name == "cores":
        return [_cheaper(e), LoaderAction("give the job more cores")]
    if cause.name == "main process":
        whole = (
            "make whole batches as tensors in the workers (collate_fn), so that the main process only passes them on"
        )
        pinned = [LoaderAction("pin_memory=False, which copies each batch once more")] * bool(e.facts.pin_memory)
        return [LoaderAction(whole), *pinned]
    more = _more_workers(cause, e)
    if cause.name == "waiting":
        return [more, LoaderAction("read from a faster or local disk, in fewer and larger reads (shards)")]
    return [more, _cheaper(e)]


def _more_workers(cause: LoaderCause, e: LoaderEvidence) -> LoaderAction:
    """As many workers as the demand requires. Workers that wait may be more than there are cores."""
    now = max(1, e.workers)
    required = ceil(RESERVE * now * e.demand / e.supply)
    most_img_s = FULL_SHARE * e.cores / (e.cpu_ms / 1000) if e.cpu_ms else e.demand
    useful = max(1, ceil(now * most_img_s / e.supply))
    number = max(min(required, useful), now + (e.workers > 0))
    img_s = min(e.supply * number / now, most_img_s, e.demand)
    name = "worker processes: " if e.facts.num_workers is None else "num_workers="
    return LoaderAction(f"{name}{number} (now {e.workers})", img_s)


def _cheaper(e: LoaderEvidence) -> LoaderAction:
    """How much CPU time an image may cost."""
    allowed_ms = 1000 * max(0.0, e.cores - e.trainer_cores) / e.demand
    how = "decode smaller stored images, with libjpeg-turbo, or augment on the GPU"
    return LoaderAction(f"{how}: an image takes {e.cpu_ms:.2f} CPU ms, and the demand allows {allowed_ms:.2f}")


def contention_of(e: LoaderEvidence) -> tuple[LoaderCause, list[LoaderAction]]:
    """Why a loader that is fast enough alone keeps its trainer waiting, and what to change."""
    image_s, queue = e.cpu_ms / 1000 + e.trainer_cores / e.demand, e.facts.prefetch_factor
    free, best = max(0.0, e.cores - e.neighbour_cores), min(e.supply, e.demand)
    if e.workers == 0 and e.main_cores >= e.thread_cores:
        because = "the loader works in the main process, only while the trainer does not"
        ahead = "make batches ahead, in a process or thread of their own"
        change = ahead if e.facts.num_workers is None else "num_workers=1 (now 0)"
        return LoaderCause("no prefetch", because), [
            LoaderAction(change, min(best, free / image_s) if image_s else best)
        ]
    if best * image_s >= FULL_SHARE * free:
        if e.neighbour_cores > best * image_s:
            because = f"other processes use {e.neighbour_cores:.1f} of {e.cores:g} cores"
            return LoaderCause("neighbours", because), actions_for(LoaderCause("neighbours", because), e)
        because = f"loader and trainer need {best * image_s:.1f} of {free:.1f} free cores"
        return LoaderCause("shared cores", because), [_cheaper(e), LoaderAction("give the job more cores")]
    deeper = f"prefetch_factor={2 * queue} (now {queue})" if queue else "a longer queue of batches"
    because = "the loader is fast enough on average, but uneven"
    return LoaderCause("short queue", because), [LoaderAction(deeper, best)]
