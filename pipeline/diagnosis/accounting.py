"""Stall accounting: how long training waits, for which part of its input, and the verdict.

The method is differential: throughputs measured apart (the loader alone and cut short, the trainer on replayed batches)
explain the throughput measured together. A throughput is img/s of all ranks together; seconds are per image unless a
name says otherwise. `causes` and `predict` take it from here; this module gives no advice.

    supply     the loader alone                   AU         accelerator utilisation: together / demand
    demand     the trainer on replayed batches    stall      1 - AU, split into parts that add up
    together   both at the same time              overlap    together / min(supply, demand)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pipeline.profiling.clocks import LoopTotals

if TYPE_CHECKING:  # it imports SciPy, which `--help` must not pay for
    from pipeline.profiling.confidence import Interval

AU_THRESHOLD = 0.95  # from this AU on training does not wait; MLPerf Storage requires 0.90 of an emulated trainer
INPUT_PARTS = ("storage", "decode", "augment", "transfer")
PARTS = (*INPUT_PARTS, "contention", "unexplained")
INDISTINCT = "not distinguishable from the threshold"


@dataclass(frozen=True)
class LoaderThroughput:
    """img/s of the loader alone, cut short after each stage.

    Attributes:
        read: after reading.
        decoded: after reading and decoding.
        augmented: after augmentation, before ranks of a pair swap halves; equals `supply` without a swap.
        supply: the whole loader.
    """

    read: float
    decoded: float
    augmented: float
    supply: float

    def scaled_to(self, supply: float) -> LoaderThroughput:
        """The same shares of time in a loader of `supply` img/s, which was measured under other background load."""
        factor = supply / self.supply
        return LoaderThroughput(self.read * factor, self.decoded * factor, self.augmented * factor, supply)

    def part_s(self) -> dict[str, float]:
        """Seconds per image that each stage adds to the one before it, by part."""
        ends = (1 / self.read, 1 / self.decoded, 1 / self.augmented, 1 / self.supply)
        starts = (0.0, *ends[:-1])
        return {part: max(0.0, end - start) for part, start, end in zip(INPUT_PARTS, starts, ends, strict=True)}


@dataclass(frozen=True)
class StallAccount:
    """The figures of a stall report.

    Attributes:
        supply: img/s of the loader alone.
        demand: img/s of the trainer on replayed batches.
        together: img/s of the real run.
        au: accelerator utilisation, together / demand.
        stall: 1 - au.
        overlap: together / min(supply, demand).
        parts: shares of the run's time, by part, each 0 to 1; they add up to `stall`, or to 0 if `au` is above 1.
        verdict: "compute-bound", "input-bound: <part>", "contention", "unexplained", or, if the measurement does not
            decide between the first and the rest, `INDISTINCT` with the AU that it allows.
        leaning: the verdict if the measurement had decided.
    """

    supply: float
    demand: float
    together: float
    au: float
    stall: float
    overlap: float
    parts: dict[str, float]
    verdict: str
    leaning: str

    def record(self) -> dict[str, Any]:
        """The figures for stall.json."""
        return asdict(self)


def account_stall(
    loader: LoaderThroughput,
    demand: float,
    clocks: LoopTotals,
    au_threshold: float = AU_THRESHOLD,
    interval: Interval | None = None,
) -> StallAccount:
    """Explains the throughput of the real run by the throughputs measured apart.

    Args:
        loader: the loader alone.
        demand: img/s of the trainer on replayed batches.
        clocks: totals of the real run. On an asynchronous device, by the device's idle time (`idle_totals`).
        au_threshold: from this AU on the verdict is "compute-bound".
        interval: confidence interval of AU. If the threshold lies within it, the verdict says so.
    """
    together = clocks.images / clocks.elapsed_s
    au = together / demand
    parts = _parts(loader, demand, clocks)
    overlap = together / min(loader.supply, demand)
    leaning = "compute-bound" if au >= au_threshold else largest_part(parts)
    verdict = leaning
    if doubt := _doubt(au, au_threshold, loader.supply / demand, interval):
        verdict = f"{INDISTINCT}: {doubt}"
        leaning = largest_part(parts)
    return StallAccount(loader.supply, demand, together, au, 1 - au, overlap, parts, verdict, leaning)


def _doubt(au: float, au_threshold: float, supply_ratio: float, interval: Interval | None) -> str:
    """Why AU is neither above nor below the threshold for certain; empty if it is.

    A run cannot be faster than its loader, so a loader that alone is slower than the threshold contradicts a higher AU.
    """
    low, high = (interval.low, interval.high) if interval else (au, au)
    if au >= au_threshold > supply_ratio:
        return f"AU {low:.0%} to {high:.0%}, and the loader alone allows {supply_ratio:.0%}"
    return f"AU {low:.0%} to {high:.0%}" if low < au_threshold <= high else ""


def _parts(loader: LoaderThroughput, demand: float, clocks: LoopTotals) -> dict[str, float]:
    """Shares of the run's time. An image takes T = wait + step + the rest; without a stall it takes D = 1 / demand.

    The loader works while the trainer does, so its own slowness explains 1 / supply - D of the wait; the stages share
    that by their cost. The rest of the wait, and steps that take longer than D, are contention: loader and trainer use
    the same cores. What neither wait nor step explains is unexplained.

    If steps were faster than the replayed ones, the parts exceed what T has beyond D. All are then scaled down to it.
    """
    total_s, wait_s, step_s = (x / clocks.images for x in (clocks.elapsed_s, clocks.wait_s, clocks.step_s))
    demand_s = 1 / demand
    inherent_s = min(wait_s, max(0.0, 1 / loader.supply - demand_s))
    stage_s = loader.part_s()
    parts_s = {part: inherent_s * stage_s[part] / sum(stage_s.values()) for part in INPUT_PARTS}
    parts_s["contention"] = (wait_s - inherent_s) + max(0.0, step_s - demand_s)
    parts_s["unexplained"] = max(0.0, total_s - wait_s - step_s)
    stall_s, found_s = max(0.0, total_s - demand_s), sum(parts_s.values())
    scale = min(1.0, stall_s / found_s) if found_s else 0.0
    return {part: scale * seconds / total_s for part, seconds in parts_s.items()}


def largest_part(parts: dict[str, float]) -> str:
    """The verdict on a run that waits: its largest part."""
    input_share = sum(parts[part] for part in INPUT_PARTS)
    if parts["unexplained"] > max(input_share, parts["contention"]):
        return "unexplained"
    if input_share > parts["contention"]:
        return f"input-bound: {max(INPUT_PARTS, key=lambda part: parts[part])}"
    return "contention"


def verdict_kind(verdict: str) -> str:
    """A verdict without figures, which two reports may share."""
    return INDISTINCT if verdict.startswith(INDISTINCT) else verdict


def format_account(account: StallAccount, run: str = "") -> str:
    """The figures as lines of text, without the verdict.

    Args:
        account: the figures.
        run: the line of the run, if `account` is of a run that the windows after it do not explain.
    """
    together = f"{account.together:10,.0f} img/s"
    over = "the run" if run else "together"
    rows = [
        f"supply     {account.supply:10,.0f} img/s  the loader alone",
        f"demand     {account.demand:10,.0f} img/s  the trainer on replayed batches",
        run or f"together   {together}  loader and trainer at the same time",
        f"AU         {account.au:10.1%}        accelerator utilisation: {over} / demand",
        f"overlap    {account.overlap:10.1%}        {over} / min(supply, demand)",
        f"stall      {account.stall:10.1%}        1 - AU, split into",
    ]
    rows += [f"  {part:<12}{share:7.1%}  {_text_bar(share)}".rstrip() for part, share in account.parts.items()]
    return "\n".join(rows)


def _text_bar(share: float) -> str:
    return "#" * round(max(0.0, share) * 50)
