"""Throughput of iterators that give batches: images per second and CPU time.

`measure_throughput` takes a factory for each candidate, which makes a fresh, endless iterator of batch sizes, and gives
a `Throughput` for each. Candidates are measured in turn, so that background load affects all of them equally. CPU time
is that of this process and its children; on a shared machine it is steadier than wall-clock time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import pairwise
from statistics import median

import numpy as np
import psutil

from pipeline.profiling.group import Group


@dataclass(frozen=True)
class Throughput:
    """What a candidate's windows gave.

    Attributes:
        img_s: median img/s of the windows.
        img_s_min: lowest img/s of a window.
        img_s_max: highest img/s of a window.
        cpu_ms_per_img: median CPU milliseconds per image.
        cores_used: median number of cores in use.
        rounds_img_s: img/s of each round, to compare with another candidate in the same round.
        batch_p50_s: median seconds of a batch.
        batch_p99_s: 99th percentile of the seconds of a batch.
    """

    img_s: float
    img_s_min: float
    img_s_max: float
    cpu_ms_per_img: float
    cores_used: float
    rounds_img_s: tuple[float, ...]
    batch_p50_s: float
    batch_p99_s: float


@dataclass(frozen=True)
class _Window:
    images: int
    wall_s: float
    cpu_s: float
    batches_s: list[float]


def measure_throughput(
    factories: Mapping[str, Callable[[], Iterator[int]]],
    seconds: float,
    rounds: int,
    progress: Callable[[int], None] = lambda _: None,
    discard: int = 3,
) -> dict[str, Throughput]:
    """Measures every candidate for one window in each round.

    Args:
        factories: makes a fresh iterator of batch sizes, by candidate. It is closed after its window if it can be.
        seconds: length of a window.
        rounds: number of rounds.
        progress: called with 1 after each window.
        discard: batches at the start of a window that do not count. Choose as many as can be prefetched, because those
            were made before the clock started.

    Returns:
        The throughput of each candidate, by name.
    """
    windows: dict[str, list[_Window]] = {name: [] for name in factories}
    for _ in range(rounds):
        for name, factory in factories.items():
            windows[name].append(_measure(factory(), seconds, discard))
            progress(1)
    return {name: _summary(measured) for name, measured in windows.items()}


def throughput_by_rank(here: Throughput, group: Group) -> list[Throughput]:
    """Every rank's throughput in the order of ranks, on all ranks. `here` is this rank's."""
    *figures, rounds_img_s, p50_s, p99_s = astuple(here)
    return [_from_row(row) for row in group.gather([*figures, p50_s, p99_s, *rounds_img_s])]


def _from_row(row: Sequence[float]) -> Throughput:
    img_s, lowest, highest, cpu_ms, cores_used, p50_s, p99_s, *rounds_img_s = row
    return Throughput(img_s, lowest, highest, cpu_ms, cores_used, tuple(rounds_img_s), p50_s, p99_s)


def lockstep_throughput(ranks: Sequence[Throughput]) -> Throughput:
    """The throughput of ranks that wait for one another at every step: the slowest rank's, times their number."""
    slowest, number = min(ranks, key=lambda rank: rank.img_s), len(ranks)
    return replace(
        slowest,
        img_s=number * slowest.img_s,
        img_s_min=number * slowest.img_s_min,
        img_s_max=number * slowest.img_s_max,
        cores_used=sum(rank.cores_used for rank in ranks),
        rounds_img_s=tuple(number * img_s for img_s in slowest.rounds_img_s),
    )


def _measure(sizes: Iterator[int], seconds: float, discard: int) -> _Window:
    try:
        for _ in range(discard):
            next(sizes)
        images, cpu_s, ends_s = 0, _cpu_by_process(), [time.perf_counter()]
        while (wall_s := ends_s[-1] - ends_s[0]) < seconds:
            images += next(sizes)
            ends_s.append(time.perf_counter())
        used_s = sum(now_s - cpu_s.get(pid, 0.0) for pid, now_s in _cpu_by_process().items())
        return _Window(images, wall_s, used_s, [end_s - start_s for start_s, end_s in pairwise(ends_s)])
    finally:
        if close := getattr(sizes, "close", None):
            close()


def _cpu_by_process() -> dict[int, float]:
    """CPU seconds so far, user and system, of this process and each of its living children, by process id."""
    this = psutil.Process()
    seconds = {}
    for process in (this, *this.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue  # the process ended after it was listed
        seconds[process.pid] = times.user + times.system
    return seconds


def _summary(windows: list[_Window]) -> Throughput:
    p50_s, p99_s = np.percentile([s for window in windows for s in window.batches_s], [50, 99]).tolist()
    per_s = [window.images / window.wall_s for window in windows]
    return Throughput(
        img_s=median(per_s),
        img_s_min=min(per_s),
        img_s_max=max(per_s),
        cpu_ms_per_img=median(1000 * window.cpu_s / window.images for window in windows),
        cores_used=median(window.cpu_s / window.wall_s for window in windows),
        rounds_img_s=tuple(per_s),
        batch_p50_s=p50_s,
        batch_p99_s=p99_s,
    )
