"""Does training wait for its input, for which part, and what to change.

The method is differential: rates measured apart (the feed alone and cut short, the trainer on replayed batches) explain
the rate measured together. Rates are img/s of all ranks together, times seconds per image unless a name says otherwise.

    supply     the feed alone                     AU         together / demand
    demand     the trainer on replayed batches    stall      1 - AU, in parts that add up
    together   the real run                       overlap    together / min(supply, demand)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pipeline.profiling.clocks import LoopTotals

AU_THRESHOLD = 0.95  # above it training does not wait; MLPerf Storage asks 0.90 of an emulated trainer
INPUT_PARTS = ("storage", "decode", "augment", "transfer")
PARTS = (*INPUT_PARTS, "contention", "unexplained")


@dataclass(frozen=True)
class LoaderThroughput:
    """img/s of the feed alone: the whole, and cut short after reading, after decoding and before the move to the device
    or the swap of halves between ranks (`augmented`; equals `supply` where there is neither)."""

    read: float
    decoded: float
    augmented: float
    supply: float

    def scaled_to(self, supply: float) -> LoaderThroughput:
        """The same shares of time in a feed of `supply` img/s, as measured in other weather."""
        factor = supply / self.supply
        return LoaderThroughput(self.read * factor, self.decoded * factor, self.augmented * factor, supply)

    def part_s(self) -> dict[str, float]:
        """Seconds per image that each stage adds to the one before, by part."""
        ends = (1 / self.read, 1 / self.decoded, 1 / self.augmented, 1 / self.supply)
        starts = (0.0, *ends[:-1])
        return {part: max(0.0, end - start) for part, start, end in zip(INPUT_PARTS, starts, ends, strict=True)}


@dataclass(frozen=True)
class StallReport:
    """`parts` are shares of the run's time by part; they add up to `stall`."""

    supply: float
    demand: float
    together: float
    au: float
    stall: float
    overlap: float
    parts: dict[str, float]
    verdict: str
    action: str

    def record(self) -> dict[str, Any]:
        """For stall.json."""
        return asdict(self)


def account_stall(
    rates: LoaderThroughput, demand: float, clocks: LoopTotals, au_threshold: float = AU_THRESHOLD
) -> StallReport:
    """Explains the real run's rate by the rates measured apart. Above an AU of `au_threshold` training does not wait."""
    together = clocks.images / clocks.elapsed_s
    au = together / demand
    parts = _parts(rates, demand, clocks)
    verdict = _verdict(au, parts, au_threshold)
    overlap = together / min(rates.supply, demand)
    return StallReport(
        rates.supply, demand, together, au, 1 - au, overlap, parts, verdict, _action(verdict, rates.supply, demand)
    )


def _parts(rates: LoaderThroughput, demand: float, clocks: LoopTotals) -> dict[str, float]:
    """Shares of the run's time. An image takes T = wait + step + the rest, and would take D = 1 / demand.

    Of the wait, the feed's own slowness explains 1 / supply - D (it works while the trainer does); the stages share it
    by their cost. The rest of the wait, and steps slower than D, come from feed and trainer taking each other's cores.
    """
    total_s, wait_s, step_s = (x / clocks.images for x in (clocks.elapsed_s, clocks.wait_s, clocks.step_s))
    demand_s = 1 / demand
    inherent_s = min(wait_s, max(0.0, 1 / rates.supply - demand_s))
    stage_s = rates.part_s()
    parts_s = {part: inherent_s * stage_s[part] / sum(stage_s.values()) for part in INPUT_PARTS}
    parts_s["contention"] = (wait_s - inherent_s) + max(0.0, step_s - demand_s)
    parts_s["unexplained"] = (total_s - demand_s) - sum(parts_s.values())
    return {part: seconds / total_s for part, seconds in parts_s.items()}


def _verdict(au: float, parts: dict[str, float], au_threshold: float) -> str:
    if au >= au_threshold:
        return "compute-bound"
    input_share = sum(parts[part] for part in INPUT_PARTS)
    if parts["unexplained"] > max(input_share, parts["contention"]):
        return "unexplained"
    if input_share > parts["contention"]:
        return f"input-bound: {max(INPUT_PARTS, key=lambda part: parts[part])}"
    return "contention"


_ACTIONS = {
    "storage": "move the shards to a faster disk or into memory",
    "decode": "give the feed more --threads or cores, or shard with --stored square (a quarter less to decode)",
    "augment": "give the feed more --threads or cores",
    "transfer": "build the batches on the training device (--device cuda); between ranks, give them a faster link",
}


def _action(verdict: str, supply: float, demand: float) -> str:
    if verdict == "compute-bound":
        return f"the feed has {supply / demand:.1f} times what training takes: only a faster step trains faster"
    if verdict == "unexplained":
        return "neither feed nor step: look at what runs between steps (callbacks, logging, reading values back)"
    if verdict == "contention":
        return "feed and trainer take each other's cores: give the host more of them, or train on a GPU"
    return _ACTIONS[verdict.removeprefix("input-bound: ")]


def format_report(report: StallReport) -> str:
    """The report as one screen of text."""
    rows = [
        f"verdict    {report.verdict}",
        f"           {report.action}",
        "",
        f"supply     {report.supply:10,.0f} img/s  the feed alone",
        f"demand     {report.demand:10,.0f} img/s  the trainer on replayed batches",
        f"together   {report.together:10,.0f} img/s  the real run",
        f"AU         {report.au:10.1%}        together / demand",
        f"overlap    {report.overlap:10.1%}        together / min(supply, demand)",
        f"stall      {report.stall:10.1%}        1 - AU, of which",
    ]
    rows += [f"  {part:<12}{share:7.1%}  {_bar(share)}".rstrip() for part, share in report.parts.items()]
    return "\n".join(rows)


def _bar(share: float) -> str:
    return "#" * round(max(0.0, share) * 50)
