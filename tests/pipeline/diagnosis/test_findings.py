"""What the doctor says of figures made up: each cause by its name, a record that adds up, a whole page.

The same causes are planted for real, with real work on real clocks, by tests/long_planted_stalls.py.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import ImageFont

from pipeline.diagnosis.accounting import PARTS
from pipeline.diagnosis.causes import Evidence, cause_of
from pipeline.diagnosis.charts import TEXT
from pipeline.diagnosis.findings import Findings, Setup, build_findings, format_findings
from pipeline.diagnosis.html import report_html
from pipeline.diagnosis.predict import busy
from pipeline.diagnosis.svg import report_svg
from pipeline.profiling.clocks import LoopTotals, StepClocks, percentiles
from pipeline.profiling.cpu_time import GROUPS, CpuUse
from pipeline.profiling.stages import StageThroughput
from pipeline.profiling.throughput import Throughput, lockstep_throughput
from pipeline.profiling.windows import StepTiming, WindowMeasurements, WindowRound

CORES = 4
SETUP = Setup(threads=4, queue_depth=2, cores=CORES, area=1.4)
TRAINER = 2000.0  # img/s
WINDOW_S = 2.0
SET_BYTES = 10**9
MEMORY = {"resident": 1, "shared": 1, "available": 2 * SET_BYTES}
FULL = {**MEMORY, "available": SET_BYTES // 2}
EDGES_S = percentiles([0.31, 0.32])
RUN = {"img_s": 654.3, "clocks_share": 1e-6, "first_wait_s": 0.2}
RUN |= dict.fromkeys(("edge_waits_s", "waits_s", "device_gaps_s", "device_steps_s"), EDGES_S)


def rate(img_s: float, cpu_ms: float, p50_s: float = 0.01, p99_s: float = 0.012) -> Throughput:
    return Throughput(img_s, img_s, img_s, cpu_ms, img_s * cpu_ms / 1000, (img_s,), p50_s, p99_s)


def stages(
    read: Throughput, decode_ms: float = 0.8, augment_ms: float = 0.2, threads: int = CORES, reread: float = 0.0
) -> StageThroughput:
    """Rates of a feed whose work takes these CPU milliseconds on so many threads; as fast from memory unless said."""
    decoded_ms, full_ms = read.cpu_ms_per_img + decode_ms, read.cpu_ms_per_img + decode_ms + augment_ms
    decoded, full = (min(read.img_s, 1000 * min(threads, CORES) / ms) for ms in (decoded_ms, full_ms))
    again = rate(reread or read.img_s, 0.02)
    return StageThroughput(read, rate(decoded, decoded_ms), rate(full, full_ms), again, None, SET_BYTES)


def use(own: float, neighbours: float = 0.0) -> CpuUse:
    """Cores in use, all by the feed's threads."""
    return CpuUse(WINDOW_S, {**dict.fromkeys(GROUPS, 0.0), "feed": own * WINDOW_S}, 0.0, neighbours * WINDOW_S)


def seen(
    apart: StageThroughput,
    supply: float | None = None,
    demand: float = TRAINER,
    wait_ms: float | None = None,
    rest_ms: float = 0.0,
    trainer_cores: float = 0.0,
    neighbours: float = 0.0,
) -> WindowMeasurements:
    """Windows of a trainer that waits as long as the feed's rate makes it, or for `wait_ms` an image."""
    supply = apart.full.img_s if supply is None else supply
    step_s = 1 / demand
    wait_s = max(0.0, 1 / supply - step_s) if wait_ms is None else wait_ms / 1000
    turns = []
    for n in range(5):
        whole_s = (wait_s + step_s + rest_ms / 1000) * (1 + 0.001 * n)
        images = round(WINDOW_S / whole_s)
        turns.append(
            WindowRound(demand, LoopTotals(images, images * wait_s, images * step_s, images * whole_s), supply)
        )
    steps = tuple(StepTiming(n * 0.1, 128 * wait_s, 128 * step_s, 0.128 * rest_ms) for n in range(20))
    feed = use(supply * apart.full.cpu_ms_per_img / 1000, neighbours)
    return WindowMeasurements(tuple(turns), steps, 0.2, feed, use(trainer_cores, neighbours), feed)


QUICK_READ, SLOW_READ = rate(60_000, 0.02), rate(1000, 0.02)
HEALTHY = stages(QUICK_READ)

