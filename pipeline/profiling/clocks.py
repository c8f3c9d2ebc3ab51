"""TODO-DOC pipeline.profiling.clocks (from pipeline.stall)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LoopTotals:
    """Sums over the steps of a real run: `wait_s` the host waited in next(), `step_s` it spent in training steps,
    `elapsed_s` that all of it took, validation and checkpoints left out."""

    images: int
    wait_s: float
    step_s: float
    elapsed_s: float


class StepClocks:
    """LoopTotals of every step. The first is kept apart, as `first_wait_s`: it waits for the first batch and pays for first
    use. Waits for the first batch of every later epoch are in `edge_waits_s`, too.

    Of a GPU there are also `device_gaps_s`, for which it had no step to work on, and `device_steps_s`, its own time for
    each step after a gap. Gaps with waits as long come from the input. Gaps without them come from the host, late with
    the next launch: a callback, logging, reading a loss back. Waits without gaps cost nothing."""

    def __init__(self) -> None:
        self.images, self.waits_s, self.steps_s, self._loops_s = 0, list[float](), list[float](), list[float]()
        self.first_wait_s: float | None = None
        self.edge_waits_s = list[float]()
        self.device_gaps_s, self.device_steps_s = list[float](), list[float]()

    def add(self, images: int, wait_s: float, step_s: float, loop_s: float, edge: bool = False) -> None:
        """Takes in one step; `loop_s` is the time since the step before ended, `edge` says that it began an epoch."""
        if self.first_wait_s is None:
            self.first_wait_s = wait_s
            return
        if edge:
            self.edge_waits_s.append(wait_s)
        self.images += images
        self.waits_s.append(wait_s)
        self.steps_s.append(step_s)
        self._loops_s.append(loop_s)

    def add_device(self, gap_s: float | None, step_s: float) -> None:
        """Takes in a step on the device and the gap before it; one without a gap, as the first, does not count."""
        if gap_s is not None:
            self.device_gaps_s.append(gap_s)
            self.device_steps_s.append(step_s)

    @property
    def steps(self) -> int:
        """Steps taken in."""
        return len(self.waits_s)

    def total(self) -> LoopTotals:
        """The sums."""
        return LoopTotals(self.images, sum(self.waits_s), sum(self.steps_s), sum(self._loops_s))


def clock_cost_s(steps: int = 2000) -> float:
    """Seconds that the clocks themselves cost a step: reading the time three times, and StepClocks."""
    clocks, started_s = StepClocks(), time.perf_counter()
    for _ in range(steps):
        begun_s, got_s, ended_s = time.perf_counter(), time.perf_counter(), time.perf_counter()
        clocks.add(1, got_s - begun_s, ended_s - got_s, ended_s - begun_s)
    return (time.perf_counter() - started_s) / steps


def percentiles(values_s: Sequence[float]) -> dict[str, float]:
    """p50, p95, p99 and maximum of waits or steps, in seconds."""
    found = np.percentile(values_s, [50, 95, 99, 100])
    return dict(zip(("p50", "p95", "p99", "max"), found.tolist(), strict=True))
