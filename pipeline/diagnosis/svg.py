"""The doctor's findings as one picture: an SVG that needs nothing else, for a README or a slide.

It has its own white ground, so that it is read on dark pages too. Nobody measures text here: lines are wrapped for a
wide font.
"""

from __future__ import annotations

from html import escape
from textwrap import wrap

from pipeline.diagnosis.charts import (
    GREY,
    INK,
    TEXT,
    WIDTH,
    Chart,
    au_chart,
    cores_chart,
    parts_chart,
    rates_chart,
    steps_chart,
)
from pipeline.diagnosis.findings import Findings, details

MARGIN, GUTTER = 20, 30  # pixels
HALF = (WIDTH - GUTTER) / 2
SIZE, SMALL, LARGE = TEXT, 12, 22  # pixels of text
LETTER = 0.58  # of the size: what a letter takes in a wide font (DejaVu Sans), in the mean of a line
BOLD = 1.12  # times as much
INDENT = 90  # pixels of the names before lines
FONT = 'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif"'


def report_svg(found: Findings, title: str) -> str:
    """The whole picture, SVG."""
    report, sheet = found.report, _Sheet()
    sheet.write(title, SMALL, ink=GREY)
    sheet.write(report.verdict, LARGE, bold=True)
    sheet.y += 4
    sheet.write(report.action)
    sheet.write(f"Cause: {found.cause.name}, {found.cause.because}")
    sheet.columns(
        [au_chart(found, HALF), parts_chart(found, HALF)],
        [rates_chart(found, HALF), cores_chart(found, HALF)],
    )
    sheet.chart(steps_chart(found))
    sheet.head("What to change")
    for number, action in enumerate(found.actions, 1):
        sheet.write(str(action), name=f"{number}.", indent=22)
    if not found.actions:
        sheet.write("Nothing about the feed would train faster")
    sheet.y += 4
    sheet.write(f"After that, the next bottleneck is {found.next_bottleneck}", SMALL, ink=GREY)
    sheet.head("Also measured")
    for name, words in details(found).items():
        if name != "cores":  # they have a chart
            sheet.write(words, name=name, indent=INDENT)
    return sheet.svg(title)


class _Sheet:
    """Things one under the other, WIDTH pixels wide; `y` is where the next one goes."""

    def __init__(self) -> None:
        self.y, self.drawn = 0.0, list[str]()

    def write(
        self,
        words: str,
        size: int = SIZE,
        ink: str = INK,
        bold: bool = False,
        name: str = "",
        indent: float = 0,
        x: float = 0,
        width: float = WIDTH,
    ) -> None:
        """Lines of text, behind a name in grey where there is one."""
        letters = int((width - indent) / (size * LETTER * (BOLD if bold else 1)))
        weight = ' font-weight="bold"' if bold else ""
        for number, line in enumerate(wrap(_printable(words), letters) or [""]):
            self.y += round(1.4 * size)
            if name and not number:
                self._text(name, x, size, GREY)
            self._text(line, x + indent, size, ink, weight)

    def head(self, words: str, x: float = 0, width: float = WIDTH) -> None:
        """A heading, with room above it."""
        self.y += 14
        self.write(words, SIZE + 1, bold=True, x=x, width=width)
        self.y += 8

    def chart(self, chart: Chart, x: float = 0) -> None:
        """A chart under its title, over its note."""
        self.head(chart.title, x, chart.width)
        self.drawn.append(chart.svg(x, self.y))
        self.y += chart.height
        self.write(chart.note, SMALL, GREY, x=x, width=chart.width)

    def columns(self, *columns: list[Chart]) -> None:
        """Charts in columns of the same width, side by side."""
        top, bottoms = self.y, list[float]()
        for number, charts in enumerate(columns):
            self.y = top
            for chart in charts:
                self.chart(chart, number * (HALF + GUTTER))
            bottoms.append(self.y)
        self.y = max(bottoms)

    def svg(self, title: str) -> str:
        """All of it on white, with a margin."""
        width, height = WIDTH + 2 * MARGIN, round(self.y) + 2 * MARGIN
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
            f' {FONT} font-size="{SIZE}" fill="{INK}" role="img"><title>{escape(_printable(title))}</title>'
            f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="6" fill="white" stroke="#d0d0d0"/>'
            f'<svg x="{MARGIN}" y="{MARGIN - 5}" width="{WIDTH}" height="{height - MARGIN}">{"".join(self.drawn)}</svg>'
            "</svg>\n"
        )

    def _text(self, line: str, x: float, size: int, ink: str, weight: str = "") -> None:
        self.drawn.append(
            f'<text x="{x:g}" y="{self.y:g}" font-size="{size}" fill="{ink}"{weight}>{escape(line)}</text>'
        )


def _printable(words: str) -> str:
    """Without the characters that XML may not have."""
    return "".join(letter if letter.isprintable() else " " for letter in words)
