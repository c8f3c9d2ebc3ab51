"""How fast iterators give batches: images per second and CPU time, rivals in turn so that they share the weather.

In comes a factory for each rival, which makes a fresh, endless iterator of batch sizes; out goes a `Rate` for each.
CPU time is that of this process and its children, which holds on a shared machine where the clock on the wall does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

import numpy as np
import psutil


@dataclass(frozen=True)
class Throughput:
    """Of a rival's windows: median, least and greatest img/s; median CPU milliseconds per image and cores in use; the
    img/s of each round, to compare with a rival's of the same round; and of the seconds that its batches
    took, the median and what one in a hundred exceeds."""

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
    """Measures every rival for a window of `seconds` in each of `rounds` rounds; `progress` counts windows.

    The first `discard` batches of a window do not count: choose as many as can be made ahead, since these were made
    while nobody looked. Iterators that can be closed are closed after their window.
    """
    windows: dict[str, list[_Window]] = {name: [] for name in factories}
    for _ in range(rounds):
        for name, factory in factories.items():
            windows[name].append(_measure(factory(), seconds, discard))
            progress(1)
    return {name: _rate(those) for name, those in windows.items()}


def lockstep_throughput(rates: Sequence[Throughput]) -> Throughput:
    """Of ranks that wait for one another at every step: the slowest one's rate, for each of them."""
    slowest, ranks = min(rates, key=lambda rate: rate.img_s), len(rates)
    return replace(
        slowest,
        img_s=ranks * slowest.img_s,
        img_s_min=ranks * slowest.img_s_min,
        img_s_max=ranks * slowest.img_s_max,
        cores_used=sum(rate.cores_used for rate in rates),
        rounds_img_s=tuple(ranks * img_s for img_s in slowest.rounds_img_s),
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
    """CPU seconds so far, user and system, of this process and each of its living children."""
    this = psutil.Process()
    seconds = {}
    for process in (this, *this.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue  # it ended between being listed and being asked
        seconds[process.pid] = times.user + times.system
    return seconds


def _rate(windows: list[_Window]) -> Throughput:
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
