"""Draws a confusion matrix as SVG or PNG so that it stays readable, also with 1000 classes.

Classes that are taken for one another are placed side by side (average linkage on the shares of confused images). Up to
40 classes get a row each; more are joined into 40 groups of neighbours in that order. The most confused pairs of single
classes are listed below the matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.cluster.hierarchy import leaves_list, linkage

from model.class_scores import ClassScores
from pipeline.files import write_atomically

MOST_ROWS = 40
LISTED_PAIRS = 20
CELL, MARGIN, LABELS, LINE = 22, 16, 300, 18  # pixels: a cell, the margin, the row labels, a line of text
TEXT, SMALL, LETTER = 12, 9, 7  # pixels: two sizes of text, the width of a letter
LONGEST_NAME = 34  # characters
INK, GREY, WHITE, DARK = (34, 34, 34), (110, 110, 110), (255, 255, 255), (16, 66, 130)
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Box:
    """A filled rectangle; all numbers in pixels."""

    x: int
    y: int
    side: int
    fill: Colour


@dataclass(frozen=True)
class Label:
    """A line of text whose left end, middle or right end (`anchor` l, m, r) is at x, and whose middle height is y."""

    x: int
    y: int
    text: str
    anchor: str = "l"
    size: int = TEXT
    fill: Colour = INK


def write_figure(path: Path, found: ClassScores, names: Sequence[str], title: str) -> None:
    """Draws the confusion matrix into `path`, as SVG or PNG by its suffix.

    Args:
        path: the file; its folder is made.
        found: scores by class.
        names: a name for each class.
        title: the first line.
    """
    shapes, width, height = layout(found.confusion.numpy(), names, title, _pairs(found, names))
    data = as_svg(shapes, width, height) if path.suffix == ".svg" else as_png(shapes, width, height)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data)


def neighbours_first(confusion: NDArray[np.float64]) -> NDArray[np.int64]:
    """An order of the classes in which those that are taken for one another are side by side."""
    if len(confusion) < 3:
        return np.arange(len(confusion))
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    distance = 1 - (shares + shares.T) / 2
    upper = np.triu_indices(len(distance), 1)
    return np.asarray(leaves_list(linkage(distance[upper], "average")), np.int64)


def groups_of(order: NDArray[np.int64], most: int = MOST_ROWS) -> list[NDArray[np.int64]]:
    """The classes in groups of neighbours: one class each, or at most `most` groups of sizes that differ by one."""
    return np.array_split(order, min(most, len(order)))


def layout(
    confusion: NDArray[np.float64], names: Sequence[str], title: str, notes: Sequence[str]
) -> tuple[list[Box | Label], int, int]:
    """The shapes of the figure, its width and its height in pixels."""
    groups = groups_of(neighbours_first(confusion))
    single = len(groups) == len(names)
    counts = np.array([[confusion[np.ix_(rows, columns)].sum() for columns in groups] for rows in groups])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    left, top = MARGIN + LABELS, MARGIN + 4 * LINE
    what = "class" if single else "group of classes"
    head = f"row: right {what}; column: most probable {what}; number: percent of the row's images"
    shapes: list[Box | Label] = [Label(MARGIN, MARGIN + LINE // 2, title)]
    if not single:
        head += ", on the diagonal with errors within the group"
    shapes.append(Label(MARGIN, MARGIN + 3 * LINE // 2, head, fill=GREY))
    for number, members in enumerate(groups):
        middle = top + number * CELL + CELL // 2
        shapes.append(Label(left - 6, middle, f"{_group_name(members, names)}  {number + 1}", "r"))
        shapes.append(Label(left + number * CELL + CELL // 2, top - LINE // 2, str(number + 1), "m", SMALL))
        for column, share in enumerate(shares[number]):
            x = left + column * CELL
            shapes.append(Box(x, top + number * CELL, CELL - 1, _shade(share)))
            if share >= 0.005:
                ink = WHITE if share > 0.3 else INK
                shapes.append(Label(x + CELL // 2 - 1, middle, f"{100 * share:.0f}", "m", SMALL, ink))
    bottom = top + len(groups) * CELL + LINE
    for line, note in enumerate(notes):
        shapes.append(Label(MARGIN, bottom + line * LINE + LINE // 2, note, fill=INK if line == 0 else GREY))
    longest = max(len(shape.text) for shape in shapes if isinstance(shape, Label))
    width = max(left + len(groups) * CELL, MARGIN + longest * LETTER) + MARGIN
    return shapes, width, bottom + len(notes) * LINE + MARGIN


def _pairs(found: ClassScores, names: Sequence[str]) -> list[str]:
    pairs = found.confused_pairs(LISTED_PAIRS)
    lines = [f"{_short(names[p.label])} taken for {_short(names[p.taken_for])}: {p.share:.1%}" for p in pairs]
    return ["Most confused pairs of classes" if lines else "No image is wrong", *lines]


def _group_name(members: NDArray[np.int64], names: Sequence[str]) -> str:
    first = _short(names[members[0]])
    return first if len(members) == 1 else f"{first} + {len(members) - 1} more"


def _short(name: str) -> str:
    name = name.partition(",")[0]
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..."


def _shade(share: float) -> Colour:
    """From white (0) to dark blue (1); the square root keeps small shares visible."""
    strength = float(np.sqrt(share))
    red, green, blue = (round(light + (dark - light) * strength) for light, dark in zip(WHITE, DARK, strict=True))
    return red, green, blue


def as_svg(shapes: Sequence[Box | Label], width: int, height: int) -> str:
    """The figure as SVG text."""
    anchors = {"l": "start", "m": "middle", "r": "end"}
    drawn = [
        f'<rect x="{s.x}" y="{s.y}" width="{s.side}" height="{s.side}" fill="rgb{s.fill}"/>'
        if isinstance(s, Box)
        else f'<text x="{s.x}" y="{s.y}" dy="0.35em" font-size="{s.size}" text-anchor="{anchors[s.anchor]}"'
        f' fill="rgb{s.fill}">{escape(s.text)}</text>'
        for s in shapes
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        f' font-family="Helvetica, Arial, sans-serif"><rect width="{width}" height="{height}" fill="white"/>'
        f"{''.join(drawn)}</svg>\n"
    )


def as_png(shapes: Sequence[Box | Label], width: int, height: int) -> bytes:
    """The figure as the bytes of a PNG."""
    image = Image.new("RGB", (width, height), WHITE)
    pen = ImageDraw.Draw(image)
    fonts = {size: ImageFont.load_default(size) for size in (TEXT, SMALL)}
    for s in shapes:
        if isinstance(s, Box):
            pen.rectangle((s.x, s.y, s.x + s.side - 1, s.y + s.side - 1), fill=s.fill)
        else:
            pen.text((s.x, s.y), s.text, fill=s.fill, font=fonts[s.size], anchor=f"{s.anchor}m")
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
