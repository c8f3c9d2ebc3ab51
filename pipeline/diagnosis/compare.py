"""What changed between two stall reports: figures with intervals, parts, verdict, cause, and what was measured on.

A regression is a decline of `together`, AU or `supply` by more than the tolerance that noise does not explain. A change
is within noise if its 95% confidence interval contains 0; the intervals come from the rounds of both reports. A report
without rounds has none, and then the figure alone decides. AU is `together / demand`, so a faster training step lowers
it: a decline of AU is no regression if `together` rose.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.diagnosis.accounting import PARTS, verdict_kind
from pipeline.profiling.difference import Spread, change_interval, spread_of_interval, spread_of_values

FIGURES = ("together", "supply", "demand", "au")
REGRESSIONS = ("together", "supply", "au")  # figures whose decline is a regression
TOLERANCE = 0.05
TEXTS = ("verdict", "cause", "first action")
SURROUNDINGS = ("environment", "host", "ranks", "device", "au_threshold", "window_s", "cold")
MEASURED = {  # entries of these that are measurements, not settings
    "host.available_bytes",
    "host.throttled_s",
    "host.throttled_share",
    "host.swapped_in_bytes",
    "environment.hardware_decoding.because",
}
MEASURED_GROUPS = ("host.waiting_shares.",)
NOT_RECORDED = "not recorded"
NAME_WIDTH = 13
MEASURE_LONGER = "measure longer: --stall-seconds of train.py, --seconds of bench_loader.py"


@dataclass(frozen=True)
class Change:
    """The change of a figure.

    Attributes:
        before: the figure of the first report.
        after: the figure of the second report.
        change: after / before - 1.
        low: lower end of the 95% confidence interval of `change`; None if a report has no rounds.
        high: its upper end.
        regression: whether it is a decline that counts, beyond the tolerance and beyond noise.
    """

    before: float
    after: float
    change: float
    low: float | None
    high: float | None
    regression: bool = False

    @property
    def within_noise(self) -> bool | None:
        """Whether the interval contains no change; None without an interval."""
        return None if self.low is None or self.high is None else self.low <= 0 <= self.high


@dataclass(frozen=True)
class Comparison:
    """What changed between two stall reports.

    Attributes:
        figures: by name, those of `FIGURES` that both reports have.
        parts: for each part of the stall, its share of the time before and after; empty if a report has none.
        texts: verdict, cause and first action that differ, before and after.
        surroundings: settings, machine, versions and the like that differ, before and after.
        tolerance: the decline from which on a figure is a regression.
    """

    figures: dict[str, Change]
    parts: dict[str, tuple[float, float]]
    texts: dict[str, tuple[str, str]]
    surroundings: dict[str, tuple[Any, Any]]
    tolerance: float

    @property
    def regressions(self) -> list[str]:
        """Names of the figures that declined beyond tolerance and noise."""
        return [name for name, change in self.figures.items() if change.regression]

    def record(self) -> dict[str, Any]:
        """The comparison as JSON."""
        figures = {name: asdict(one) | {"within_noise": one.within_noise} for name, one in self.figures.items()}
        pairs = {name: _before_after(getattr(self, name)) for name in ("parts", "texts", "surroundings")}
        return {"figures": figures, **pairs, "tolerance": self.tolerance, "regressions": self.regressions}


def _before_after(pairs: Mapping[str, tuple[Any, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {"before": before, "after": after} for name, (before, after) in pairs.items()}


def compare(before: Mapping[str, Any], after: Mapping[str, Any], tolerance: float = TOLERANCE) -> Comparison:
    """Compares two records of stall.json, each checked by `check_report`."""
    figures = {
        name: _change(name, before, after)
        for name in FIGURES
        if before.get(name) is not None and after.get(name) is not None
    }
    together = figures.get("together")
    rose = together is not None and together.change > 0 and not together.within_noise
    for name in REGRESSIONS:
        if name in figures and not (name == "au" and rose):
            figures[name] = _judged(figures[name], tolerance)
    both = before.get("parts") and after.get("parts")
    parts = {part: (before["parts"].get(part, 0.0), after["parts"].get(part, 0.0)) for part in PARTS} if both else {}
    said = [_texts(report) for report in (before, after)]
    texts = {name: (said[0][name], said[1][name]) for name in TEXTS if said[0][name] != said[1][name]}
    old, new = (dict(_leaves(report)) for report in (before, after))
    names = [*old, *(name for name in new if name not in old)]
    found = {name: (old.get(name, NOT_RECORDED), new.get(name, NOT_RECORDED)) for name in names}
    return Comparison(figures, parts, texts, {k: pair for k, pair in found.items() if pair[0] != pair[1]}, tolerance)


def _change(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Change:
    change = after[name] / before[name] - 1
    spreads = [_spread(name, report) for report in (before, after)]
    low, high = change_interval(change, spreads[0], spreads[1]) if spreads[0] and spreads[1] else (None, None)
    return Change(before[name], after[name], change, low, high)


def _judged(one: Change, tolerance: float) -> Change:
    regression = one.change < -tolerance and not one.within_noise
    return Change(one.before, one.after, one.change, one.low, one.high, regression)


def _spread(name: str, report: Mapping[str, Any]) -> Spread | None:
    """How well a figure is known. `together` of a run that the windows do not explain is known as well as its AU."""
    interval, rounds = report.get("au_interval"), report.get("rounds_img_s", {}).get(name)
    by_run = name == "together" and (report.get("run") or {}).get("explained") is False
    if interval and (name == "au" or by_run):
        return spread_of_interval(**{key: interval[key] for key in ("mean", "low", "high", "windows", "level")})
    return spread_of_values(rounds) if rounds and len(rounds) > 1 else None


def _texts(report: Mapping[str, Any]) -> dict[str, str]:
    """Verdict, name of the cause and text of the first action."""
    actions = report.get("actions")
    action = (actions[0]["text"] if actions else "none") if actions is not None else NOT_RECORDED
    cause = (report.get("cause") or {}).get("name", NOT_RECORDED)
    return {"verdict": verdict_kind(report.get("verdict", NOT_RECORDED)), "cause": cause, "first action": action}


def _leaves(report: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Settings, machine and versions of a report, by dotted name."""
    for group in SURROUNDINGS:
        if group in report:
            yield from _below(group, report[group])
    if (cached := (report.get("storage") or {}).get("cached_share")) is not None:
        yield "storage.cached_share", round(cached, 1)  # a tenth of the set more or less explains no difference


