"""The stall report as a page and as an image: complete, self-contained, and legible."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations
from xml.etree import ElementTree

import pytest
from PIL import ImageFont

from pipeline.diagnosis.accounting import PARTS
from pipeline.diagnosis.charts import TEXT_SIZE
from pipeline.diagnosis.html import report_html
from pipeline.diagnosis.screen import format_findings
from pipeline.diagnosis.svg import report_svg
from tests.pipeline.diagnosis.planted_figures import PLANTED, RUN, found_for


class _Checked(HTMLParser):
    """Fails on a tag that is not closed; collects tags and links."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("name", PLANTED)
def test_the_page_is_complete_and_self_contained(name: str):
    """Every tag is closed; there is no script, link or address; every bar is within the page."""
    found = found_for(name)
    text = report_html(found, 'a <title> & "more"')
    checked = _Checked()
    checked.feed(text)
    assert not checked.open
    assert not checked.links and "script" not in checked.tags and "http" not in text and "url(" not in text
    assert found.account.verdict in text and "a &lt;title&gt; &amp; " in text
    widths = [float(width) for width in re.findall(r'<rect[^>]* width="([-\d.]+)"', text)]
    assert len(widths) > len(PARTS) and all(0 <= width <= 860 for width in widths)


def texts(element: ElementTree.Element, x: float = 0, y: float = 0) -> list[tuple[str, float, float, float, float]]:
    """Every text of an SVG with its box (left, top, right, bottom), in a font a fifth wider than Pillow's own."""
    if element.tag.endswith("text"):
        size, words = int(element.get("font-size", TEXT_SIZE)), element.text or ""
        wide = (1.35 if element.get("font-weight") else 1.2) * ImageFont.load_default(size).getlength(words)
        left, base = x + float(element.get("x", 0)), y + float(element.get("y", 0))
        left -= wide if element.get("text-anchor") == "end" else 0
        return [(words, left, base - 0.75 * size, left + wide, base + 0.2 * size)]
    inner = element.tag.endswith("svg")
    x, y = (x + float(element.get("x", 0)), y + float(element.get("y", 0))) if inner else (x, y)
    return [box for child in element for box in texts(child, x, y)]


@pytest.mark.parametrize("name", PLANTED)
def test_the_image_has_every_figure_and_no_text_overlaps_or_is_cut_off(name: str):
    found = replace(found_for(name), run=RUN)
    found = replace(found, cause=replace(found.cause, because=25 * "a long word, "))
    root = ElementTree.fromstring(report_svg(found, 'a <title> & "more", \0\n\x1b ' + 30 * "a long title, "))
    boxes = texts(root)
    words = " ".join(box[0] for box in boxes)
    screen = format_findings(found).replace("1 - AU", "")
    figures, shown = (set(re.findall(r"\d(?:[\d,.]*\d)?%?", text)) for text in (screen, words))
    assert len(figures) > 20 and figures <= shown
    assert found.account.verdict in words and 'a <title> & "more"' in words
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for _, left, top, right, bottom in boxes:
        assert left >= 0 and top >= 0 and right <= width and bottom <= height
    for (a, *one), (b, *other) in combinations(boxes, 2):
        assert one[0] >= other[2] or other[0] >= one[2] or one[1] >= other[3] or other[1] >= one[3], (a, b)