# name: (verdict, cause, stages, what `seen` is told, what the setup is, what else is known)
PLANTED: dict[str, tuple[str, str, StageThroughput, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "none": ("compute-bound", "none", HEALTHY, {}, {}, {}),
    "slow trainer": ("compute-bound", "none", HEALTHY, {"demand": 100.0}, {}, {}),
    "slow storage": ("input-bound: storage", "slow storage", stages(SLOW_READ, reread=1100), {}, {}, {}),
    "cold cache": ("input-bound: storage", "cold cache", stages(SLOW_READ, reread=60_000), {}, {}, {}),
    "large set": ("input-bound: storage", "slow storage", stages(SLOW_READ, reread=60_000), {}, {}, {"memory": FULL}),
    "bursts": ("input-bound: storage", "bursts", stages(rate(1000, 0.02, 0.02, 0.9)), {}, {}, {}),
    "few threads": (
        "input-bound: decode",
        "few threads",
        stages(QUICK_READ, threads=1),
        {},
        {"threads": 1},
        {},
    ),
    "large pictures": ("input-bound: decode", "large pictures", stages(QUICK_READ, 6.0), {}, {"area": 8.0}, {}),
    "few cores": ("input-bound: decode", "few cores", stages(QUICK_READ, 3.0), {}, {}, {}),
    "augmentation": ("input-bound: augment", "augmentation", stages(QUICK_READ, 0.8, 3.0), {}, {}, {}),
    "neighbours": ("input-bound: decode", "neighbours", HEALTHY, {"supply": 1200.0, "neighbours": 2.5}, {}, {}),
    "callback": ("unexplained", "callback", HEALTHY, {"rest_ms": 0.4}, {}, {}),
    "short queue": ("contention", "short queue", HEALTHY, {"wait_ms": 0.1}, {"queue_depth": 1}, {}),
    "shared cores": ("contention", "shared cores", HEALTHY, {"wait_ms": 0.1, "trainer_cores": 3.5}, {}, {}),
}


def found_for(name: str) -> Findings:
    _, _, apart, told, setup, known = PLANTED[name]
    memory = known.get("memory", MEMORY)
    return build_findings(apart, seen(apart, **told), replace(SETUP, **setup), memory, {"cpu": "x"})


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_cause_is_named(name: str):
    verdict, cause, *_ = PLANTED[name]
    found = found_for(name)
    assert (found.report.verdict, found.cause.name) == (verdict, cause)


@pytest.mark.parametrize("name", PLANTED)
def test_the_record_is_json_and_adds_up(name: str):
    """No infinity, nothing that JSON lacks; AU is 1 minus the parts and lies in its interval."""
    found = found_for(name)
    record = json.loads(json.dumps(found.record(), allow_nan=False))
    assert record["au"] == pytest.approx(1 - sum(record["parts"].values()))
    assert record["au_interval"]["low"] <= record["au_interval"]["mean"] <= record["au_interval"]["high"]
    assert list(record["limits"].values()) == sorted(record["limits"].values())


def test_a_slow_rank_is_named():
    load = found_for("few cores").load
    cause = cause_of(Evidence("input-bound: decode", load, rank_supplies=(2000, 2010, 900, 1990)))
    assert (cause.name, "rank 2" in cause.because) == ("slow rank", True)


def test_a_slow_rank_that_is_fast_enough_is_no_cause():
    load = found_for("shared cores").load
    assert load.supply > load.demand
    assert cause_of(Evidence("contention", load, rank_supplies=(9000, 4500))).name == "shared cores"


@pytest.mark.parametrize("name", ["few threads", "few cores", "slow storage", "shared cores"])
def test_two_hosts_are_one_twice(name: str):
    """A rank on each: rates, threads and cores are twice as many, an image costs what it did."""
    _, _, apart, told, setup, _ = PLANTED[name]
    one, seen_by_one = found_for(name), seen(apart, **told)
    turns = [
        WindowRound(2 * turn.demand, replace(turn.clocks, images=2 * turn.clocks.images), 2 * turn.supply)
        for turn in seen_by_one.rounds
    ]
    two = build_findings(
        apart.each(lambda rate: lockstep_throughput([rate, replace(rate, img_s=2 * rate.img_s)])),
        replace(seen_by_one, rounds=tuple(turns)),
        replace(SETUP, **setup, ranks=2, hosts=2),
        MEMORY,
        {},
    )
    assert (two.report.verdict, two.cause.name) == (one.report.verdict, one.cause.name)
    assert list(two.limits.values()) == pytest.approx([2 * rate for rate in one.limits.values()])
    assert two.load.feed_s == pytest.approx(one.load.feed_s)
    assert two.report.parts == pytest.approx(one.report.parts)
    assert [action.settings for action in two.actions] == [action.settings for action in one.actions]


def test_the_first_action_against_few_threads_is_more_of_them():
    first = found_for("few threads").actions[0]
    assert first.settings == {"threads": CORES + 1}
    assert first.supply == pytest.approx(busy(CORES) * found_for("few threads").report.supply)


def test_a_cold_set_that_fits_is_read_into_memory_first():
    """Storage gave 1,000 img/s; without it the feed gives what its CPU does, and the trainer takes its 2,000."""
    cold, large, slow = (found_for(name).actions[0] for name in ("cold cache", "large set", "slow storage"))
    assert [action.change for action in (cold, large, slow)] == ["memory", "disk", "disk"]
    assert [action.together for action in (cold, large, slow)] == pytest.approx([TRAINER] * 3, rel=0.01)
    assert "memory for the set" in large.text


def test_no_action_where_training_does_not_wait():
    assert found_for("none").actions == ()


def test_the_screen_fits():
    """At most 40 lines of 120 columns, with verdict, interval, cause, waits, actions and the next bottleneck."""
    text = format_findings(found_for("few threads"))
    lines = text.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 120
    for words in (*PARTS, "95% within", "few threads", "p99", "--threads 5: predicted", "the next bottleneck is"):
        assert words in text


def test_a_run_s_first_batch_and_edges_stand_apart():
    clocks = StepClocks()
    for wait_s, edge in ((9.0, True), (0.01, False), (0.5, True), (0.01, False)):
        clocks.add(8, wait_s, 0.1, 0.1 + wait_s, edge)
    _, _, apart, told, *_ = PLANTED["none"]
    found = build_findings(apart, seen(apart, **told), SETUP, MEMORY, {}, clocks=clocks)
    assert found.run["first_wait_s"] == 9.0
    assert found.run["edge_waits_s"]["max"] == 0.5
    assert f"{found.run['clocks_share']:.4%}" in format_findings(found)
    assert "500.0 ms" in format_findings(found)
    assert found.run["device_gaps_s"] is None and "device " not in format_findings(found)


def test_a_run_s_device_gaps_are_shown():
    clocks = StepClocks()
    for n in range(101):
        clocks.add(8, 0.0, 0.1, 0.1)
        clocks.add_device(n / 1000, 0.25)
    _, _, apart, told, *_ = PLANTED["none"]
    found = build_findings(apart, seen(apart, **told), SETUP, MEMORY, {}, clocks=clocks)
    (line,) = (line for line in format_findings(found).splitlines() if line.startswith("device "))
    assert "gaps p50 50.0 ms, p95 95.0 ms, p99 99.0 ms" in line and "250.0 ms" in line and len(line) <= 120
    assert "gaps on the device" in report_html(found, "a run")


class _Checked(HTMLParser):
    """Fails on what does not close, and collects tags and attributes."""

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
def test_the_page_is_whole_and_needs_nothing_else(name: str):
    """Every tag closes; no script, no link, no address; every bar is as long as its figure says, and none leaves."""
    found = found_for(name)
    text = report_html(found, 'a <title> & "more"')
    checked = _Checked()
    checked.feed(text)
    assert not checked.open
    assert not checked.links and "script" not in checked.tags and "http" not in text and "url(" not in text
    assert found.report.verdict in text and "a &lt;title&gt; &amp; " in text
    widths = [float(width) for width in re.findall(r'<rect[^>]* width="([-\d.]+)"', text)]
    assert len(widths) > len(PARTS) and all(0 <= width <= 860 for width in widths)


def texts(element: ElementTree.Element, x: float = 0, y: float = 0) -> list[tuple[str, float, float, float, float]]:
    """Every text of an SVG with its box (left, top, right, bottom), in a font a fifth wider than Pillow's own."""
    if element.tag.endswith("text"):
        size, words = int(element.get("font-size", TEXT)), element.text or ""
        wide = (1.35 if element.get("font-weight") else 1.2) * ImageFont.load_default(size).getlength(words)
        left, base = x + float(element.get("x", 0)), y + float(element.get("y", 0))
        left -= wide if element.get("text-anchor") == "end" else 0
        return [(words, left, base - 0.75 * size, left + wide, base + 0.2 * size)]
    inner = element.tag.endswith("svg")
    x, y = (x + float(element.get("x", 0)), y + float(element.get("y", 0))) if inner else (x, y)
    return [box for child in element for box in texts(child, x, y)]


@pytest.mark.parametrize("name", PLANTED)
def test_the_picture_has_every_figure_and_no_text_over_another_or_outside(name: str):
    found = replace(found_for(name), run=RUN)
    found = replace(found, cause=replace(found.cause, because=25 * "a long word, "))
    root = ElementTree.fromstring(report_svg(found, 'a <title> & "more", \0\n\x1b ' + 30 * "a long title, "))
    boxes = texts(root)
    words = " ".join(box[0] for box in boxes)
    screen = format_findings(found).replace("1 - AU", "")
    figures, shown = (set(re.findall(r"\d(?:[\d,.]*\d)?%?", text)) for text in (screen, words))
    assert len(figures) > 20 and figures <= shown
    assert found.report.verdict in words and 'a <title> & "more"' in words
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for _, left, top, right, bottom in boxes:
        assert left >= 0 and top >= 0 and right <= width and bottom <= height
    for (a, *one), (b, *other) in combinations(boxes, 2):
        assert one[0] >= other[2] or other[0] >= one[2] or one[1] >= other[3] or other[1] >= one[3], (a, b)
