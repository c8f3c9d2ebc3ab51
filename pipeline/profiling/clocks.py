"""Clocks of a training loop: how long each step waited for its batch, and how long the step itself took.

`StepClocks` takes the times of every step and gives their sums (`LoopTotals`) and percentiles. It costs well under a
microsecond a step, so a whole run can keep it on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

import numpy as np

from pipeline.profiling.run_marks import RunMarks

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class LoopTotals:
    """Sums over the steps of a real run, by the host's clocks. `device_timeline.idle_totals` gives the device's.

    Attributes:
        images: images that were trained on.
        wait_s: seconds that the host waited in `next()` for a batch.
        step_s: seconds that the host spent in training steps.
        elapsed_s: seconds of all steps together, without validation and checkpoints. What exceeds `wait_s + step_s`
            passed between steps (callbacks, logging).
    """

    images: int
    wait_s: float
    step_s: float
    elapsed_s: float


@dataclass(frozen=True)
class StepTiming:
    """One real step by the host's clocks. On an asynchronous device the step is only launched.

    Attributes:
        at_s: seconds since the measurement began.
        wait_s: seconds that the rank with the longest wait waited for its batch.
        step_s: seconds of the training step.
        rest_s: seconds between the end of the step and the next wait.
    """

    at_s: float
    wait_s: float
    step_s: float
    rest_s: float


class StepClocks:
    """Times of every step of a run, without its first one, which waits for the first batch and includes warm-up.

    On a GPU, `idle_by_events` compares gaps with waits. A gap as long as a wait comes from the input. A gap without a
    wait comes from the host, which launched the next step late (callback, logging, reading a loss back). A wait without
    a gap is free.

    Args:
        marks: reads CPU use and pressure now and then; None for short loops.

    Attributes:
        images: images of the counted steps.
        waits_s: seconds that each counted step waited for its batch.
        steps_s: seconds of each counted training step, on the host.
        loops_s: seconds of each counted step from the end of the one before it.
        sizes: images of each counted step.
        epochs: for each epoch but the first, the number of counted steps before it.
        pauses_s: seconds of each pause between steps (validation, checkpoint), by name. No other figure has them.
        marks: see the argument.
        first_wait_s: the wait for the very first batch; None before the first step.
        edge_waits_s: the waits for the first batch of each later epoch; they are in `waits_s` as well.
        device_gaps_s: seconds that the GPU had no step to work on, between two steps.
        device_steps_s: seconds of the GPU's own time for the step after each of these gaps.
    """

    def __init__(self, marks: RunMarks | None = None) -> None:
        self.images, self.waits_s, self.steps_s, self.loops_s = 0, list[float](), list[float](), list[float]()
        self.sizes, self.epochs, self.pauses_s = list[int](), list[int](), dict[str, list[float]]()
        self.marks, self._elapsed_s = marks, 0.0
        self.first_wait_s: float | None = None
        self.edge_waits_s = list[float]()
        self.device_gaps_s, self.device_steps_s = list[float](), list[float]()
        self._gap_steps = list[int]()  # for each gap the number of the step after it; the run's first step has 0
        self._device_steps = 0

    def add(self, images: int, wait_s: float, step_s: float, loop_s: float, edge: bool = False) -> None:
        """Adds one step.

        Args:
            images: images of its batch.
            wait_s: seconds that it waited for the batch.
            step_s: seconds of the training step.
            loop_s: seconds since the previous step ended.
            edge: whether the step began an epoch.
        """
        if self.first_wait_s is None:
            self.first_wait_s = wait_s
        else:
            if edge:
                self.edge_waits_s.append(wait_s)
                self.epochs.append(self.steps)
            self.images += images
            self.sizes.append(images)
            self.waits_s.append(wait_s)
            self.steps_s.append(step_s)
            self.loops_s.append(loop_s)
            self._elapsed_s += loop_s
        if self.marks is not None:
            self.marks.after_step(self.steps, self._elapsed_s)

    def paused(self, name: str, work: Callable[P, T]) -> Callable[P, T]:
        """`work`, with each call counted as a pause of this name."""

        @wraps(work)
        def timed(*args: P.args, **kwargs: P.kwargs) -> T:
            began_s = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                self.pauses_s.setdefault(name, []).append(time.perf_counter() - began_s)

        return timed

    def finish(self) -> None:
        """Reads CPU use and pressure for the last time, before anything else is measured."""
        if self.marks is not None and self.steps:
            self.marks.read(self.steps)

    def add_device(self, gap_s: float | None, step_s: float, steps: int = 1) -> None:
        """Adds a step by the GPU's clock and the gap before it. A step without a gap, as the first, is not counted.

        Args:
            gap_s: seconds between the step before and this one, on the GPU; None if there is none before.
            step_s: seconds of the step on the GPU.
            steps: steps that were measured as one.
        """
        if gap_s is not None:
            self.device_gaps_s.append(gap_s)
            self.device_steps_s.append(step_s)
            self._gap_steps.append(self._device_steps)
        self._device_steps += steps

    def idle_by_events(self) -> tuple[float, float] | None:
        """Seconds for which the GPU had no step to work on, by its own events; None without any.

        Returns:
            While the host waited in `next()` for the batch, which is at most the wait; and while it did anything else.
        """
        if not self.device_gaps_s:
            return None
        gaps = zip(self.device_gaps_s, self._gap_steps, strict=True)
        input_s = sum(min(gap_s, self._wait_s(step)) for gap_s, step in gaps)
        return input_s, sum(self.device_gaps_s) - input_s

    def _wait_s(self, step: int) -> float:
        """The wait for the batch of a step; 0 for the run's first step, which is not counted."""
        return self.waits_s[step - 1] if 0 < step <= len(self.waits_s) else 0.0

    @property
    def steps(self) -> int:
        """Number of counted steps."""
        return len(self.waits_s)

    def total(self) -> LoopTotals:
        """The sums over all counted steps."""
        return LoopTotals(self.images, sum(self.waits_s), sum(self.steps_s), sum(self.loops_s))


def clock_cost_s(steps: int = 2000) -> float:
    """Seconds that the clocks themselves cost a step: three readings of the time, and `StepClocks.add`."""
    clocks, started_s = StepClocks(), time.perf_counter()
    for _ in range(steps):
        begun_s, got_s, ended_s = time.perf_counter(), time.perf_counter(), time.perf_counter()
        clocks.add(1, got_s - begun_s, ended_s - got_s, ended_s - begun_s)
    return (time.perf_counter() - started_s) / steps


def percentiles(values_s: Sequence[float]) -> dict[str, float]:
    """The "p50", "p95", "p99" and "max" of waits or steps, in seconds."""
    found = np.percentile(values_s, [50, 95, 99, 100])
    return dict(zip(("p50", "p95", "p99", "max"), found.tolist(), strict=True))
