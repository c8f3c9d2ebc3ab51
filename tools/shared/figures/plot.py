"""How all figures are drawn and saved: matplotlib without a screen, with the same bytes for the same data."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from pipeline.files import published
from tools.shared.cli import json_path

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
STYLE = {
    "svg.hashsalt": "figures",  # otherwise ids in an SVG differ from run to run
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9.0,
}
TRUE_COLOUR, OTHER_COLOUR = "#d1495b", "#3b6ea5"


def figure_path(text: str) -> Path:
    """The type of `--out`: a writable file whose name ends in .png or .svg; checked before any work starts."""
    if Path(text).suffix not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text}: expected a name that ends in {' or '.join(SUFFIXES)}")
    return json_path(text)


def subplots(rows: int, columns: int, width_in: float, height_in: float) -> tuple[Figure, np.ndarray]:
    """A new figure of this size in inches, and its axes (rows, columns)."""
    _matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    axes: np.ndarray = figure.subplots(rows, columns, squeeze=False)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """Writes the figure to `path`, atomically."""
    matplotlib = _matplotlib()
    date = {"Date": None} if path.suffix == ".svg" else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE), published(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=110, metadata=date)


def show_image(axes: Axes, pixels: np.ndarray, title: str = "") -> None:
    """Shows one image, uint8 (H, W, 3), without axes."""
    axes.imshow(pixels, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(title, fontsize=7)


def hide(axes: np.ndarray) -> None:
    """Leaves axes empty."""
    for each in axes.ravel():
        each.set_axis_off()


def _matplotlib() -> ModuleType:
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ValueError("matplotlib is not installed; run: pip install -e '.[figures]'") from error
    return matplotlib
