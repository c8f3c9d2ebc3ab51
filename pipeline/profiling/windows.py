"""Measures a trainer and its loader in turn: the loader alone, the trainer on replayed batches, both together, again.

The three windows of a round follow one another, so that background load affects all of them equally: ratios, such as
AU (accelerator utilisation, together / demand), are steadier than the throughputs themselves. Repeated rounds give a
confidence interval. Ranks that train together take the same windows, and a throughput is that of all ranks together.
`pipeline.diagnosis` interprets the figures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from math import ceil
from typing import Generic, TypeVar

from pipeline.profiling.clocks import LoopTotals
from pipeline.profiling.confidence import Interval, t_interval
from pipeline.profiling.cpu_time import CpuUse, cpu_mark
from pipeline.profiling.group import SINGLE_PROCESS, Group

WINDOW_ROUNDS = 5  # Student's factor is 2.8 for five rounds, 4.3 for three, 12.7 for two
MAX_TIMELINE_STEPS = 400
FAST_LOADER_RATIO = 2.0  # supply / demand: a loader this fast does not keep the trainer waiting
PILOT_SHARE = 0.1  # of a window's length: from a pilot this long the batches of a window are computed
B = TypeVar("B")
T = TypeVar("T")


def _nothing() -> None:
    """For trainers that need not be waited for."""


@dataclass(frozen=True)
class TrainerUnderTest(Generic[B]):
    """The trainer that is measured, as functions of a batch.

    Attributes:
        size: number of images of the batch, over all ranks.
        step: trains on the batch.
        settle: waits until the device has finished all steps.
        after: what the real loop does between steps (callbacks, logging). It belongs to real steps, not to replayed
            ones.
    """

    size: Callable[[B], int]
    step: Callable[[B], object]
    settle: Callable[[], object] = _nothing
    after: Callable[[B], object] = lambda batch: None


@dataclass(frozen=True)
class EmulatedTrainer:
    """A training step that only sleeps, as that of MLPerf Storage does: it takes no core.

    Attributes:
        demand: img/s that it consumes.

    Raises:
        ValueError: `demand` is not positive.
    """

    demand: float

    def __post_init__(self) -> None:
        if not self.demand > 0:
            raise ValueError(f"demand is {self.demand:g} img/s; it must be above 0")

    def __call__(self, images: int) -> None:
        """One step on so many images."""
        time.sleep(images / self.demand)


@dataclass(frozen=True)
class WindowRound:
    """The three windows of one round.

    Attributes:
        demand: img/s of the trainer on replayed batches.
        clocks: totals of the real steps.
        supply: img/s of the loader alone.
    """

    demand: float
    clocks: LoopTotals
    supply: float

    @property
    def together(self) -> float:
        """img/s of the real steps."""
        return self.clocks.images / self.clocks.elapsed_s

    @property
    def au(self) -> float:
        """AU of this round."""
        return self.together / self.demand


@dataclass(frozen=True)
class StepTiming:
    """One real step, for the timeline.

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


@dataclass(frozen=True)
class WindowMeasurements:
    """What all rounds gave.

    Attributes:
        rounds: the windows.
        steps: the last real steps, at most `MAX_TIMELINE_STEPS`.
        first_wait_s: seconds that the very first batch of the loader took.
        loader_cpu: CPU use in the windows of the loader alone.
        replay_cpu: CPU use in the windows of replayed batches.
        real_cpu: CPU use in the windows of real steps.
    """

    rounds: tuple[WindowRound, ...]
    steps: tuple[StepTiming, ...]
    first_wait_s: float
    loader_cpu: CpuUse
    replay_cpu: CpuUse
    real_cpu: CpuUse

    @property
    def demand(self) -> float:
        """img/s over all windows of replayed batches, each weighted by the real steps of its round."""
        return sum(r.clocks.images for r in self.rounds) / sum(r.clocks.images / r.demand for r in self.rounds)

    @property
    def supply(self) -> float:
        """img/s over all windows of the loader alone, with the same weights."""
        return sum(r.clocks.images for r in self.rounds) / sum(r.clocks.images / r.supply for r in self.rounds)

    @property
    def clocks(self) -> LoopTotals:
        """Sums over all windows of real steps."""
        clocks = [r.clocks for r in self.rounds]
        return LoopTotals(
            sum(c.images for c in clocks),
            sum(c.wait_s for c in clocks),
            sum(c.step_s for c in clocks),
            sum(c.elapsed_s for c in clocks),
        )

    @property
    def au(self) -> Interval:
        """Mean AU of the rounds, with its 95% confidence interval."""
        return t_interval([r.au for r in self.rounds])

    @property
    def trainer_cpu_s(self) -> float:
        """CPU seconds of the trainer per image, measured while the loader was idle."""
        return self.replay_cpu.own_s / self.replay_cpu.wall_s / self.demand

    @property
    def loader_cpu_s(self) -> float:
        """CPU seconds of the loader per image, measured while the trainer was idle."""
        return self.loader_cpu.own_s / self.loader_cpu.wall_s / self.supply


