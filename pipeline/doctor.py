"""Measures a trainer and its feed in turn: the feed alone, the trainer on replayed batches, both together, and again.

The windows of a round share the machine's weather, so that their ratios, as AU, are steadier than the rates; repeated
rounds say how sure it is. What the figures mean is `stall.py`'s business.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

from pipeline.cpu_groups import CpuUse, cpu_mark
from pipeline.intervals import Interval, t_interval
from pipeline.stall import Clocks

ROUNDS = 5  # of windows: Student's factor is 2.8 for five, 4.3 for three, 12.7 for two
LINES = 400  # steps of the timeline that are kept

B = TypeVar("B")
T = TypeVar("T")


def _nothing() -> None:
    """For trainers that need not be waited for."""


@dataclass(frozen=True)
class Subject(Generic[B]):
    """What trains. `size`: images of a batch. `step` trains on it. `settle` waits for the device. `after` is what the
    run's loop does between steps (callbacks, logging): part of a real step, not of a replayed one."""

    size: Callable[[B], int]
    step: Callable[[B], object]
    settle: Callable[[], object] = _nothing
    after: Callable[[B], object] = lambda batch: None


@dataclass(frozen=True)
class EmulatedTrainer:
    """Takes `demand` img/s and no core, as MLPerf Storage's does: it sleeps for as long as a step would take."""

    demand: float

    def __post_init__(self) -> None:
        if not self.demand > 0:
            raise ValueError(f"demand is {self.demand:g} img/s; it must be above 0")

    def __call__(self, images: int) -> None:
        """One step."""
        time.sleep(images / self.demand)


@dataclass(frozen=True)
class Round:
    """Three windows: `demand` img/s on replayed batches, the clocks of real steps, `supply` img/s of the feed alone."""

    demand: float
    clocks: Clocks
    supply: float

    @property
    def together(self) -> float:
        """img/s of the real steps."""
        return self.clocks.images / self.clocks.elapsed_s

    @property
    def au(self) -> float:
        """Of this turn."""
        return self.together / self.demand


@dataclass(frozen=True)
class Step:
    """A real step for the timeline: `at_s` since the first, seconds of wait, of the step, and of what came after."""

    at_s: float
    wait_s: float
    step_s: float
    rest_s: float


@dataclass(frozen=True)
class Observed:
    """What alternating windows gave."""

    rounds: tuple[Round, ...]
    steps: tuple[Step, ...]
    first_wait_s: float  # for the very first batch of the feed
    feed_cpu: CpuUse
    replay_cpu: CpuUse
    real_cpu: CpuUse

    @property
    def demand(self) -> float:
        """img/s over all replay windows, each with the weight of its round's real steps."""
        return sum(turn.clocks.images for turn in self.rounds) / sum(p.clocks.images / p.demand for p in self.rounds)

    @property
    def supply(self) -> float:
        """img/s over all windows of the feed alone, with the same weights."""
        return sum(turn.clocks.images for turn in self.rounds) / sum(p.clocks.images / p.supply for p in self.rounds)

    @property
    def clocks(self) -> Clocks:
        """Sums over all real windows."""
        clocks = [turn.clocks for turn in self.rounds]
        return Clocks(
            sum(c.images for c in clocks),
            sum(c.wait_s for c in clocks),
            sum(c.step_s for c in clocks),
            sum(c.elapsed_s for c in clocks),
        )

    @property
    def au(self) -> Interval:
        """AU of the rounds, with its 95 % interval."""
        return t_interval([turn.au for turn in self.rounds])

    @property
    def replay_cpu_s(self) -> float:
        """CPU seconds of the trainer per image, the feed at rest."""
        return self.replay_cpu.own_s / self.replay_cpu.wall_s / self.demand

    @property
    def feed_cpu_s(self) -> float:
        """CPU seconds of the feed per image, the trainer at rest."""
        return self.feed_cpu.own_s / self.feed_cpu.wall_s / self.supply


def observe(
    feed: Iterator[B],
    subject: Subject[B],
    kept: Sequence[B],
    seconds: float,
    discard: int,
    rounds: int = ROUNDS,
    progress: Callable[[int], None] = lambda n: None,
) -> Observed:
    """Windows of `seconds`, `rounds` times: the feed alone, steps on the `kept` batches, steps on what `feed` gives.

    The first `discard` batches of a window do not count: they were made before it (choose the queue's depth plus one).
    `progress` counts rounds.
    """
    started_s = time.perf_counter()
    first = next(feed)
    first_wait_s = time.perf_counter() - started_s
    subject.step(first)  # first-use costs are nobody's
    subject.settle()
    found, steps, uses = list[Round](), list[Step](), dict[str, list[CpuUse]]()

    def window(name: str, work: Callable[[], T]) -> T:
        mark = cpu_mark()
        result = work()
        uses.setdefault(name, []).append(mark.until(cpu_mark()))
        return result

    for _ in range(rounds):
        _alone(feed, subject.size, discard)
        supply = window("feed", lambda: _alone(feed, subject.size, 1, seconds))
        # The feed fills its queue for a while yet, which is not the trainer's to pay for.
        _replay(subject, kept, discard * subject.size(first) / supply)
        demand = window("replay", lambda: _replay(subject, kept, seconds))
        for batch in islice(feed, discard):
            subject.step(batch)
            subject.after(batch)
        subject.settle()
        clocks, taken = window("real", lambda: _real(feed, subject, seconds, started_s))
        found.append(Round(demand, clocks, supply))
        steps += taken
        progress(1)
    feed_cpu, replay_cpu, real_cpu = (sum(uses[n][1:], uses[n][0]) for n in ("feed", "replay", "real"))
    return Observed(tuple(found), tuple(steps[-LINES:]), first_wait_s, feed_cpu, replay_cpu, real_cpu)


def _replay(subject: Subject[B], kept: Sequence[B], seconds: float) -> float:
    """img/s of steps on the `kept` batches."""
    images, started_s = 0, time.perf_counter()
    while True:
        for batch in kept:
            subject.step(batch)
            images += subject.size(batch)
        subject.settle()
        if (elapsed_s := time.perf_counter() - started_s) >= seconds:
            return images / elapsed_s


def _alone(feed: Iterator[B], size: Callable[[B], int], least: int, seconds: float = 0.0) -> float:
    """img/s of the feed, over `seconds` and at least so many batches."""
    images, batches, started_s = 0, 0, time.perf_counter()
    while True:
        images, batches = images + size(next(feed)), batches + 1
        if (elapsed_s := time.perf_counter() - started_s) >= seconds and batches >= least:
            return images / elapsed_s


def _real(feed: Iterator[B], subject: Subject[B], seconds: float, origin_s: float) -> tuple[Clocks, list[Step]]:
    images, steps, began_s = 0, list[Step](), time.perf_counter()
    ended_s = began_s
    while ended_s - began_s < seconds:
        started_s = ended_s
        batch = next(feed)
        got_s = time.perf_counter()
        subject.step(batch)
        stepped_s = time.perf_counter()
        subject.after(batch)
        images += subject.size(batch)
        ended_s = time.perf_counter()
        steps.append(Step(started_s - origin_s, got_s - started_s, stepped_s - got_s, ended_s - stepped_s))
    subject.settle()  # what the device still had to do belongs to the steps
    left_s = time.perf_counter() - ended_s
    wait_s, step_s = sum(s.wait_s for s in steps), sum(s.step_s for s in steps) + left_s
    return Clocks(images, wait_s, step_s, ended_s - began_s + left_s), steps
