"""Curves of training losses as one SVG image: a panel for each group of rows, a line for each run.

All lengths are pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape

from tools.shared.learning_rows import PAPER_CHANGES, RECIPES_ALONE, SOURCE_LAYERS, SOURCE_STARTS, LearningRun, Record

PANEL_WIDTH, PANEL_HEIGHT = 560, 260
LEFT, TOP, RIGHT, BOTTOM = 46, 34, 250, 44  # around the axes of a panel; the names of the lines are on the right
COLOURS = ("#3b6ea5", "#d1495b", "#2a9d8f", "#e0913c", "#7d5ba6", "#8a6d3b", "#222222", "#c77dba", "#5b8c3a", "#999999")
SMOOTHED_OVER = 5  # lines of metrics
NAME_HEIGHT = 15
FONT = 'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" font-size="12"'


def curves_svg(record: Record) -> str:
    """The image, as SVG text. Lines of a row with several seeds have one colour."""
    rows = record.rows()
    groups = {
        "The two recipes": list(RECIPES_ALONE),
        "Changes of source2012: start, input, LRN": ["source2012", *(f"source2012+{name}" for name in SOURCE_STARTS)],
        "Changes of source2012: layers": ["source2012", *(f"source2012+{name}" for name in SOURCE_LAYERS)],
        "Changes of paper": ["paper", *(f"paper+{name}" for name in PAPER_CHANGES)],
    }
    shown = {title: [row for row in names if row in rows] for title, names in groups.items()}
    panels = [(title, names) for title, names in shown.items() if names]
    height = PANEL_HEIGHT + TOP + BOTTOM
    width = LEFT + PANEL_WIDTH + RIGHT
    drawn = "".join(
        f'<g transform="translate(0 {number * height})">{_panel(title, names, record)}</g>'
        for number, (title, names) in enumerate(panels)
    )
    size = f'width="{width}" height="{height * len(panels)}" viewBox="0 0 {width} {height * len(panels)}"'
    background = '<rect width="100%" height="100%" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {FONT}>{background}{drawn}</svg>\n'


def smoothed(run: LearningRun) -> list[tuple[float, float]]:
    """Losses averaged over the last `SMOOTHED_OVER` lines of metrics."""
    losses = [loss for _, loss in run.losses]
    windows = [losses[max(0, end - SMOOTHED_OVER) : end] for end in range(1, len(losses) + 1)]
    return [(step, sum(window) / len(window)) for (step, _), window in zip(run.losses, windows, strict=True)]


def _panel(title: str, rows: list[str], record: Record) -> str:
    curves = {row: [smoothed(run) for run in record.of_row(row)] for row in rows}
    values = [loss for runs in curves.values() for run in runs for _, loss in run]
    chance = math.log(record.setting["classes"])
    low, high = math.floor(5 * min(*values, chance)) / 5, min(math.ceil(5 * max(*values, chance)) / 5, 1.25 * chance)
    steps: int = record.setting["steps"]

    def x(step: float) -> float:
        return LEFT + PANEL_WIDTH * step / steps

    def y(loss: float) -> float:
        return float(TOP + PANEL_HEIGHT * (high - min(loss, high)) / (high - low))

    drawn = f'<text x="{LEFT}" y="20" font-size="15" font-weight="bold">{escape(title)}</text>' + _axes(
        x, y, low, high, steps
    )
    drawn += f'<path d="M{LEFT} {y(chance):.1f}h{PANEL_WIDTH}" stroke="#666666" stroke-dasharray="4 3"/>'
    drawn += (
        f'<text x="{LEFT + PANEL_WIDTH - 4}" y="{y(chance) - 4:.1f}" text-anchor="end" fill="#666666">chance</text>'
    )
    for number, (row, runs) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        dash = ' stroke-dasharray="6 3"' if number >= len(COLOURS) else ""
        for run in runs:
            points = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in run)
            drawn += f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"{dash}/>'
        name_x, name_y = LEFT + PANEL_WIDTH + 14, TOP + 10 + NAME_HEIGHT * number
        drawn += f'<path d="M{name_x} {name_y - 4}h18" stroke="{colour}" stroke-width="2"{dash}/>'
        drawn += f'<text x="{name_x + 24}" y="{name_y}">{escape(row)}</text>'
    return drawn


def _axes(x: Callable[[float], float], y: Callable[[float], float], low: float, high: float, steps: int) -> str:
    bottom = TOP + PANEL_HEIGHT
    drawn = f'<path d="M{LEFT} {TOP}V{bottom}H{LEFT + PANEL_WIDTH}" fill="none" stroke="#222222"/>'
    for tick in range(round(10 * low), round(10 * high) + 1, 2):
        drawn += f'<text x="{LEFT - 6}" y="{y(tick / 10) + 4:.1f}" text-anchor="end">{tick / 10:.1f}</text>'
    for number in range(6):
        step = steps * number / 5
        drawn += f'<text x="{x(step):.1f}" y="{bottom + 16}" text-anchor="middle">{step:.0f}</text>'
    middle = LEFT + PANEL_WIDTH / 2
    return drawn + f'<text x="{middle}" y="{bottom + 32}" text-anchor="middle">optimizer steps; training loss</text>'
