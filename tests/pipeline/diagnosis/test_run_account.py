"""The report belongs to the run: what the run's own clocks show, and whether the windows after it explain that."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import count

import pytest

from pipeline.diagnosis.findings import Findings, build_findings
from pipeline.diagnosis.html import report_html
from pipeline.diagnosis.run_account import BLOCKS, check_run, epoch_rates, had_slow_first_epoch
from pipeline.diagnosis.screen import format_findings
from pipeline.host import PressureMark
from pipeline.profiling.clocks import StepClocks
from pipeline.profiling.cpu_time import CpuMark
from pipeline.profiling.run_marks import MAX_MARKS, RunMarks
from tests.pipeline.diagnosis.planted_figures import (
    BATCH,
    CORES,
    DEMAND,
    HEALTHY,
    MEMORY,
    PLANTED,
    SETUP,
    found_for,
    windows,
)

STEP_S = BATCH / DEMAND
NORMAL = (0.0, STEP_S, STEP_S)  # wait, step and loop of a step as the windows have it
CROWDED = (0.2 * STEP_S, 9.8 * STEP_S, 10 * STEP_S)
COLD = (2 * STEP_S, STEP_S, 3 * STEP_S)
PAUSED = (0.0, STEP_S, 4 * STEP_S)
MEASURED = windows(HEALTHY)


class Counters:
    """What a fake machine counts from one reading to the next: ten seconds with so much of everything."""

    def __init__(self, neighbours: float = 0.0, throttled: int = 0, io_share: float = 0.0, swapped: int = 0) -> None:
        self.neighbours, self.throttled, self.io_share, self.swapped = neighbours, throttled, io_share, swapped
        self.numbers: Iterator[int] = count()

    def __call__(self) -> CpuMark:
        """The next reading."""
        at = 10 * next(self.numbers)
        waiting = {"io": round(at * 1e6 * self.io_share)}
        groups = ((10 * at, at // 10 * self.throttled, 10**8 * at),)
        pressure = PressureMark(float(at), groups, waiting, at * self.swapped)
        return CpuMark(float(at), {(1, "main"): 1.0 * at}, 1.0 * at, 0.0, (1 + self.neighbours) * at, pressure)


def run_of(*spells: tuple[int, tuple[float, float, float]], counters: Counters | None = None) -> StepClocks:
    """A run of so many steps of each kind; a new epoch begins with each spell."""
    clocks = StepClocks(RunMarks(0.0, counters) if counters else None)
    clocks.add(BATCH, 5.0, 1.0, 6.0, edge=True)
    for number, (steps, (wait_s, step_s, loop_s)) in enumerate(spells):
        for step in range(steps):
            clocks.add(BATCH, wait_s, step_s, loop_s, edge=number > 0 and step == 0)
    clocks.finish()
    return clocks


def found_of(clocks: StepClocks) -> Findings:
    return build_findings(HEALTHY, MEASURED, SETUP, MEMORY, {}, clocks=clocks)


def test_a_run_like_the_windows_is_explained_by_them():
    found = found_of(run_of((100, NORMAL)))
    assert found.check is not None and found.check.explained
    assert found.account == found.windows and found.account.verdict == "compute-bound"
    assert "100% of the windows after it: they explain it" in format_findings(found)


def test_background_load_only_during_the_run_is_the_verdict():
    """The run made a tenth of what the windows after it show; the CPU clocks of the run say who took the cores."""
    found = found_of(run_of((100, CROWDED), counters=Counters(neighbours=3.6)))
    assert found.account.together == pytest.approx(DEMAND / 10)
    assert found.account.au == found.au.mean == pytest.approx(0.1)
    assert (found.account.verdict, found.cause.name) == ("contention", "noisy neighbours")
    assert "used 3.6 of 4 cores then, 0.0 in the windows" in found.cause.because
    assert [action.change for action in found.actions] == ["neighbours"]
    assert found.actions[0].together == pytest.approx(MEASURED.clocks.images / MEASURED.clocks.elapsed_s)
    assert found.advice.startswith("noisy neighbours; first change: keep other processes off these cores")
    assert "the run made 200 img/s, the windows after it 1,9" in found.advice
    assert "do not explain it" in found.advice and "slow from step 1 (0 s) to 100 (64 s)" in found.advice
    assert found.windows.verdict == "compute-bound"
    assert sum(found.account.parts.values()) == pytest.approx(found.account.stall)
    screen = format_findings(found)
    assert "the run itself; the windows after it do not explain it" in screen
    assert max(map(len, screen.splitlines())) <= 120 and "do not explain it" in report_html(found, "a run")
    assert json.loads(json.dumps(found.record()))["run"]["explained"] is False


@pytest.mark.parametrize(
    ("kind", "counters", "verdict", "cause"),
    [
        (CROWDED, Counters(throttled=90), "contention", "CPU quota"),
        (CROWDED, Counters(swapped=10_000), "contention", "swap"),
        (CROWDED, Counters(), "unexplained", "changed conditions"),
        (COLD, Counters(io_share=0.6), "input-bound: storage", "slow storage"),
        (PAUSED, Counters(), "unexplained", "slow callback"),
        (COLD, None, "unexplained", "changed conditions"),
    ],
)
def test_what_differed_between_run_and_windows_is_the_cause(
    kind: tuple[float, float, float], counters: Counters | None, verdict: str, cause: str
):
    found = found_of(run_of((100, kind), counters=counters))
    assert (found.account.verdict, found.cause.name) == (verdict, cause)
    assert found.advice.startswith(cause)
    assert len(found.actions) == (cause != "changed conditions")


def test_a_cold_first_epoch_is_told_from_the_steady_state():
    """Enough of it, and it explains why the run was slower than the windows; less of it, and only a line says so."""
    found = found_of(run_of((100, COLD), (60, NORMAL), (60, NORMAL)))
    assert (found.account.verdict, found.cause.name) == ("input-bound: storage", "cold first epoch")
    assert "the first epoch made 667 img/s, later ones 2,000" in found.cause.because
    assert [action.change for action in found.actions] == ["memory"]
    short = found_of(run_of((10, COLD), (200, NORMAL), (200, NORMAL)))
    assert short.check is not None and short.check.explained
    assert "epochs     the first made 667 img/s, later ones 2,000" in format_findings(short)
    assert not had_slow_first_epoch(epoch_rates(run_of((60, NORMAL), (60, COLD))))


def test_since_when_a_run_was_slow():
    """The longest slow part, to within a fortieth of the run."""
    spell = found_of(run_of((120, NORMAL), (60, CROWDED), (20, NORMAL), (4, CROWDED))).check.spell  # type: ignore[union-attr]
    assert spell is not None
    assert abs(spell.first_step - 120) <= 204 // BLOCKS + 1 and abs(spell.end_step - 180) <= 204 // BLOCKS + 1
    assert spell.from_s == pytest.approx(120 * STEP_S, rel=0.1)
    assert spell.step_share > 0.9 and spell.wait_share + spell.step_share + spell.rest_share == pytest.approx(1)


def test_a_run_that_was_faster_than_the_windows_after_it():
    """Something disturbed the windows. The run shows that the trainer is faster than they say, so AU is not above 1."""
    fast = (0.0, STEP_S / 4, STEP_S / 4)
    found = found_of(run_of((100, fast)))
    assert found.check is not None and not found.check.explained and found.check.spell is None
    assert found.account.au == pytest.approx(1) and found.account.verdict == "compute-bound"
    assert "make the report again while nothing else runs" in found.advice


def test_a_short_run_is_not_compared():
    found = found_of(run_of((5, CROWDED)))
    assert found.check is None and found.account == found.windows
    assert "too few steps to compare" in format_findings(found)


@pytest.mark.parametrize("events", [False, True])
def test_a_run_on_an_asynchronous_device_is_judged_by_the_device(events: bool):
    """The host waits for each batch while the device works: that is free, and no reason for a slow run."""
    measured = replace(MEASURED, asynchronous=True)
    clocks = StepClocks()
    for number in range(101):
        clocks.add(BATCH, 0.9 * STEP_S, 0.1 * STEP_S, STEP_S)
        if events:
            clocks.add_device(0.0 if number else None, STEP_S)
    found = build_findings(HEALTHY, measured, SETUP, MEMORY, {}, clocks=clocks)
    assert found.check is not None and found.check.explained
    assert found.account.verdict == "compute-bound"


def test_pauses_are_parts_of_the_run_s_time():
    """Shares of steps, waits, the time between and each kind of pause add up to 1; long pauses are in the advice."""
    clocks = run_of((100, NORMAL))
    for seconds in (1.0, 2.0):
        clocks.pauses_s.setdefault("validation", []).append(seconds)
    found = found_of(clocks)
    shares = found.run["shares"]
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["validation"] == pytest.approx(3 / (3 + 100 * STEP_S))
    assert f"validation {shares['validation']:.1%} (2)" in format_findings(found)
    assert f"validation {shares['validation']:.0%} of the time, which AU does not count" in found.advice
    assert "of the whole run" not in found_of(run_of((100, NORMAL))).advice


def test_a_paused_function_is_timed_and_keeps_its_result():
    clocks = StepClocks()
    assert clocks.paused("validation", lambda epoch: epoch + 1)(3) == 4
    with pytest.raises(OSError):
        clocks.paused("checkpoints", lambda: (_ for _ in ()).throw(OSError()).__next__())()
    assert {name: len(seconds) for name, seconds in clocks.pauses_s.items()} == {"validation": 1, "checkpoints": 1}


def test_marks_stay_few_and_give_the_use_of_any_part():
    marks = RunMarks(1.0, Counters(neighbours=0.5))
    for step in range(2000):
        marks.after_step(step, float(step))
    marks.read(2000)
    assert MAX_MARKS / 4 < len(marks._marks) <= MAX_MARKS + 1
    use = marks.use(500, 900)
    assert use is not None and use.cores()["neighbours"] == pytest.approx(0.5)
    assert marks.use(7, 8) is not None
    assert RunMarks().use(0, 10) is None


@pytest.mark.parametrize("name", PLANTED)
def test_without_a_run_the_windows_are_the_verdict(name: str):
    found = found_for(name)
    assert found.check is None and found.account == found.windows and found.run == {}
    assert check_run(None, MEASURED) is None and SETUP.cores == CORES
