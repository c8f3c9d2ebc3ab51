"""CPU use and pressure during a run, read every few seconds, so that the run can be compared with later measurements.

A run may be slow because of something that is over when its report is made: another job on the same cores, a cold page
cache, a CPU quota. Reading the counters takes milliseconds, so they are read seldom, and less often the longer a run
takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise

from pipeline.profiling.cpu_time import CpuMark, CpuUse, cpu_mark

INTERVAL_S = 10.0  # between two readings at the start of a run
MAX_MARKS = 200  # with more, every second one is dropped and the interval doubles


class RunMarks:
    """Readings of `cpu_mark` during a run.

    Args:
        interval_s: seconds between two readings.
        mark: reads the counters.

    Attributes:
        spent_s: seconds that reading took so far.
    """

    def __init__(self, interval_s: float = INTERVAL_S, mark: Callable[[], CpuMark] = cpu_mark) -> None:
        self._interval_s, self._mark = interval_s, mark
        self._marks = list[tuple[int, CpuMark]]()
        self._next_s = self.spent_s = 0.0

    def after_step(self, steps: int, now_s: float) -> None:
        """Reads the counters if it is time to.

        Args:
            steps: counted steps so far.
            now_s: seconds since the run began.
        """
        if self._marks and now_s < self._next_s:
            return
        self.read(steps)
        self._next_s = now_s + self._interval_s

    def read(self, steps: int) -> None:
        """Reads the counters now: at the end of a run, after `steps` counted steps."""
        began_s = time.perf_counter()
        self._marks.append((steps, self._mark()))
        self.spent_s += time.perf_counter() - began_s
        if len(self._marks) > MAX_MARKS:
            self._marks = self._marks[::2]
            self._interval_s *= 2

    def use(self, first: int, end: int) -> CpuUse | None:
        """CPU use of the intervals that lie mostly within the steps `first` to `end`, or overlap most; None if none.

        Args:
            first: counted steps before it.
            end: counted steps at its end.
        """
        pairs = [pair for pair in pairwise(self._marks) if pair[1][0] > pair[0][0]]
        if not pairs:
            return None

        def overlap(pair: tuple[tuple[int, CpuMark], tuple[int, CpuMark]]) -> float:
            (start, _), (stop, _) = pair
            return max(0, min(end, stop) - max(first, start)) / (stop - start)

        chosen = [pair for pair in pairs if overlap(pair) > 0.5] or [max(pairs, key=overlap)]
        one, *others = [before.until(after) for (_, before), (_, after) in chosen]
        return sum(others, one)