def measure_windows(
    loader: Iterator[B],
    trainer: TrainerUnderTest[B],
    replayed: Sequence[B],
    seconds: float,
    discard: int,
    rounds: int = WINDOW_ROUNDS,
    progress: Callable[[int], None] = lambda n: None,
    group: Group = SINGLE_PROCESS,
) -> WindowMeasurements:
    """Measures the loader alone, steps on replayed batches, and steps on what the loader gives, in turn.

    Args:
        loader: gives batches, endlessly.
        trainer: what trains on them.
        replayed: batches that are trained on again and again, to measure the demand.
        seconds: approximate length of a window.
        discard: batches at the start of a window that do not count, since they may have been made before it: the
            number that the loader prefetches.
        rounds: how often each window is repeated.
        progress: called with 1 after each round.
        group: ranks that train together. They take the same number of batches, by the slowest rank's clock.

    Returns:
        The figures of all ranks together. CPU use, waits before the first batch and the timeline are this rank's.
    """
    started_s = time.perf_counter()
    first = next(loader)
    first_wait_s = time.perf_counter() - started_s
    trainer.step(first)  # warm-up, excluded from all windows
    trainer.settle()
    windows, done, steps = _Windows(seconds, group), list[WindowRound](), list[StepTiming]()
    drain, replay = partial(_drain, loader, trainer), partial(_replay, replayed, trainer)
    train = partial(_train, loader, trainer)
    for _ in range(rounds):
        drain(discard)
        supply = windows.throughput("loader", drain)
        # The loader goes on until its queue is full. Replay uncounted steps meanwhile, or it would slow down demand.
        replay(ceil(discard * windows.pace("replay", replay) / windows.pace("loader", drain)))
        demand = windows.throughput("replay", replay)
        # The queue of a fast loader is full all the time, in training too, so there is nothing to use up first.
        fast = windows.pace("loader", drain) >= FAST_LOADER_RATIO * windows.pace("replay", replay)
        train(1 if fast else discard)
        clocks, taken = attribute_waits(*windows.take("real", train)[1], group)
        done.append(WindowRound(demand, clocks, supply))
        steps += [replace(step, at_s=step.at_s - started_s) for step in taken]
        progress(1)
    uses = [sum(parts[1:], parts[0]) for parts in (windows.uses[name] for name in ("loader", "replay", "real"))]
    return WindowMeasurements(tuple(done), tuple(steps[-MAX_TIMELINE_STEPS:]), first_wait_s, *uses)


def measure_supply(
    loader: Iterator[B],
    trainer: TrainerUnderTest[B],
    seconds: float,
    discard: int,
    group: Group = SINGLE_PROCESS,
) -> float:
    """img/s of the loader alone, in one window like those of `measure_windows`."""
    _drain(loader, trainer, discard)
    return _Windows(seconds, group).throughput("loader", partial(_drain, loader, trainer))


def measure_demand(
    trainer: TrainerUnderTest[B], replayed: Sequence[B], seconds: float, group: Group = SINGLE_PROCESS
) -> float:
    """img/s of steps on replayed batches, in one window like those of `measure_windows`."""
    trainer.step(replayed[0])  # warm-up, excluded
    trainer.settle()
    return _Windows(seconds, group).throughput("replay", partial(_replay, replayed, trainer))


class _Windows:
    """Windows of about `seconds`, counted in batches.

    Times are the slowest rank's, so all ranks compute the same numbers of batches from them.
    """

    def __init__(self, seconds: float, group: Group) -> None:
        self._seconds, self._group = seconds, group
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

    def _timed(self, work: Callable[[int], T], batches: int) -> tuple[float, T]:
        self._group.largest(0)  # a barrier: all ranks start together
        started_s = time.perf_counter()
        result = work(batches)
        return self._group.largest(max(1, round(1e9 * (time.perf_counter() - started_s)))) / 1e9, result


def _drain(loader: Iterator[B], trainer: TrainerUnderTest[B], batches: int) -> int:
    """Takes batches from the loader without training; returns their images."""
    images = sum(trainer.size(batch) for batch in islice(loader, batches))
    trainer.settle()
    return images


def _replay(replayed: Sequence[B], trainer: TrainerUnderTest[B], batches: int) -> int:
    """Trains on the replayed batches; returns their images."""
    images = 0
    for batch in islice(cycle(replayed), batches):
        trainer.step(batch)
        images += trainer.size(batch)
    trainer.settle()
    return images


def _train(loader: Iterator[B], trainer: TrainerUnderTest[B], batches: int) -> tuple[LoopTotals, list[StepTiming]]:
    """Trains on what the loader gives. `at_s` of the steps is by `time.perf_counter`."""
    images, steps, began_s = 0, list[StepTiming](), time.perf_counter()
    ended_s = began_s
    for _ in range(batches):
        started_s = ended_s
        batch = next(loader)
        got_s = time.perf_counter()
        trainer.step(batch)
        stepped_s = time.perf_counter()
        trainer.after(batch)
        images += trainer.size(batch)
        ended_s = time.perf_counter()
        steps.append(StepTiming(started_s, got_s - started_s, stepped_s - got_s, ended_s - stepped_s))
    trainer.settle()  # work that the device still had to do belongs to the steps
    left_s = time.perf_counter() - ended_s
    wait_s, step_s = sum(s.wait_s for s in steps), sum(s.step_s for s in steps) + left_s
    return LoopTotals(images, wait_s, step_s, ended_s - began_s + left_s), steps


def attribute_waits(clocks: LoopTotals, steps: list[StepTiming], group: Group) -> tuple[LoopTotals, list[StepTiming]]:
    """Counts the longest wait of all ranks as the wait of each step.

    While one rank waits for its batch, the others wait for that rank, but within their training step. That time is
    moved from `step_s` to `wait_s`.

    Args:
        clocks: this rank's totals of the steps.
        steps: this rank's steps; every rank has as many.
        group: the ranks.
    """
    waits_s = [group.largest(round(1e9 * step.wait_s)) / 1e9 for step in steps]
    # On a GPU a step may end on the host before the device has waited, so it may be shorter than what is moved.
    shifted = [
        replace(step, wait_s=wait_s, step_s=max(0.0, step.step_s - (wait_s - step.wait_s)))
        for step, wait_s in zip(steps, waits_s, strict=True)
    ]
    wait_s = sum(waits_s)
    return replace(clocks, wait_s=wait_s, step_s=clocks.step_s - (wait_s - clocks.wait_s)), shifted
