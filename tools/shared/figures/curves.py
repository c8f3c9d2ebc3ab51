"""Training loss and validation error of one or several runs, from their metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from model.runs import METRICS, RunFolder
from tools.shared.figures import plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMOOTHED_POINTS = 200  # a curve with more points shows means of neighbours


def series(lines: list[dict[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Optimizer steps and values of one metric; neighbours are averaged where there are very many points."""
    points = np.array([(line["step"], line[name]) for line in lines if name in line], np.float64).reshape(-1, 2)
    per_point = -(-len(points) // SMOOTHED_POINTS)
    if per_point > 1:
        points = np.array([part.mean(axis=0) for part in np.array_split(points, SMOOTHED_POINTS)])
    return points[:, 0], points[:, 1]


def curves_figure(runs: dict[str, list[dict[str, float]]]) -> Figure:
    """Draws the loss and the top-1 error of runs, by name, against optimizer steps."""
    figure, axes = plot.subplots(1, 2, 9.0, 3.4)
    for number, (name, lines) in enumerate(runs.items()):
        colour = f"C{number % 10}"
        axes[0, 0].plot(*series(lines, "loss"), color=colour, label=name)
        steps, top1 = series(lines, "val_top1")
        axes[0, 1].plot(steps, 100 * (1 - top1), color=colour, marker=".", label=name)
    for each, what in zip(axes[0], ("training loss", "validation top-1 error, %"), strict=True):
        each.set_xlabel("optimizer steps")
        each.set_ylabel(what)
    axes[0, 0].legend(fontsize=7, frameon=False)
    return figure


def draw(folders: list[Path], out: Path) -> str:
    """Draws the curves of runs. Returns a line that says what was drawn.

    Raises:
        ValueError: a folder holds no metrics.
    """
    runs = {}
    for folder in folders:
        lines = RunFolder(folder).metrics()
        if not lines:
            raise ValueError(f"{folder}: expected the folder of a run, with lines in {METRICS}; name runs/NAME")
        runs[str(folder) if folder.name in runs else folder.name] = lines
    plot.save(curves_figure(runs), out)
    return f"{len(runs)} run{'s' * (len(runs) > 1)}"
