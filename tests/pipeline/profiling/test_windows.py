"""The doctor's measuring, with trainers and feeds that only count: windows alternate, intervals are Student's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, pairwise
from statistics import fmean, stdev

import pytest

from pipeline.profiling.clocks import LoopTotals
from pipeline.profiling.confidence import t_interval
from pipeline.profiling.cpu_time import CpuMark, cpu_mark, group_of
from pipeline.profiling.windows import (
    EmulatedTrainer,
    StepTiming,
    TrainerUnderTest,
    WindowMeasurements,
    WindowRound,
    attribute_waits,
    measure_windows,
)


def test_the_interval_is_student_s():
    """Against the printed table: t(0.975) is 12.706, 4.303, 2.776 for 1, 2, 4 degrees of freedom."""
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
    """The feed alone, replayed batches, real steps, and again; `after` and the clocks are of real steps only."""
    taken: list[int] = []
    after: list[int] = []
    subject = TrainerUnderTest[int](size=lambda _: 8, step=taken.append, after=after.append)
    found = measure_windows(count(), subject, [-1, -2], seconds=1e-4, discard=3, rounds=rounds)
    real = [batch for batch in taken if batch >= 0]
    assert real == sorted(set(real)), "no batch of the feed is trained on twice"
    assert after == real[1:]
    assert sum(a < 0 <= b for a, b in pairwise(taken)) == len(found.rounds) == rounds
    assert sum(b - a > 1 for a, b in pairwise(real)) == rounds, "the feed's own windows pass batches by"
    assert 0 < found.clocks.images <= 8 * (len(real) - 1 - 3 * rounds)
    assert found.clocks.elapsed_s == pytest.approx(sum(turn.clocks.elapsed_s for turn in found.rounds))
    for turn in found.rounds:
        assert turn.clocks.wait_s + turn.clocks.step_s <= turn.clocks.elapsed_s + 1e-9


@dataclass
class Clock:
    """Goes on by what it is told, and ranks agree on it."""

    at_s: float = 0.0
    began_s: float = 0.0
    windows_s: list[float] = field(default_factory=list)

    def agree(self, number: int) -> int:
        """Of a window: 0 where it begins, then the time that it has taken, whatever the number."""
        if not number:
            self.began_s = self.at_s
            return 0
        self.windows_s.append(self.at_s - self.began_s)
        return round(1e9 * self.windows_s[-1])


@pytest.mark.parametrize("ready", [0, 3, 20])
def test_windows_are_as_long_as_they_should_be(ready: int):
    """By the clock that ranks agree on, whatever was ready beforehand, and if it is more than is discarded."""
    clock, batch_s, step_s = Clock(), 0.01, 0.004

    def feed() -> Iterator[int]:
        for number in count():
            clock.at_s += batch_s if number >= ready else 0
            yield number

    def step(batch: int) -> None:
        clock.at_s += step_s

    found = measure_windows(
        feed(), TrainerUnderTest[int](lambda _: 8, step), [-1], seconds=1.0, discard=1, rounds=2, agree=clock.agree
    )
    assert max(clock.windows_s) == pytest.approx(1.0, rel=0.01)
    for turn in found.rounds:
        assert (turn.supply, turn.demand) == pytest.approx((8 / batch_s, 8 / step_s))
        assert turn.clocks.images == 8 * round(1 / (batch_s + step_s))


def test_what_others_wait_for_a_rank_s_batch_is_wait_not_step():
    """Two ranks of one step: one waits 3 s for its batch, the other 1 s, and 2 s more in its step for the first."""
    for wait_s, step_s in ((1.0, 5.0), (3.0, 3.0)):
        own, step = LoopTotals(8, wait_s, step_s, 7.0), StepTiming(0.0, wait_s, step_s, 1.0)
        clocks, steps = attribute_waits(own, [step], lambda number: max(number, 3 * 10**9))
        assert (clocks, steps) == (LoopTotals(8, 3.0, 3.0, 7.0), [StepTiming(0.0, 3.0, 3.0, 1.0)])


def test_the_whole_au_lies_among_the_rounds():
    use = cpu_mark().until(cpu_mark())
    rounds = tuple(WindowRound(1000.0 + 50 * n, LoopTotals(800 + n, 0.2, 0.8, 1.0), 3000.0) for n in range(5))
    found = WindowMeasurements(rounds, (), 0.0, use, use, use)
    aus = [turn.au for turn in rounds]
    assert min(aus) <= found.clocks.images / found.clocks.elapsed_s / found.demand <= max(aus)
    assert found.au.low < fmean(aus) < found.au.high
    assert found.supply == pytest.approx(3000)


def test_an_emulated_trainer_wants_a_demand():
    with pytest.raises(ValueError, match="must be above 0"):
        EmulatedTrainer(0)


def test_threads_are_told_apart_by_name():
    assert group_of("[DALI][TP0]Exec", False) == "feed"
    assert group_of("[DALI] Executor", False) == "feed"
    assert group_of("python", False) == "others"
    assert group_of("[DALI]", True) == "main"


def test_cpu_time_is_shared_out_whole():
    """Groups add up to the process's time; threads that ended are others', the rest of the machine is neighbours'."""
    before = CpuMark(0.0, {(1, "main"): 1.0, (2, "feed"): 5.0, (3, "others"): 2.0}, 8.0, 0.0, 100.0)
    after = CpuMark(4.0, {(1, "main"): 2.0, (2, "feed"): 7.0, (4, "feed"): 0.5}, 12.0, 0.25, 107.0)
    use = before.until(after)
    assert use.groups_s == {"main": 1.0, "feed": 2.5, "others": 0.5}
    assert use.own_s == pytest.approx(4.25)
    assert use.neighbours_s == pytest.approx(7.0 - 4.25)
    assert use.cores()["feed"] == pytest.approx(2.5 / 4)
    assert (use + use).cores() == pytest.approx(use.cores())


def test_the_clocks_of_this_machine_can_be_read():
    use = cpu_mark().until(cpu_mark())
    assert use.wall_s > 0
    assert all(seconds >= 0 for seconds in (*use.groups_s.values(), use.neighbours_s))
