"""The stall report as one self-contained SVG image, for a README or a slide.

It has a white background, so that it can be read on dark pages too. The size of text is not known here, so lines are
wrapped for a wide font.
"""

from __future__ import annotations

from html import escape
from textwrap import wrap

from pipeline.diagnosis.charts import (
    GREY,
    INK,
    TEXT_SIZE,
    WIDTH,
    Chart,
    au_chart,
    cores_chart,
    parts_chart,
    steps_chart,
    throughput_chart,
)
from pipeline.diagnosis.findings import Findings
from pipeline.diagnosis.screen import secondary_lines

MARGIN, GUTTER = 20, 30  # pixels
COLUMN_WIDTH = (WIDTH - GUTTER) / 2
NORMAL_SIZE, SMALL_SIZE, VERDICT_SIZE = TEXT_SIZE, 12, 22  # pixels of text
LETTER_WIDTH = 0.58  # over the size of the text: mean width of a letter in a wide font (DejaVu Sans)
BOLD_RATIO = 1.12  # width of a bold letter over that of a normal one
INDENT = 90  # pixels of the names before lines
FONT = 'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif"'


def report_svg(found: Findings, title: str) -> str:
    """The image, as SVG text."""
    sheet = _Sheet()
    sheet.write(title, SMALL_SIZE, ink=GREY)
    sheet.write(found.account.verdict, VERDICT_SIZE, bold=True)
    sheet.y += 4
    sheet.write(found.advice)
    sheet.write(f"Cause: {found.cause.name}, {found.cause.because}")
    sheet.columns(
        [au_chart(found, COLUMN_WIDTH), parts_chart(found, COLUMN_WIDTH)],
        [throughput_chart(found, COLUMN_WIDTH), cores_chart(found, COLUMN_WIDTH)],
    )
    sheet.chart(steps_chart(found))
    sheet.head("What to change")
    for number, action in enumerate(found.actions, 1):
        sheet.write(str(action), name=f"{number}.", indent=22)
    if not found.actions:
        sheet.write("No change of the loader is predicted to train faster")
    sheet.y += 4
    sheet.write(f"After that, the next bottleneck is {found.next_bottleneck}", SMALL_SIZE, ink=GREY)
    sheet.head("Also measured")
    for name, line in secondary_lines(found).items():
        if name != "cores":  # they have a chart
            sheet.write(line, name=name, indent=INDENT)
    return sheet.svg(title)


class _Sheet:
    """Text and charts one below the other, WIDTH pixels wide; `y` is where the next one goes."""

    def __init__(self) -> None:
        self.y, self.drawn = 0.0, list[str]()

    def write(
        self,
        text: str,
        size: int = NORMAL_SIZE,
        ink: str = INK,
        bold: bool = False,
        name: str = "",
        indent: float = 0,
        x: float = 0,
        width: float = WIDTH,
    ) -> None:
        """Writes wrapped text; a `name` is written before its first line, in grey."""
        letters = int((width - indent) / (size * LETTER_WIDTH * (BOLD_RATIO if bold else 1)))
        weight = ' font-weight="bold"' if bold else ""
        for number, line in enumerate(wrap(_printable(text), letters) or [""]):
            self.y += round(1.4 * size)
            if name and not number:
                self._text(name, x, size, GREY)
            self._text(line, x + indent, size, ink, weight)

    def head(self, text: str, x: float = 0, width: float = WIDTH) -> None:
        """Writes a heading, with space above it."""
        self.y += 14
        self.write(text, NORMAL_SIZE + 1, bold=True, x=x, width=width)
        self.y += 8

    def chart(self, chart: Chart, x: float = 0) -> None:
        """Draws a chart, with its title above and its note below."""
        self.head(chart.title, x, chart.width)
        self.drawn.append(chart.svg(x, self.y))
        self.y += chart.height
        self.write(chart.note, SMALL_SIZE, GREY, x=x, width=chart.width)

    def columns(self, *columns: list[Chart]) -> None:
        """Draws charts in columns of the same width, side by side."""
        top, bottoms = self.y, list[float]()
        for number, charts in enumerate(columns):
            self.y = top
            for chart in charts:
                self.chart(chart, number * (COLUMN_WIDTH + GUTTER))
            bottoms.append(self.y)
        self.y = max(bottoms)

    def svg(self, title: str) -> str:
        """Everything on white, with a margin."""
        width, height = WIDTH + 2 * MARGIN, round(self.y) + 2 * MARGIN
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
            f' {FONT} font-size="{NORMAL_SIZE}" fill="{INK}" role="img"><title>{escape(_printable(title))}</title>'
            f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="6" fill="white" stroke="#d0d0d0"/>'
            f'<svg x="{MARGIN}" y="{MARGIN - 5}" width="{WIDTH}" height="{height - MARGIN}">{"".join(self.drawn)}</svg>'
            "</svg>\n"
        )

    def _text(self, line: str, x: float, size: int, ink: str, weight: str = "") -> None:
        self.drawn.append(
            f'<text x="{x:g}" y="{self.y:g}" font-size="{size}" fill="{ink}"{weight}>{escape(line)}</text>'
        )


def _printable(text: str) -> str:
    """The text with spaces instead of characters that XML forbids."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
