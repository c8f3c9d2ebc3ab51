"""The charts of a stall report as SVG, for the page and the picture: AU, rates, the stall's parts, cores, steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from types import MappingProxyType

from pipeline.diagnosis.accounting import PARTS
from pipeline.diagnosis.findings import Findings
from pipeline.profiling.windows import StepTiming

WIDTH, BAR, GAP = 860, 18, 6  # pixels
FIGURES, BARS = 205, 215  # pixels from the left: figures end there, bars begin there
TEXT = 14  # pixels
SHOWN = 160  # steps of the timeline: a few pixels each
STEPS_HEIGHT = 120
INK, GREY = "#222222", "#666666"
BLUE, RED = "#3b6ea5", "#d1495b"
STEP_COLOURS = {"step": BLUE, "wait": RED, "rest": "#b8b8b8"}
PART_COLOURS = {
    "storage": "#7d5ba6",
    "decode": RED,
    "augment": "#e0913c",
    "transfer": "#2a9d8f",
    "contention": "#8a6d3b",
    "unexplained": "#b8b8b8",
}


@dataclass(frozen=True)
class Chart:
    """SVG elements, the pixels that they take, and a note to be read below."""

    title: str
    drawn: str
    width: float
    height: float
    note: str = ""

    def svg(self, x: float = 0, y: float = 0) -> str:
        """As an element of its own; x and y place it within another."""
        size = f'width="{self.width:g}" height="{self.height:g}" viewBox="0 0 {self.width:g} {self.height:g}"'
        return f'<svg x="{x:g}" y="{y:g}" {size} font-size="{TEXT}">{self.drawn}</svg>'


def au_chart(found: Findings, width: float = WIDTH) -> Chart:
    """AU with its interval and the bar that it is held to; overlap and stall."""
    report = found.report
    shares = {"AU": report.au, "overlap": report.overlap, "stall": report.stall}
    colours = {"AU": BLUE, "overlap": STEP_COLOURS["rest"], "stall": RED}
    drawn = _bars(width, shares, 1.0, "{:.1%}".format, colours)
    low, high = (_at(width, edge, 1.0) for edge in (found.au.low, found.au.high))
    drawn += f'<path d="M{low:.1f} 4v10m0 -5H{high:.1f}m0 -5v10" stroke="{INK}" stroke-width="1.5" fill="none"/>'
    drawn += _line(_at(width, found.au_threshold, 1.0), BAR + GAP / 2)
    return Chart("AU", drawn, width, _height(shares), f"{found.au}; the bar (line) is {found.au_threshold:.0%}")


def rates_chart(found: Findings, width: float = WIDTH) -> Chart:
    """img/s of the feed cut short and whole, of the trainer, and of both together."""
    stages, report = found.stages, found.report
    rates = {
        "read": stages.read,
        "read, decode": stages.decoded,
        "supply": stages.supply,
        "demand": report.demand,
        "together": report.together,
    }
    # Reading alone is often fifty times the rest: bars end at twice the demand, the figures tell.
    most = 2 * max(report.demand, report.together)
    drawn = _bars(width, rates, most, "{:,.0f} img/s".format, {"together": RED})
    drawn += _line(_at(width, report.demand, most), _height(rates) - GAP)
    note = "The line is demand: what training takes without waiting"
    return Chart("Rates against demand", drawn, width, _height(rates), note)


def parts_chart(found: Findings, width: float = WIDTH) -> Chart:
    """What the stall is made of."""
    parts = {part: found.report.parts[part] for part in PARTS}
    drawn = _bars(width, parts, 1.0, "{:.1%}".format, PART_COLOURS)
    return Chart("The stall's parts", drawn, width, _height(parts), "Shares of the run's time; with AU they make 100%")


def cores_chart(found: Findings, width: float = WIDTH) -> Chart:
    """Whose CPU time it was, while both worked together."""
    cores = found.load.cores / found.load.hosts
    drawn = _bars(width, found.cpu_cores, max(cores, 1.0), "{:.2f}".format)
    note = f"Of {cores:g}, while feed and trainer work together"
    return Chart("Cores in use", drawn, width, _height(found.cpu_cores), note)


def steps_chart(found: Findings, width: float = WIDTH) -> Chart:
    """A column for each of the last steps: the step itself, the wait above it, the rest on top; the tallest fills the
    height."""
    steps = found.steps[-SHOWN:]
    tallest_s = max((s.wait_s + s.step_s + s.rest_s for s in steps), default=1.0)
    bases, drawn = [0.0] * len(steps), ""
    for number, (name, colour) in enumerate(STEP_COLOURS.items()):
        tall = [_seconds(step, name) / tallest_s * STEPS_HEIGHT for step in steps]
        drawn += f'<path fill="{colour}" d="{_columns(bases, tall, width / max(len(steps), 1))}"/>'
        bases = [base + more for base, more in zip(bases, tall, strict=True)]
        x, y = 70 * number, STEPS_HEIGHT + 10
        drawn += f'<rect x="{x}" y="{y}" width="10" height="10" fill="{colour}"/>'
        drawn += f'<text x="{x + 16}" y="{y + 10}">{name}</text>'
    note = f"The last {len(steps)} real steps, one after the other; the tallest took {1000 * tallest_s:.1f} ms"
    return Chart("Steps", drawn, width, STEPS_HEIGHT + 26, note)


def _seconds(step: StepTiming, name: str) -> float:
    return {"step": step.step_s, "wait": step.wait_s, "rest": step.rest_s}[name]


def _columns(bases: Sequence[float], tall: Sequence[float], width: float) -> str:
    """A path of rectangles side by side, `tall` high over their `bases`."""
    thick = max(0.8 * width, 0.5)
    return "".join(
        f"M{column * width:.1f} {STEPS_HEIGHT - base:.1f}v{-high:.1f}h{thick:.1f}v{high:.1f}z"
        for column, (base, high) in enumerate(zip(bases, tall, strict=True))
        if high >= 0.05
    )


def _height(rows: Mapping[str, float]) -> float:
    return len(rows) * (BAR + GAP)


def _at(width: float, value: float, most: float) -> float:
    """Where a bar of `value` ends."""
    return BARS + (width - BARS - 10) * min(max(value, 0.0), most) / most


def _line(x: float, height: float) -> str:
    place = f'x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height:g}"'
    return f'<line {place} stroke="{INK}" stroke-width="1.5" stroke-dasharray="4 3"/>'


def _bars(
    width: float,
    values: Mapping[str, float],
    most: float,
    figure: Callable[[float], str],
    colours: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """A row for each value: name, figure, and a bar, which is slashed where it is cut at `most`."""
    drawn = []
    for row, (name, value) in enumerate(values.items()):
        y, end = row * (BAR + GAP), _at(width, value, most)
        drawn.append(
            f'<text x="0" y="{y + TEXT}">{escape(name)}</text>'
            f'<text x="{FIGURES}" y="{y + TEXT}" text-anchor="end">{escape(figure(value))}</text>'
            f'<rect x="{BARS}" y="{y}" width="{end - BARS:.1f}" height="{BAR}" fill="{colours.get(name, BLUE)}"/>'
        )
        if value > most:
            drawn.append(f'<path d="M{end - 18:.1f} {y + BAR}l6 -{BAR}h5l-6 {BAR}z" fill="white"/>')
    return "".join(drawn)
