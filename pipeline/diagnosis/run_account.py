"""A run by its own clocks, compared with the windows that are measured after it.

The windows explain a run only if they went as the run did. If another job took the cores during the run, or the page
cache was cold then, the windows see nothing of it. So the run's throughput is compared with theirs first. If it
differs, the verdict is the run's: its clocks say when it was slow and where the time went, and the CPU use and pressure
that were read meanwhile (`RunMarks`) say why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median

import numpy as np

from pipeline.diagnosis.accounting import PARTS, LoaderThroughput, StallAccount, account_stall
from pipeline.diagnosis.causes import Cause
from pipeline.diagnosis.predict import Action, Change
from pipeline.diagnosis.workload import NEIGHBOURS_SHARE, SWAPPED_BYTES_S, THROTTLED_SHARE
from pipeline.profiling.clocks import LoopTotals, StepClocks
from pipeline.profiling.confidence import Interval, t_interval
from pipeline.profiling.cpu_time import CpuUse
from pipeline.profiling.device_timeline import device_idle
from pipeline.profiling.windows import WindowMeasurements

MIN_RUN_STEPS = 10  # counted steps: with fewer, a run's throughput says little
TOLERANCE = 0.15  # of the windows' throughput: a run within it, of the slowest and fastest round, is explained by them
BLOCKS = 40  # parts of a run, to find since when it was slow
MIN_EPOCH_STEPS = 5  # counted steps of an epoch, to compare it with others
MORE_IO_SHARE = 0.1  # of the time: so much more waiting for storage in the run than in the windows is a cause


@dataclass(frozen=True)
class Spell:
    """The longest part of a run that was slower than the windows after it.

    Attributes:
        first_step: counted steps before it.
        end_step: counted steps at its end.
        from_s: seconds of training before it, without pauses.
        to_s: seconds of training at its end.
        img_s: its throughput.
        wait_share: share of its time in next(), by the host's clocks.
        step_share: share of its time in training steps.
    """

    first_step: int
    end_step: int
    from_s: float
    to_s: float
    img_s: float
    wait_share: float
    step_share: float

    @property
    def rest_share(self) -> float:
        """Share of its time between steps."""
        return max(0.0, 1 - self.wait_share - self.step_share)

    def __str__(self) -> str:
        return (
            f"slow from step {self.first_step + 1:,} ({self.from_s:,.0f} s) to {self.end_step:,} ({self.to_s:,.0f} s):"
            f" {self.img_s:,.0f} img/s; waits {self.wait_share:.0%}, steps {self.step_share:.0%},"
            f" the rest {self.rest_share:.0%} of that time"
        )


@dataclass(frozen=True)
class RunCheck:
    """Whether the windows after a run explain it.

    Attributes:
        img_s: throughput of the run.
        windows_img_s: throughput of loader and trainer together, in the windows.
        explained: whether they differ by no more than `TOLERANCE` and the rounds do.
        spell: since when the run was slower; None if it was not.
    """

    img_s: float
    windows_img_s: float
    explained: bool
    spell: Spell | None = None

    @property
    def slower(self) -> bool:
        """Whether the run was slower than the windows explain."""
        return not self.explained and self.img_s < self.windows_img_s

    def __str__(self) -> str:
        share = f"{self.img_s:,.0f} img/s, {self.img_s / self.windows_img_s:.0%} of the windows after it"
        return f"{share}: they {'' if self.explained else 'do not '}explain it"


def check_run(clocks: StepClocks | None, measured: WindowMeasurements) -> RunCheck | None:
    """Compares a run with the windows after it; None without a run, or if it has too few steps for that."""
    if clocks is None or clocks.steps < MIN_RUN_STEPS:
        return None
    total, after = clocks.total(), measured.clocks
    rounds = [one.together for one in measured.rounds]
    low, high = (1 - TOLERANCE) * min(rounds), (1 + TOLERANCE) * max(rounds)
    img_s = total.images / total.elapsed_s
    check = RunCheck(img_s, after.images / after.elapsed_s, low <= img_s <= high)
    return (
        check if check.explained or img_s > high else RunCheck(img_s, check.windows_img_s, False, _spell(clocks, low))
    )


def _spell(clocks: StepClocks, low: float) -> Spell:
    """The longest row of blocks with less than `low` img/s; the whole run if there is none."""
    ends = np.unique(np.linspace(0, clocks.steps, min(BLOCKS, clocks.steps) + 1).astype(int)).tolist()
    slow = [rate < low for rate in _rates(clocks, ends)]
    best, start = (0, 0), 0
    for number, is_slow in enumerate([*slow, False]):
        if not is_slow:
            best = max(best, (start, number), key=lambda row: row[1] - row[0])
            start = number + 1
    first, end = (ends[best[0]], ends[best[1]]) if best[1] > best[0] else (0, clocks.steps)
    loops_s = np.array(clocks.loops_s)
    took_s = float(loops_s[first:end].sum())
    before_s = float(loops_s[:first].sum())
    return Spell(
        first_step=first,
        end_step=end,
        from_s=before_s,
        to_s=before_s + took_s,
        img_s=sum(clocks.sizes[first:end]) / took_s,
        wait_share=sum(clocks.waits_s[first:end]) / took_s,
        step_share=sum(clocks.steps_s[first:end]) / took_s,
    )


def _rates(clocks: StepClocks, ends: Sequence[int]) -> list[float]:
    """img/s of the steps between each two of `ends`."""
    return [sum(clocks.sizes[a:b]) / sum(clocks.loops_s[a:b]) for a, b in pairwise(ends)]


def epoch_rates(clocks: StepClocks) -> list[float]:
    """img/s of each epoch of a run that has at least `MIN_EPOCH_STEPS` counted steps."""
    ends = [0, *clocks.epochs, clocks.steps]
    return [_rates(clocks, pair)[0] for pair in pairwise(ends) if pair[1] - pair[0] >= MIN_EPOCH_STEPS]


def had_slow_first_epoch(rates: Sequence[float]) -> bool:
    """Whether the first epoch was slower than the later ones, as with a cold page cache."""
    return len(rates) > 1 and rates[0] < (1 - TOLERANCE) * median(rates[1:])


def run_totals(clocks: StepClocks, measured: WindowMeasurements) -> LoopTotals:
    """The sums of a run. On an asynchronous device waits count only as far as the device was idle: by its own events,
    or, without any, by its queue."""
    total = clocks.total()
    if not measured.asynchronous:
        return total
    by_events = clocks.idle_by_events()
    if by_events is None:
        times = zip(clocks.waits_s, clocks.steps_s, clocks.loops_s, strict=True)
        host_s = [(wait_s, step_s, max(0.0, loop_s - wait_s - step_s)) for wait_s, step_s, loop_s in times]
        idle = device_idle(host_s, total.images / clocks.steps / measured.demand)
        by_events = sum(idle.wait_s), sum(idle.rest_s)
    input_s, rest_s = by_events
    return LoopTotals(total.images, input_s, max(0.0, total.elapsed_s - input_s - rest_s), total.elapsed_s)


@dataclass(frozen=True)
class Judgement:
    """Verdict, cause and advice: of the windows, or of a run that the windows after it do not explain.

    Attributes:
        account: figures, parts and verdict.
        au: mean AU of the rounds, or of parts of the run, with its confidence interval.
        cause: the likely cause of the stall.
        actions: changes worth making, best first.
        advice: the line under the verdict.
    """

    account: StallAccount
    au: Interval
    cause: Cause
    actions: tuple[Action, ...]
    advice: str


def judge_run(
    check: RunCheck,
    clocks: StepClocks,
    measured: WindowMeasurements,
    loader: LoaderThroughput,
    cores: float,
    au_threshold: float,
) -> Judgement:
    """Judges a run by its own clocks.

    Args:
        check: of the run.
        clocks: of the run.
        measured: the windows after it.
        loader: the loader alone, in the windows.
        cores: cores of this host on which the job may run.
        au_threshold: from this AU on the verdict is "compute-bound".
    """
    totals = run_totals(clocks, measured)
    demand = measured.demand
    if not check.slower:  # the run shows that the trainer is faster than the windows after it say
        own = totals.images / totals.step_s if totals.step_s and not measured.asynchronous else check.img_s
        demand = max(demand, own)
        loader = loader.scaled_to(max(loader.supply, check.img_s))  # and so does its loader
    account = account_stall(loader, demand, totals, au_threshold)
    au = _interval(clocks, demand)
    unlike = f"the run made {check.img_s:,.0f} img/s, the windows after it {check.windows_img_s:,.0f}"
    if check.spell is None:
        cause = Cause("changed conditions", "the windows after the run were slower than the run")
        again = "make the report again while nothing else runs: train.py --resume"
        return Judgement(account, au, cause, (), f"{unlike}: they do not explain it; {again}")
    verdict, cause, change = _explained_by(check.spell, clocks, measured, cores)
    account = _with_verdict(account, verdict)
    actions = (Action(change, REMEDY_TEXTS[change], {}, loader.supply, check.windows_img_s),) if change else ()
    first = f"; first change: {actions[0].text}" if actions else ""
    return Judgement(
        account, au, cause, actions, f"{cause.name}{first}; {unlike}: they do not explain it; {check.spell}"
    )


REMEDY_TEXTS: dict[Change, str] = {
    "neighbours": "keep other processes off these cores during the run",
    "quota": "raise the container's CPU quota",
    "swap": "free memory, or use fewer ranks or a smaller batch",
    "memory": "read the set into memory before the run",
    "disk": "a faster disk, or memory for the set",
    "callback": "take what runs between steps out of the loop",
}


def _explained_by(
    spell: Spell, clocks: StepClocks, measured: WindowMeasurements, cores: float
) -> tuple[str, Cause, Change | None]:
    """Verdict, cause and remedy of a slow part of a run, by what differed from the windows after it."""
    then, now = clocks.marks.use(spell.first_step, spell.end_step) if clocks.marks else None, measured.real_cpu
    if then is not None and (found := _by_cores(then, now, cores)):
        return found
    rates = epoch_rates(clocks)
    if spell.wait_share > max(spell.rest_share, _slower_step_share(spell, measured)):
        if had_slow_first_epoch(rates) and spell.end_step <= clocks.epochs[0] + clocks.steps // BLOCKS + 1:
            later = f"later ones {median(rates[1:]):,.0f}, mostly from memory"
            cold = Cause("cold first epoch", f"the first epoch made {rates[0]:,.0f} img/s, {later}")
            return "input-bound: storage", cold, "memory"
        io, io_now = (use.pressure.waiting_shares.get("io", 0.0) if use else 0.0 for use in (then, now))
        if io > io_now + MORE_IO_SHARE:
            share = f"some task waited for storage in {io:.0%} of that time, in {io_now:.0%} of the windows"
            return "input-bound: storage", Cause("slow storage", share), "disk"
    if spell.rest_share > max(spell.wait_share, _slower_step_share(spell, measured)):
        return (
            "unexplained",
            Cause("slow callback", f"{spell.rest_share:.0%} of that time passed between steps"),
            "callback",
        )
    return "unexplained", Cause("changed conditions", "neither cores nor storage show why"), None


def _by_cores(then: CpuUse, now: CpuUse, cores: float) -> tuple[str, Cause, Change] | None:
    """Contention for cores or memory during a part of a run that was absent from the windows."""
    share, share_now = then.pressure.throttled_share, now.pressure.throttled_share
    if share > max(THROTTLED_SHARE, 2 * share_now):
        often = f"throttled in {share:.0%} of the quota's periods then, in {share_now:.0%} in the windows"
        return "contention", Cause("CPU quota", often), "quota"
    taken, taken_now = then.cores()["neighbours"], now.cores()["neighbours"]
    if taken - taken_now > NEIGHBOURS_SHARE * cores:
        used = f"processes outside this job used {taken:.1f} of {cores:g} cores then, {taken_now:.1f} in the windows"
        return "contention", Cause("noisy neighbours", used), "neighbours"
    if then.pressure.swapped_in_bytes > SWAPPED_BYTES_S * then.wall_s:
        read = f"{then.pressure.swapped_in_bytes / 2**20:,.0f} MiB were read from swap then"
        return "contention", Cause("swap", read), "swap"
    return None


def _slower_step_share(spell: Spell, measured: WindowMeasurements) -> float:
    """Share of a slow part's time by which its steps took longer than replayed ones."""
    return max(0.0, spell.step_share - spell.img_s / measured.demand)


def _with_verdict(account: StallAccount, verdict: str) -> StallAccount:
    """The account with the whole stall in the part that the verdict names."""
    parts = dict.fromkeys(PARTS, 0.0)
    parts[verdict.removeprefix("input-bound: ")] = max(0.0, account.stall)
    figures = account.record() | {"parts": parts, "verdict": verdict, "leaning": verdict}
    return StallAccount(**figures)


def _interval(clocks: StepClocks, demand: float) -> Interval:
    """AU of ten parts of the run, around the AU of the whole."""
    ends = np.unique(np.linspace(0, clocks.steps, 11).astype(int)).tolist()
    rates = _rates(clocks, ends)
    whole = clocks.total().images / clocks.total().elapsed_s / fmean(rates)
    return t_interval([rate * whole / demand for rate in rates])
