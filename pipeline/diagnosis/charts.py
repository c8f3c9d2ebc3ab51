"""The charts of a stall report as SVG, for the page and the image: AU, throughput, parts of the stall, cores, steps.

AU is the accelerator utilisation, together / demand. All lengths are pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from types import MappingProxyType

from pipeline.diagnosis.accounting import PARTS
from pipeline.diagnosis.findings import Findings
from pipeline.profiling.clocks import StepTiming

WIDTH = 860
BAR_HEIGHT, BAR_GAP = 18, 6
FIGURES_END_X, BARS_X = 205, 215  # from the left: figures end at the first, bars begin at the second
TEXT_SIZE = 14
TIMELINE_STEPS = 160  # steps in the timeline: a few pixels each
TIMELINE_HEIGHT = 120
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
    """One chart.

    Attributes:
        title: its heading.
        drawn: SVG elements.
        width: pixels that the elements take.
        height: pixels that the elements take.
        note: a line to show below the chart.
    """

    title: str
    drawn: str
    width: float
    height: float
    note: str = ""

    def svg(self, x: float = 0, y: float = 0) -> str:
        """The chart as an `svg` element at (x, y) of another one."""
        size = f'width="{self.width:g}" height="{self.height:g}" viewBox="0 0 {self.width:g} {self.height:g}"'
        return f'<svg x="{x:g}" y="{y:g}" {size} font-size="{TEXT_SIZE}">{self.drawn}</svg>'


def au_chart(found: Findings, width: float = WIDTH) -> Chart:
    """AU with its confidence interval and its threshold; overlap and stall."""
    account = found.account
    shares = {"AU": account.au, "overlap": account.overlap, "stall": account.stall}
    colours = {"AU": BLUE, "overlap": STEP_COLOURS["rest"], "stall": RED}
    drawn = _bars(width, shares, 1.0, "{:.1%}".format, colours)
    low, high = (_end_x(width, edge, 1.0) for edge in (found.au.low, found.au.high))
    drawn += f'<path d="M{low:.1f} 4v10m0 -5H{high:.1f}m0 -5v10" stroke="{INK}" stroke-width="1.5" fill="none"/>'
    drawn += _line(_end_x(width, found.au_threshold, 1.0), BAR_HEIGHT + BAR_GAP / 2)
    note = f"{found.au}; threshold (line) {found.au_threshold:.0%}"
    return Chart("AU (accelerator utilisation)", drawn, width, _height(shares), note)


def throughput_chart(found: Findings, width: float = WIDTH) -> Chart:
    """img/s of the loader cut short and whole, of the trainer, and of both together."""
    loader, account = found.loader_img_s, found.account
    values = {
        "read": loader.read,
        "read, decode": loader.decoded,
        "supply": loader.supply,
        "demand": account.demand,
        "together": account.together,
    }
    # Reading alone is often fifty times as fast as the rest, so bars end at twice the demand; the figures say the rest.
    most = 2 * max(account.demand, account.together)
    drawn = _bars(width, values, most, "{:,.0f} img/s".format, {"together": RED})
    drawn += _line(_end_x(width, account.demand, most), _height(values) - BAR_GAP)
    note = "The line is the demand: what the trainer consumes without waiting"
    return Chart("Throughput against demand", drawn, width, _height(values), note)


def parts_chart(found: Findings, width: float = WIDTH) -> Chart:
    """The parts of the stall."""
    parts = {part: found.account.parts[part] for part in PARTS}
    drawn = _bars(width, parts, 1.0, "{:.1%}".format, PART_COLOURS)
    return Chart("Parts of the stall", drawn, width, _height(parts), "Shares of the run's time; AU plus these is 1")


def cores_chart(found: Findings, width: float = WIDTH) -> Chart:
    """Cores in use by each group of threads while loader and trainer worked together."""
    usable = found.workload.cores / found.workload.hosts
    drawn = _bars(width, found.cpu_cores, max(usable, 1.0), "{:.2f}".format)
    note = f"Of {usable:g}, while loader and trainer work together"
    return Chart("Cores in use", drawn, width, _height(found.cpu_cores), note)


def steps_chart(found: Findings, width: float = WIDTH) -> Chart:
    """A column for each of the last steps: the step, the wait above it, the rest on top.

    The tallest column fills the height.
    """
    steps = found.steps[-TIMELINE_STEPS:]
    tallest_s = max((s.wait_s + s.step_s + s.rest_s for s in steps), default=1.0)
    bases, drawn = [0.0] * len(steps), ""
    for number, (name, colour) in enumerate(STEP_COLOURS.items()):
        heights = [_seconds(step, name) / tallest_s * TIMELINE_HEIGHT for step in steps]
        drawn += f'<path fill="{colour}" d="{_columns(bases, heights, width / max(len(steps), 1))}"/>'
        bases = [base + height for base, height in zip(bases, heights, strict=True)]
        x, y = 70 * number, TIMELINE_HEIGHT + 10
        drawn += f'<rect x="{x}" y="{y}" width="10" height="10" fill="{colour}"/>'
        drawn += f'<text x="{x + 16}" y="{y + 10}">{name}</text>'
    note = f"The last {len(steps)} real steps in order; the longest took {1000 * tallest_s:.1f} ms"
    if found.device["asynchronous"]:
        note += "; by the host's clocks: queued steps may cover waits"
    return Chart("Steps", drawn, width, TIMELINE_HEIGHT + 26, note)


def _seconds(step: StepTiming, name: str) -> float:
    return {"step": step.step_s, "wait": step.wait_s, "rest": step.rest_s}[name]


def _columns(bases: Sequence[float], heights: Sequence[float], width: float) -> str:
    """An SVG path of rectangles side by side, with these heights over their `bases`."""
    thick = max(0.8 * width, 0.5)
    return "".join(
        f"M{column * width:.1f} {TIMELINE_HEIGHT - base:.1f}v{-height:.1f}h{thick:.1f}v{height:.1f}z"
        for column, (base, height) in enumerate(zip(bases, heights, strict=True))
        if height >= 0.05
    )


def _height(rows: Mapping[str, float]) -> float:
    return len(rows) * (BAR_HEIGHT + BAR_GAP)


def _end_x(width: float, value: float, most: float) -> float:
    """Where a bar of `value` ends if a full one shows `most`."""
    return BARS_X + (width - BARS_X - 10) * min(max(value, 0.0), most) / most


def _line(x: float, height: float) -> str:
    """A dashed vertical line from the top."""
    place = f'x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height:g}"'
    return f'<line {place} stroke="{INK}" stroke-width="1.5" stroke-dasharray="4 3"/>'


def _bars(
    width: float,
    values: Mapping[str, float],
    most: float,
    figure: Callable[[float], str],
    colours: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """A row for each value: name, figure, and a bar. A bar that is cut at `most` has a slash."""
    drawn = []
    for row, (name, value) in enumerate(values.items()):
        y, end = row * (BAR_HEIGHT + BAR_GAP), _end_x(width, value, most)
        drawn.append(
            f'<text x="0" y="{y + TEXT_SIZE}">{escape(name)}</text>'
            f'<text x="{FIGURES_END_X}" y="{y + TEXT_SIZE}" text-anchor="end">{escape(figure(value))}</text>'
            f'<rect x="{BARS_X}" y="{y}" width="{end - BARS_X:.1f}" height="{BAR_HEIGHT}"'
            f' fill="{colours.get(name, BLUE)}"/>'
        )
        if value > most:
            slash = f"M{end - 18:.1f} {y + BAR_HEIGHT}l6 -{BAR_HEIGHT}h5l-6 {BAR_HEIGHT}z"
            drawn.append(f'<path d="{slash}" fill="white"/>')
    return "".join(drawn)
