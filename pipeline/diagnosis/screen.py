"""The stall report as one screen of text."""

from __future__ import annotations

from statistics import median
from textwrap import wrap
from typing import Any

from pipeline.diagnosis.accounting import format_account
from pipeline.diagnosis.findings import Findings
from pipeline.diagnosis.run_account import had_slow_first_epoch
from pipeline.profiling.stages import format_storage

MAX_PRINTED_ACTIONS = 4
SCREEN_WIDTH = 120
INDENT = 11  # columns of the names before lines


def secondary_lines(found: Findings) -> dict[str, str]:
    """What was measured besides throughput and AU: lines of text by name."""
    waits, cores, memory = found.waits_s, found.cpu_cores, found.memory
    usable = found.workload.cores / found.workload.hosts
    other_ranks = f" other ranks {cores['rest of job']:.2f}," if found.workload.ranks > 1 else ""
    host = "host: " if found.device["asynchronous"] else ""
    lines = {
        "storage": format_storage(found.storage),
        "machine": str(found.host),
        "evidence": _evidence_line(found.device),
        "waits": f"{host}p50 {_ms(waits['p50'])}, p95 {_ms(waits['p95'])}, p99 {_ms(waits['p99'])} a step;"
        f" first batch {_ms(found.first_wait_s)}",
        "cores": f"loader {cores['loader']:.2f}, main thread {cores['main']:.2f}, other threads {cores['others']:.2f},"
        f"{other_ranks} neighbours {cores['neighbours']:.2f}, of {usable:g}",
        "memory": f"{memory['resident'] / 2**30:.2f} GiB resident, {memory['shared'] / 2**30:.2f} shared",
    }
    if pressure := str(found.pressure):
        lines["pressure"] = pressure
    if decoding := found.environment.get("hardware_decoding"):  # of a GPU
        lines["decoder"] = f"JPEG engines active: {decoding['active']}; {decoding['because']}"
    return lines | (_run_lines(found) if found.run else {})


def _evidence_line(device: dict[str, Any]) -> str:
    if not device["asynchronous"]:
        return "host clocks; the device is synchronous: a step returns when it is done"
    run = f"; the run: {device['run']}" * (device["run"] is not None)
    return f"host clocks; the device is asynchronous: a wait counts once the device's queue is empty{run}"


def _run_lines(found: Findings) -> dict[str, str]:
    run = found.run
    judged = f"{run['img_s']:,.0f} img/s, too few steps to compare" if found.check is None else str(found.check)
    lines = {
        "run": f"{judged}; first batch {_ms(run['first_wait_s'])}; clocks {run['clocks_share']:.4%} of the time",
        "run time": ", ".join(f"{name} {share:.1%}{_count(run, name)}" for name, share in run["shares"].items()),
    }
    if found.check is not None and found.check.spell is not None:
        lines["slow part"] = str(found.check.spell).removeprefix("slow ")
    if had_slow_first_epoch(rates := run["epochs_img_s"]):
        lines["epochs"] = f"the first made {rates[0]:,.0f} img/s, later ones {median(rates[1:]):,.0f}"
    if edges := run["edge_waits_s"]:
        lines["edges"] = f"waits for the first batch of later epochs: p50 {_ms(edges['p50'])}, max {_ms(edges['max'])}"
    if gaps := run["device_gaps_s"]:
        lines["device"] = (
            f"gaps p50 {_ms(gaps['p50'])}, p95 {_ms(gaps['p95'])}, p99 {_ms(gaps['p99'])} between steps of"
            f" {_ms(run['device_steps_s']['p50'])}; idle {run['idle_shares']['input']:.1%} for input,"
            f" {run['idle_shares']['host']:.1%} for the host"
        )
    return lines


def _count(run: dict[str, Any], name: str) -> str:
    """How often a pause was made; nothing for what is no pause."""
    return f" ({len(run['pauses_s'][name])})" if name in run["pauses_s"] else ""


def format_findings(found: Findings) -> str:
    """The stall report as one screen of text."""
    own = found.check is not None and not found.check.explained
    run = f"run        {found.account.together:10,.0f} img/s  the run itself; the windows after it do not explain it"
    shown = found.actions[:MAX_PRINTED_ACTIONS]
    lines = [
        f"verdict    {found.account.verdict}",
        *_wrapped("", found.advice),
        "",
        format_account(found.account, run if own else ""),
        f"AU         {found.au}; threshold {found.au_threshold:.0%}",
        *_wrapped("cause", f"{found.cause.name}: {found.cause.because}"),
        *(line for name, text in secondary_lines(found).items() for line in _wrapped(name, text)),
        *(line for n, action in enumerate(shown, 1) for line in _wrapped(f"action {n}", str(action))),
        f"then       the next bottleneck is {found.next_bottleneck}",
    ]
    return "\n".join(lines)


def _wrapped(name: str, text: str) -> list[str]:
    """Lines of text with their name before the first one."""
    lines = wrap(text, SCREEN_WIDTH - INDENT)
    return [f"{name if not number else '':<{INDENT}}{line}" for number, line in enumerate(lines)]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"
