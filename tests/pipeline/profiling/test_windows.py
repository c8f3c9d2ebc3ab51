"""Windows alternate and have the right length; CPU time is split completely. Trainers and loaders here only count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from statistics import fmean, stdev

import pytest

from pipeline.profiling.clocks import LoopTotals, StepTiming
from pipeline.profiling.confidence import t_interval
from pipeline.profiling.cpu_time import CpuMark, cpu_mark, group_of
from pipeline.profiling.device_timeline import attribute_waits
from pipeline.profiling.group import SINGLE_PROCESS, SingleProcess
from pipeline.profiling.throughput import Throughput, lockstep_throughput, throughput_by_rank
from pipeline.profiling.windows import (
    EmulatedTrainer,
    TrainerUnderTest,
    WindowMeasurements,
    WindowRound,
    measure_windows,
)


def test_the_interval_is_student_s():
    """As in the printed table: t(0.975) is 12.706, 4.303, 2.776 for 1, 2, 4 degrees of freedom."""
    for values, factor in (([0.8, 0.9], 12.706), ([1.0, 2.0, 4.0], 4.303), ([1.0, 2.0, 4.0, 5.0, 9.0], 2.776)):
        found = t_interval(values)
        half = factor * stdev(values) / len(values) ** 0.5
        assert (found.mean, found.windows) == (fmean(values), len(values))
        assert (found.low, found.high) == pytest.approx((fmean(values) - half, fmean(values) + half), abs=2e-3)


def test_one_window_shows_no_spread():
    with pytest.raises(ValueError, match="at least 2"):
        t_interval([0.9])


@pytest.mark.parametrize("rounds", [2, 4])
def test_windows_take_turns(rounds: int):
    """The loader alone, replayed batches, real steps, and again. Only real steps call `after` and count as clocks."""
    taken: list[int] = []
    after: list[int] = []
    subject = TrainerUnderTest[int](size=lambda _: 8, step=taken.append, after=after.append)
    found = measure_windows(count(), subject, [-1, -2], seconds=1e-4, discard=3, rounds=rounds)
    real = [batch for batch in taken if batch >= 0]
    assert real == sorted(set(real)), "a batch of the loader was trained on twice"
    assert after == real[1:]
    assert sum(a < 0 <= b for a, b in pairwise(taken)) == len(found.rounds) == rounds
    assert sum(b - a > 1 for a, b in pairwise(real)) == rounds, "windows of the loader alone must skip batches"
    assert 0 < found.clocks.images <= 8 * (len(real) - 1 - 3 * rounds)
    assert found.clocks.elapsed_s == pytest.approx(sum(one.clocks.elapsed_s for one in found.rounds))
    for one in found.rounds:
        assert one.clocks.wait_s + one.clocks.step_s <= one.clocks.elapsed_s + 1e-9


@dataclass
class ClockGroup(SingleProcess):
    """A group of ranks whose slowest one has a clock that a test sets forward."""

    at_s: float = 0.0
    began_s: float = 0.0
    windows_s: list[float] = field(default_factory=list)

    def largest(self, number: int) -> int:
        """0 at the start of a window; at its end the nanoseconds that it has taken by this clock."""
        if not number:
            self.began_s = self.at_s
            return 0
        self.windows_s.append(self.at_s - self.began_s)
        return round(1e9 * self.windows_s[-1])


@pytest.mark.parametrize("ready", [0, 3, 20])
def test_windows_are_as_long_as_they_should_be(ready: int):
    """By the slowest rank's clock, however many batches were prefetched, even more than are discarded."""
    clock, batch_s, step_s = ClockGroup(), 0.01, 0.004

    def loader() -> Iterator[int]:
        for number in count():
            clock.at_s += batch_s if number >= ready else 0
            yield number

    def step(batch: int) -> None:
        clock.at_s += step_s

    found = measure_windows(
        loader(), TrainerUnderTest[int](lambda _: 8, step), [-1], seconds=1.0, discard=1, rounds=2, group=clock
    )
    assert max(clock.windows_s) == pytest.approx(1.0, rel=0.01)
    for one in found.rounds:
        assert (one.supply, one.demand) == pytest.approx((8 / batch_s, 8 / step_s))
        assert one.clocks.images == 8 * round(1 / (batch_s + step_s))


