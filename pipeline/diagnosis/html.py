"""The stall report as one self-contained HTML page: inline SVG and CSS, no script, no font, no link."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from pipeline.diagnosis.charts import Chart, au_chart, cores_chart, parts_chart, steps_chart, throughput_chart
from pipeline.diagnosis.findings import Findings
from pipeline.diagnosis.screen import secondary_lines

SHOWN_ELSEWHERE = ("waits", "cores")  # names of `secondary_lines` that the page shows as a table or a chart
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 900px; margin: 2rem auto; padding: 0 1rem; color: #222;
       background: #fff }
h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.1rem; margin: 2rem 0 .4rem }
table { border-collapse: collapse } td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top }
td { overflow-wrap: anywhere } .n { text-align: right; font-variant-numeric: tabular-nums }
svg { display: block; max-width: 100%; height: auto } svg text { fill: #222 }
p.note { color: #666; margin: .2rem 0 }
"""


def report_html(found: Findings, title: str) -> str:
    """The page, as HTML text."""
    also = {name: line for name, line in secondary_lines(found).items() if name not in SHOWN_ELSEWHERE}
    sections = [
        f"<h1>{escape(found.account.verdict)}</h1><p>{escape(found.advice)}</p>"
        f"<p><b>Cause</b> {escape(found.cause.name)}: {escape(found.cause.because)}</p>",
        *(_drawn(chart(found)) for chart in (au_chart, throughput_chart, parts_chart, steps_chart)),
        _section(
            "Waits",
            _waits(found),
            "Milliseconds. The first batch of the run, and of later epochs, have their own rows.",
        ),
        _section("What to change", _actions(found), f"After that: {found.next_bottleneck}."),
        _drawn(cores_chart(found)),
        _section("Also measured", _table(also)),
        _section("Measured on", _table(_flat({**found.environment, "memory": found.memory}))),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )


def _drawn(chart: Chart) -> str:
    return _section(chart.title, chart.svg(), f"{chart.note}.")


def _section(title: str, body: str, note: str = "") -> str:
    below = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<h2>{escape(title)}</h2>{body}{below}"


def _waits(found: Findings) -> str:
    run = found.run
    rows = {
        "windows": found.waits_s,
        "whole run": run.get("waits_s"),
        "first batch of later epochs": run.get("edge_waits_s"),
        "gaps on the device": run.get("device_gaps_s"),
    }
    names = ("p50", "p95", "p99", "max")
    cells = "".join(
        f"<tr><td>{escape(row)}</td>{''.join(_number(1000 * values[name]) for name in names)}</tr>"
        for row, values in rows.items()
        if values
    )
    first_s = run.get("first_wait_s") or found.first_wait_s
    head = "".join(f'<th class="n">{name}</th>' for name in names)
    return f"<table><tr><th></th>{head}</tr>{cells}<tr><td>first batch</td>{_number(1000 * first_s)}</tr></table>"


def _number(value: float) -> str:
    return f'<td class="n">{value:,.2f}</td>'


def _actions(found: Findings) -> str:
    if not found.actions:
        return "<p>No change of the loader is predicted to train faster.</p>"
    return f"<ol>{''.join(f'<li>{escape(str(action))}</li>' for action in found.actions)}</ol>"


def _table(rows: Mapping[str, Any]) -> str:
    cells = (f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>" for name, value in rows.items())
    return f"<table>{''.join(cells)}</table>"


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested entries by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
