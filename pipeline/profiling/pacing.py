"""Windows of a given length, counted in batches: all ranks take the same number, by the slowest rank's clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from pipeline.profiling.cpu_time import CpuUse, cpu_mark
from pipeline.profiling.group import Group

PILOT_SHARE = 0.1  # of a window's length: from a pilot this long the batches of a window are computed
T = TypeVar("T")


class PacedWindows:
    """Windows of about `seconds`.

    Times are the slowest rank's, so all ranks compute the same numbers of batches from them.

    Args:
        seconds: length of a window.
        group: ranks that take windows together.
        clock: gives the time in seconds.

    Attributes:
        uses: CPU use of the windows, by name.
    """

    def __init__(self, seconds: float, group: Group, clock: Callable[[], float] = time.perf_counter) -> None:
        self._seconds, self._group, self._clock = seconds, group, clock
        self._batches_per_s = dict[str, float]()
        self.uses = dict[str, list[CpuUse]]()

    def pace(self, name: str, work: Callable[[int], object]) -> float:
        """Batches per second of `work` in its last window, or in a pilot before its first one."""
        if name not in self._batches_per_s:
            batches = 1
            while self._timed(work, batches)[0] < PILOT_SHARE * self._seconds:
                batches *= 2
            # Some of these may have been prefetched. They are used up now, so as many again show the real pace.
            self._batches_per_s[name] = batches / self._timed(work, batches)[0]
        return self._batches_per_s[name]

    def take(self, name: str, work: Callable[[int], T]) -> tuple[float, T]:
        """Takes one window: its seconds, and what `work` returned."""
        batches = max(1, round(self._seconds * self.pace(name, work)))
        mark = cpu_mark()
        elapsed_s, result = self._timed(work, batches)
        self.uses.setdefault(name, []).append(mark.until(cpu_mark()))
        self._batches_per_s[name] = batches / elapsed_s
        return elapsed_s, result

    def throughput(self, name: str, work: Callable[[int], int]) -> float:
        """img/s of one window of `work`, which returns the number of its images."""
        elapsed_s, images = self.take(name, work)
        return images / elapsed_s

    def use(self, name: str) -> CpuUse:
        """CPU use of all windows of this name together."""
        first, *others = self.uses[name]
        return sum(others, first)

    def _timed(self, work: Callable[[int], T], batches: int) -> tuple[float, T]:
        self._group.largest(0)  # a barrier: all ranks start together
        started_s = self._clock()
        result = work(batches)
        return self._group.largest(max(1, round(1e9 * (self._clock() - started_s)))) / 1e9, result
