"""Measures a trainer and its loader in turn: the loader alone, the trainer on replayed batches, both together, again.

The three windows of a round follow one another, so that background load affects all of them equally: ratios, such as
AU (accelerator utilisation, together / demand), are steadier than the throughputs themselves. Repeated rounds give a
confidence interval. Ranks that train together take the same windows, and a throughput is that of all ranks together.
`pipeline.diagnosis` interprets the figures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from math import ceil
from statistics import median
from typing import Generic, TypeVar

from pipeline.profiling.clocks import LoopTotals, StepTiming
from pipeline.profiling.confidence import Interval, t_interval
from pipeline.profiling.cpu_time import CpuUse
from pipeline.profiling.device_timeline import attribute_waits, idle_totals
from pipeline.profiling.group import SINGLE_PROCESS, Group
from pipeline.profiling.pacing import PacedWindows

WINDOW_ROUNDS = 5  # Student's factor is 2.8 for five rounds, 4.3 for three, 12.7 for two
MAX_TIMELINE_STEPS = 400
FAST_LOADER_RATIO = 2.0  # supply / demand: a loader this fast does not keep the trainer waiting
B = TypeVar("B")


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
        asynchronous: whether `step` only launches work on a device, as on a GPU, and may return before it is done.
    """

    size: Callable[[B], int]
    step: Callable[[B], object]
    settle: Callable[[], object] = _nothing
    after: Callable[[B], object] = lambda batch: None
    asynchronous: bool = False


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
        clocks: totals of the real steps. On an asynchronous device waits count only as far as the device was idle.
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
class WindowMeasurements:
    """What all rounds gave.

    Attributes:
        rounds: the windows.
        steps: the last real steps, at most `MAX_TIMELINE_STEPS`, by the host's clocks on every device.
        first_wait_s: seconds that the very first batch of the loader took.
        loader_cpu: CPU use in the windows of the loader alone.
        replay_cpu: CPU use in the windows of replayed batches.
        real_cpu: CPU use in the windows of real steps.
        asynchronous: whether the trainer only launched its steps.
        launch_s: median seconds of a replayed step before which the device had no work: on an asynchronous device, the
            host's time to launch a step.
        images_of_step: images of a replayed batch, over all ranks.
    """

    rounds: tuple[WindowRound, ...]
    steps: tuple[StepTiming, ...]
    first_wait_s: float
    loader_cpu: CpuUse
    replay_cpu: CpuUse
    real_cpu: CpuUse
    asynchronous: bool = False
    launch_s: float = 0.0
    images_of_step: int = 0

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
    clock: Callable[[], float] = time.perf_counter,
) -> WindowMeasurements:
    """Measures the loader alone, steps on replayed batches, and steps on what the loader gives, in turn.

    Args:
        loader: gives batches without end.
        trainer: what trains on them.
        replayed: batches that are trained on again and again, to measure the demand.
        seconds: approximate length of a window.
        discard: batches at the start of a window that do not count, since they may have been made before it: the
            number that the loader prefetches.
        rounds: how often each window is repeated.
        progress: called with 1 after each round.
        group: ranks that train together. They take the same number of batches, by the slowest rank's clock.
        clock: gives the time in seconds.

    Returns:
        The figures of all ranks together. CPU use, waits before the first batch and the timeline are this rank's.
    """
    started_s = clock()
    first = next(loader)
    first_wait_s = clock() - started_s
    trainer.step(first)  # warm-up, excluded from all windows
    trainer.settle()
    bench = _Bench(loader, trainer, replayed, PacedWindows(seconds, group, clock), group, clock)
    done, steps = list[WindowRound](), list[StepTiming]()
    for _ in range(rounds):
        one, taken = bench.round(discard)
        done.append(one)
        steps += [replace(step, at_s=step.at_s - started_s) for step in taken]
        progress(1)
    last_steps = tuple(steps[-MAX_TIMELINE_STEPS:])
    loader_cpu, replay_cpu, real_cpu = (bench.windows.use(name) for name in ("loader", "replay", "real"))
    found = WindowMeasurements(
        tuple(done), last_steps, first_wait_s, loader_cpu, replay_cpu, real_cpu, trainer.asynchronous
    )
    return replace(found, launch_s=median(bench.launches_s), images_of_step=trainer.size(replayed[0]))