def _below(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if name in MEASURED or name.startswith(MEASURED_GROUPS):
        return
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _below(f"{name}.{key}", inner)
    else:
        yield name, value


def check_report(report: object, name: str) -> dict[str, Any]:
    """Returns a record that can be compared.

    Raises:
        ValueError: it is no stall report; the message begins with `name`.
    """
    expected = "expected what train.py writes as stall.json, or bench_loader.py --json FILE"
    if not isinstance(report, dict) or "supply" not in report:
        raise ValueError(f"{name}: not a stall report (no 'supply'); {expected}")
    for figure in FIGURES:
        value = report.get(figure)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and 0 < value < math.inf):
            raise ValueError(f"{name}: {figure} is {value!r}, not a number above 0; {expected}")
    return report


# ---- text ----------------------------------------------------------------------------------------------------------


def format_comparison(found: Comparison) -> str:
    """The comparison as lines of text."""
    lines = [f"{'':<{NAME_WIDTH}}{'before':>10}{'after':>10}{'change':>10}   95% confidence interval"]
    lines += [_figure_line(name, change) for name, change in found.figures.items()]
    for part, (old, new) in found.parts.items():
        lines.append(
            f"  {part:<{NAME_WIDTH - 2}}{old:>10.1%}{new:>10.1%}{100 * (new - old):>+10.1f}   points of the stall"
        )
    for name, (old_text, new_text) in found.texts.items():
        lines += [f"{name:<{NAME_WIDTH}}before: {old_text}", f"{'':<{NAME_WIDTH}}after:  {new_text}"]
    if not found.texts:
        lines.append(f"{'verdict':<{NAME_WIDTH}}as before")
    for number, (name, (old, new)) in enumerate(found.surroundings.items()):
        lines.append(f"{'differs' if not number else '':<{NAME_WIDTH}}{name}: {_short(old)}, now {_short(new)}")
    if "together" not in found.figures:
        lines.append(f"{'note':<{NAME_WIDTH}}a report has no trainer, so only the loader alone is compared")
    return "\n".join([*lines, "", _conclusion(found)])


def _figure_line(name: str, one: Change) -> str:
    before, after = (f"{value:.1%}" if name == "au" else f"{value:,.0f}" for value in (one.before, one.after))
    interval = "none: a report has no rounds"
    if one.low is not None and one.high is not None:
        interval = f"{one.low:+.1%} to {one.high:+.1%}{', within noise' * bool(one.within_noise)}"
    interval += ", REGRESSION" * one.regression
    return f"{_shown(name):<{NAME_WIDTH}}{before:>10}{after:>10}{one.change:>+10.1%}   {interval}"


def _conclusion(found: Comparison) -> str:
    figures = {name: found.figures[name] for name in REGRESSIONS if name in found.figures}
    hidden = [name for name, one in figures.items() if one.within_noise and one.change < -found.tolerance]
    if hidden:
        return f"{_judgement(found)}\nhidden by noise: a decline of {', '.join(map(_shown, hidden))}; {MEASURE_LONGER}"
    return _judgement(found)


def _shown(name: str) -> str:
    return "AU" if name == "au" else name


def _judgement(found: Comparison) -> str:
    if found.regressions:
        names = [f"{_shown(name)} {found.figures[name].change:+.1%}" for name in found.regressions]
        return f"regression: {', '.join(names)}; the tolerance is {found.tolerance:.0%}"
    return f"no regression beyond the tolerance of {found.tolerance:.0%}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
