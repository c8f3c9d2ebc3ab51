"""The doctor's findings as one page that needs nothing else: inline SVG and CSS, no script, no font, no link."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from pipeline.doctor import Step
from pipeline.findings import Findings
from pipeline.stall import PARTS

WIDTH, BAR, GAP = 860, 22, 8  # pixels
LABEL = 170  # pixels left of bars
SHOWN = 160  # steps of the timeline: a few pixels each
COLOURS = {
    "step": "#3b6ea5",
    "wait": "#d1495b",
    "rest": "#b8b8b8",
    "storage": "#7d5ba6",
    "decode": "#d1495b",
    "augment": "#e0913c",
    "transfer": "#2a9d8f",
    "contention": "#8a6d3b",
    "unexplained": "#b8b8b8",
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 900px; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.1rem; margin: 2rem 0 .4rem }
table { border-collapse: collapse } td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums } svg { display: block; max-width: 100% }
svg text { font: 13px system-ui, sans-serif; fill: #222 } .key { display: inline-block; width: .8em; height: .8em }
p.note { color: #666; margin: .2rem 0 }
"""


def page(found: Findings, title: str) -> str:
    """The whole page, HTML."""
    report, host_cores = found.report, found.load.cores / found.load.hosts
    sections = [
        f"<h1>{escape(report.verdict)}</h1><p>{escape(report.action)}</p>"
        f"<p><b>Cause</b> {escape(found.cause.name)}: {escape(found.cause.because)}</p>",
        f"<p><b>AU {report.au:.1%}</b> ({escape(str(found.au))}; the bar is {found.au_bar:.0%}), overlap"
        f" {report.overlap:.1%}, stall {report.stall:.1%}</p>",
        _section("Rates against demand", _rates(found), "The line is what the trainer takes from replayed batches."),
        _section("The stall's parts", _bars({p: report.parts[p] for p in PARTS}, 1.0, "{:.1%}".format, COLOURS)),
        _section("Steps", _timeline(found.steps[-SHOWN:]), f"The last {min(SHOWN, len(found.steps))} real steps."),
        _section("Waits", _waits(found), "Milliseconds. The first batch and epochs' edges stand apart."),
        _section("What to change", _actions(found), f"After that: {found.next_bottleneck}."),
        _section("Cores in use", _bars(found.cpu_cores, max(host_cores, 1.0), "{:.2f}".format)),
        _section("Measured on", _table(_flat({**found.fingerprint, "memory": found.memory}))),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )


def _section(title: str, body: str, note: str = "") -> str:
    return f'<h2>{escape(title)}</h2>{body}<p class="note">{escape(note)}</p>'


def _rates(found: Findings) -> str:
    stages, report = found.stages, found.report
    rates = {
        "read": stages.read,
        "read, decode": stages.decoded,
        "supply": stages.supply,
        "demand": report.demand,
        "together": report.together,
    }
    # Reading alone is often fifty times the rest: bars end at thrice the demand, the figures tell.
    most = 3 * max(report.demand, report.together)
    return _bars(rates, most, "{:,.0f} img/s".format, {"together": COLOURS["wait"]}, mark=report.demand)


def _bars(
    values: Mapping[str, float],
    most: float,
    text: Any,
    colours: Mapping[str, str] | None = None,
    mark: float | None = None,
) -> str:
    """A horizontal bar for each value, cut at `most`; a line at `mark`."""
    scale, height = (WIDTH - LABEL - 130) / most, len(values) * (BAR + GAP)
    drawn = []
    for row, (name, value) in enumerate(values.items()):
        y, length = row * (BAR + GAP), scale * min(max(value, 0.0), most)
        colour = (colours or {}).get(name, COLOURS["step"])
        drawn.append(
            f'<text x="0" y="{y + 16}">{escape(name)}</text>'
            f'<rect x="{LABEL}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{colour}"/>'
            f'<text x="{LABEL + length + 6:.1f}" y="{y + 16}">{escape(text(value))}</text>'
        )
    if mark is not None:
        x = LABEL + scale * mark
        drawn.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}" stroke="#222" stroke-dasharray="4 3"/>')
    return _svg(height, drawn)


def _timeline(steps: Sequence[Step]) -> str:
    """A column for each step: the step itself, the wait above it, the rest on top; the tallest fills the height."""
    height, width = 160, WIDTH / max(len(steps), 1)
    tallest_s = max((s.wait_s + s.step_s + s.rest_s for s in steps), default=1.0)
    drawn = []
    for column, step in enumerate(steps):
        base = 0.0
        for name, seconds in (("step", step.step_s), ("wait", step.wait_s), ("rest", step.rest_s)):
            tall = seconds / tallest_s * height
            drawn.append(
                f'<rect x="{column * width:.1f}" y="{height - base - tall:.1f}" width="{max(width - 0.5, 0.5):.1f}"'
                f' height="{tall:.1f}" fill="{COLOURS[name]}"/>'
            )
            base += tall
    keys = "".join(
        f'<span class="key" style="background:{COLOURS[name]}"></span> {name} &nbsp; '
        for name in ("step", "wait", "rest")
    )
    return f"{_svg(height, drawn)}<p>{keys} tallest {1000 * tallest_s:.1f} ms</p>"


def _svg(height: float, drawn: Iterable[str]) -> str:
    return f'<svg width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}">{"".join(drawn)}</svg>'


def _waits(found: Findings) -> str:
    run = found.run
    rows = {
        "windows": found.waits_s,
        "whole run": run.get("waits_s"),
        "epochs' edges": run.get("edge_waits_s"),
        "gaps on the device": run.get("device_gaps_s"),
    }
    names = ("p50", "p95", "p99", "max")
    cells = "".join(
        f"<tr><td>{escape(row)}</td>{''.join(_number(1000 * values[name]) for name in names)}</tr>"
        for row, values in rows.items()
        if values
    )
    first_s = run.get("first_wait_s") or found.first_wait_s
    head = "".join(f"<th>{name}</th>" for name in names)
    return f"<table><tr><th></th>{head}</tr>{cells}<tr><td>first batch</td>{_number(1000 * first_s)}</tr></table>"


def _number(value: float) -> str:
    return f'<td class="n">{value:,.2f}</td>'


def _actions(found: Findings) -> str:
    if not found.actions:
        return "<p>Nothing about the feed would train faster.</p>"
    return f"<ol>{''.join(f'<li>{escape(str(action))}</li>' for action in found.actions)}</ol>"


def _table(rows: Mapping[str, Any]) -> str:
    cells = (f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>" for name, value in rows.items())
    return f"<table>{''.join(cells)}</table>"


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested entries under their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