def measure_supply(
    loader: Iterator[B],
    trainer: TrainerUnderTest[B],
    seconds: float,
    discard: int,
    group: Group = SINGLE_PROCESS,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """img/s of the loader alone, in one window like those of `measure_windows`."""
    bench = _Bench(loader, trainer, (), PacedWindows(seconds, group, clock), group, clock)
    bench.drain(discard)
    return bench.windows.throughput("loader", bench.drain)


def measure_demand(
    trainer: TrainerUnderTest[B],
    replayed: Sequence[B],
    seconds: float,
    group: Group = SINGLE_PROCESS,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """img/s of steps on replayed batches, in one window like those of `measure_windows`."""
    trainer.step(replayed[0])  # warm-up, excluded
    trainer.settle()
    bench = _Bench(iter(()), trainer, replayed, PacedWindows(seconds, group, clock), group, clock)
    return bench.windows.throughput("replay", bench.replay)


@dataclass(frozen=True)
class _Bench(Generic[B]):
    """Loader and trainer, and what can be done with so many batches of them.

    `launches_s` collects the seconds of the first step of each loop of replayed batches.
    """

    loader: Iterator[B]
    trainer: TrainerUnderTest[B]
    replayed: Sequence[B]
    windows: PacedWindows
    group: Group
    clock: Callable[[], float]
    launches_s: list[float] = field(default_factory=list)

    def round(self, discard: int) -> tuple[WindowRound, list[StepTiming]]:
        """Takes the three windows of a round; returns them, and the real steps."""
        windows = self.windows
        self.drain(discard)
        supply = windows.throughput("loader", self.drain)
        # The loader goes on until its queue is full. Replay uncounted steps meanwhile, or it would slow down demand.
        self.replay(ceil(discard * windows.pace("replay", self.replay) / windows.pace("loader", self.drain)))
        demand = windows.throughput("replay", self.replay)
        device_step_s = 1 / windows.pace("replay", self.replay)
        # The queue of a fast loader is full all the time, in training too, so there is nothing to use up first.
        fast = windows.pace("loader", self.drain) >= FAST_LOADER_RATIO / device_step_s
        self.train(1 if fast else discard)
        clocks, steps = windows.take("real", self.train)[1]
        if self.trainer.asynchronous:
            clocks = idle_totals(clocks, steps, device_step_s, self.group)
        else:
            clocks, steps = attribute_waits(clocks, steps, self.group)
        return WindowRound(demand, clocks, supply), steps

    def drain(self, batches: int) -> int:
        """Takes batches from the loader without training; returns their images."""
        images = sum(self.trainer.size(batch) for batch in islice(self.loader, batches))
        self.trainer.settle()
        return images

    def replay(self, batches: int) -> int:
        """Trains on the replayed batches; returns their images."""
        images, began_s = 0, self.clock()
        for batch in islice(cycle(self.replayed), batches):
            self.trainer.step(batch)
            if not images:
                self.launches_s.append(self.clock() - began_s)
            images += self.trainer.size(batch)
        self.trainer.settle()
        return images

    def train(self, batches: int) -> tuple[LoopTotals, list[StepTiming]]:
        """Trains on what the loader gives. `at_s` of the steps is by `clock`."""
        clock, trainer = self.clock, self.trainer
        images, steps, began_s = 0, list[StepTiming](), clock()
        ended_s = began_s
        for _ in range(batches):
            started_s = ended_s
            batch = next(self.loader)
            got_s = clock()
            trainer.step(batch)
            stepped_s = clock()
            trainer.after(batch)
            images += trainer.size(batch)
            ended_s = clock()
            steps.append(StepTiming(started_s, got_s - started_s, stepped_s - got_s, ended_s - stepped_s))
        trainer.settle()  # work that the device still had to do belongs to the steps
        left_s = clock() - ended_s
        wait_s, step_s = sum(s.wait_s for s in steps), sum(s.step_s for s in steps) + left_s
        return LoopTotals(images, wait_s, step_s, ended_s - began_s + left_s), steps
