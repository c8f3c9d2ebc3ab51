"""Measures a trainer and its feed in turn: the feed alone, the trainer on replayed batches, both together, and again.

The windows of a round share the machine's weather, so that their ratios, as AU, are steadier than the rates; repeated
rounds say how sure it is. Ranks that train together take the same windows, and rates are of all of them together. What
the figures mean is `stall.py`'s business.
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

ROUNDS = 5  # of windows: Student's factor is 2.8 for five, 4.3 for three, 12.7 for two
LINES = 400  # steps of the timeline that are kept
AHEAD = 2.0  # times the demand: a feed so fast does not keep the trainer waiting
PILOT = 0.1  # of a window: how long its pace is looked for
B = TypeVar("B")
T = TypeVar("T")


def _nothing() -> None:
    """For trainers that need not be waited for."""


def alone(number: int) -> int:
    """What ranks agree on where there is one."""
    return number


@dataclass(frozen=True)
class TrainerUnderTest(Generic[B]):
    """What trains. `size`: images of a batch, of all ranks. `step` trains on it. `settle` waits for the device. `after`
    is what the run's loop does between steps (callbacks, logging): part of a real step, not of a replayed one."""

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
class WindowRound:
    """Three windows: `demand` img/s on replayed batches, the clocks of real steps, `supply` img/s of the feed alone."""

    demand: float
    clocks: LoopTotals
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
class StepTiming:
    """A real step for the timeline: `at_s` since the first, seconds of wait (of the rank that waits longest), of the
    step, and of what came after."""

    at_s: float
    wait_s: float
    step_s: float
    rest_s: float