class TwoRanks(SingleProcess):
    """Rank 0 of two; the test knows what rank 1 says."""

    world = 2

    def __init__(self, other_number: int = 0, other_row: tuple[float, ...] = ()) -> None:
        self.other_number, self.other_row = other_number, other_row

    def largest(self, number: int) -> int:
        """Of both ranks."""
        return max(number, self.other_number)

    def gather(self, row: Sequence[float]) -> list[list[float]]:
        """Of both ranks."""
        return [list(row), list(self.other_row)]


def test_waiting_for_another_rank_s_batch_counts_as_wait():
    """In one step one rank waits 3 s for its batch. The other waits 1 s, and 2 s for the first rank in its step."""
    for wait_s, step_s in ((1.0, 5.0), (3.0, 3.0)):
        own, step = LoopTotals(8, wait_s, step_s, 7.0), StepTiming(0.0, wait_s, step_s, 1.0)
        clocks, steps = attribute_waits(own, [step], TwoRanks(3 * 10**9))
        assert (clocks, steps) == (LoopTotals(8, 3.0, 3.0, 7.0), [StepTiming(0.0, 3.0, 3.0, 1.0)])


def test_ranks_in_lockstep_have_the_slowest_one_s_throughput():
    """Throughput makes its way through a row of numbers unchanged; two ranks give twice the slower one's img/s."""
    fast = Throughput(900.0, 800.0, 950.0, 1.5, 1.2, (800.0, 900.0, 950.0), 0.1, 0.2)
    slow = Throughput(500.0, 400.0, 550.0, 1.0, 0.5, (400.0, 500.0, 550.0), 0.2, 0.4)
    row = (500.0, 400.0, 550.0, 1.0, 0.5, 0.2, 0.4, 400.0, 500.0, 550.0)
    assert throughput_by_rank(fast, SINGLE_PROCESS) == [fast]
    both = throughput_by_rank(fast, TwoRanks(other_row=row))
    assert both == [fast, slow]
    assert lockstep_throughput(both) == Throughput(1000.0, 800.0, 1100.0, 1.0, 1.7, (800.0, 1000.0, 1100.0), 0.2, 0.4)


def test_the_au_of_all_rounds_lies_between_those_of_the_rounds():
    use = cpu_mark().until(cpu_mark())
    rounds = tuple(WindowRound(1000.0 + 50 * n, LoopTotals(800 + n, 0.2, 0.8, 1.0), 3000.0) for n in range(5))
    found = WindowMeasurements(rounds, (), 0.0, use, use, use)
    aus = [one.au for one in rounds]
    assert min(aus) <= found.clocks.images / found.clocks.elapsed_s / found.demand <= max(aus)
    assert found.au.low < fmean(aus) < found.au.high
    assert found.supply == pytest.approx(3000)


def test_an_emulated_trainer_requires_a_demand():
    with pytest.raises(ValueError, match="must be above 0"):
        EmulatedTrainer(0)


def test_threads_are_told_apart_by_name():
    assert group_of("[DALI][TP0]Exec", False) == "loader"
    assert group_of("[DALI] Executor", False) == "loader"
    assert group_of("python", False) == "others"
    assert group_of("[DALI]", True) == "main"


def test_cpu_time_is_split_completely():
    """Groups add up to the process's time, with threads that ended in "others"; neighbours have the rest."""
    before = CpuMark(0.0, {(1, "main"): 1.0, (2, "loader"): 5.0, (3, "others"): 2.0}, 8.0, 0.0, 100.0)
    after = CpuMark(4.0, {(1, "main"): 2.0, (2, "loader"): 7.0, (4, "loader"): 0.5}, 12.0, 0.25, 107.0)
    use = before.until(after)
    assert use.groups_s == {"main": 1.0, "loader": 2.5, "others": 0.5}
    assert use.own_s == pytest.approx(4.25)
    assert use.neighbours_s == pytest.approx(7.0 - 4.25)
    assert use.cores()["loader"] == pytest.approx(2.5 / 4)
    assert (use + use).cores() == pytest.approx(use.cores())


def test_the_cpu_clocks_can_be_read():
    use = cpu_mark().until(cpu_mark())
    assert use.wall_s > 0
    assert all(seconds >= 0 for seconds in (*use.groups_s.values(), use.neighbours_s))