@dataclass(frozen=True)
class WindowMeasurements:
    """What alternating windows gave."""

    rounds: tuple[WindowRound, ...]
    steps: tuple[StepTiming, ...]
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
    def clocks(self) -> LoopTotals:
        """Sums over all real windows."""
        clocks = [turn.clocks for turn in self.rounds]
        return LoopTotals(
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


def measure_windows(
    feed: Iterator[B],
    subject: TrainerUnderTest[B],
    kept: Sequence[B],
    seconds: float,
    discard: int,
    rounds: int = ROUNDS,
    progress: Callable[[int], None] = lambda n: None,
    agree: Callable[[int], int] = alone,
) -> WindowMeasurements:
    """Windows of about `seconds`, `rounds` times: the feed alone, steps on `kept` batches, steps on what `feed` gives.

    The first `discard` batches of a window do not count: they were made before it (choose the feed's `prefetched_batches`).
    `progress` counts rounds. `agree` gives the largest of all ranks' numbers: ranks go by the slowest one's clock, and
    so take the same number of batches.
    """
    started_s = time.perf_counter()
    first = next(feed)
    first_wait_s = time.perf_counter() - started_s
    subject.step(first)  # first-use costs are nobody's
    subject.settle()
    windows, found, steps = _Windows(seconds, agree), list[WindowRound](), list[StepTiming]()
    fed, replayed = partial(_fed, feed, subject), partial(_replayed, kept, subject)
    trained = partial(_real, feed, subject)
    for _ in range(rounds):
        fed(discard)
        supply = windows.rate("feed", fed)
        # The feed fills its queue for a while yet, which is not the trainer's to pay for.
        replayed(ceil(discard * windows.pace("replay", replayed) / windows.pace("feed", fed)))
        demand = windows.rate("replay", replayed)
        # A feed that is far ahead anyway has its queue full all the time: nothing of it has to be used up.
        trained(discard if windows.pace("feed", fed) < AHEAD * windows.pace("replay", replayed) else 1)
        clocks, taken = attribute_waits(*windows.take("real", trained)[1], agree)
        found.append(WindowRound(demand, clocks, supply))
        steps += [replace(step, at_s=step.at_s - started_s) for step in taken]
        progress(1)
    uses = [sum(those[1:], those[0]) for those in (windows.uses[name] for name in ("feed", "replay", "real"))]
    return WindowMeasurements(tuple(found), tuple(steps[-LINES:]), first_wait_s, *uses)


def measure_supply(
    feed: Iterator[B], subject: TrainerUnderTest[B], seconds: float, discard: int, agree: Callable[[int], int] = alone
) -> float:
    """img/s of the feed alone, by one window as `observe` has it."""
    _fed(feed, subject, discard)
    return _Windows(seconds, agree).rate("feed", partial(_fed, feed, subject))


def measure_demand(
    subject: TrainerUnderTest[B], kept: Sequence[B], seconds: float, agree: Callable[[int], int] = alone
) -> float:
    """img/s of steps on `kept` batches, by one window as `observe` has it."""
    subject.step(kept[0])  # first-use costs are nobody's
    subject.settle()
    return _Windows(seconds, agree).rate("replay", partial(_replayed, kept, subject))


class _Windows:
    """Windows of about `seconds`, in batches. Times are the slowest rank's: all ranks find the same numbers by them."""

    def __init__(self, seconds: float, agree: Callable[[int], int]) -> None:
        self._seconds, self._agree = seconds, agree
        self._paces = dict[str, float]()
        self.uses = dict[str, list[CpuUse]]()

    def pace(self, name: str, work: Callable[[int], object]) -> float:
        """Batches a second that `work`, told how many to take, has taken in its last window; in a pilot before that."""
        if name not in self._paces:
            batches = 1
            while self._timed(work, batches)[0] < PILOT * self._seconds:
                batches *= 2
            # Some of those may have been made before. They are used up now: as many again tell the pace.
            self._paces[name] = batches / self._timed(work, batches)[0]
        return self._paces[name]

    def take(self, name: str, work: Callable[[int], T]) -> tuple[float, T]:
        """Seconds of a window, and what `work` says of it."""
        batches = max(1, round(self._seconds * self.pace(name, work)))
        mark = cpu_mark()
        elapsed_s, result = self._timed(work, batches)
        self.uses.setdefault(name, []).append(mark.until(cpu_mark()))
        self._paces[name] = batches / elapsed_s
        return elapsed_s, result

    def rate(self, name: str, work: Callable[[int], int]) -> float:
        """img/s of a window whose `work` tells its images."""
        elapsed_s, images = self.take(name, work)
        return images / elapsed_s

    def _timed(self, work: Callable[[int], T], batches: int) -> tuple[float, T]:
        self._agree(0)  # all begin together
        started_s = time.perf_counter()
        result = work(batches)
        return self._agree(max(1, round(1e9 * (time.perf_counter() - started_s)))) / 1e9, result


def _fed(feed: Iterator[B], subject: TrainerUnderTest[B], batches: int) -> int:
    """Takes batches and leaves them; tells their images."""
    images = sum(subject.size(batch) for batch in islice(feed, batches))
    subject.settle()
    return images


def _replayed(kept: Sequence[B], subject: TrainerUnderTest[B], batches: int) -> int:
    """Takes steps on the `kept` batches; tells their images."""
    images = 0
    for batch in islice(cycle(kept), batches):
        subject.step(batch)
        images += subject.size(batch)
    subject.settle()
    return images


def _real(feed: Iterator[B], subject: TrainerUnderTest[B], batches: int) -> tuple[LoopTotals, list[StepTiming]]:
    """Takes steps on what the feed gives; `at_s` of the steps is of the machine's clock."""
    images, steps, began_s = 0, list[StepTiming](), time.perf_counter()
    ended_s = began_s
    for _ in range(batches):
        started_s = ended_s
        batch = next(feed)
        got_s = time.perf_counter()
        subject.step(batch)
        stepped_s = time.perf_counter()
        subject.after(batch)
        images += subject.size(batch)
        ended_s = time.perf_counter()
        steps.append(StepTiming(started_s, got_s - started_s, stepped_s - got_s, ended_s - stepped_s))
    subject.settle()  # what the device still had to do belongs to the steps
    left_s = time.perf_counter() - ended_s
    wait_s, step_s = sum(s.wait_s for s in steps), sum(s.step_s for s in steps) + left_s
    return LoopTotals(images, wait_s, step_s, ended_s - began_s + left_s), steps


def attribute_waits(
    clocks: LoopTotals, steps: list[StepTiming], agree: Callable[[int], int]
) -> tuple[LoopTotals, list[StepTiming]]:
    """With the longest wait of all ranks at every step: meanwhile the others wait for that rank, but in their steps."""
    waits_s = [agree(round(1e9 * step.wait_s)) / 1e9 for step in steps]
    # Single steps on a GPU may end on the host before the device waits: they give no more than they took.
    shifted = [
        replace(step, wait_s=wait_s, step_s=max(0.0, step.step_s - (wait_s - step.wait_s)))
        for step, wait_s in zip(steps, waits_s, strict=True)
    ]
    wait_s = sum(waits_s)
    return replace(clocks, wait_s=wait_s, step_s=clocks.step_s - (wait_s - clocks.wait_s)), shifted
