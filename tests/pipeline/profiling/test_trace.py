"""The trace of a run: the fields that the format requires, and spans that match the clocks."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from typing import Any

import pytest

from pipeline.profiling.cpu_time import CpuMark
from pipeline.profiling.trace import StepTrace, trace_events, trace_record


class Clock:
    """Virtual time."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        """The time in seconds."""
        return self.now_s


def traced(steps: int = 6, pauses: dict[int, float] | None = None, max_steps: int = 100) -> StepTrace:
    """Steps of 0.1 s after waits of 0.02 s, 0.01 s of callbacks after each, and pauses before some of them."""
    clock = Clock()
    trace = StepTrace(max_steps, clock)
    for number in range(1, steps + 1):
        clock.now_s += (pauses or {}).get(number, 0.0) + 0.13
        trace.step(number, 0.02, 0.1, 0.13, edge=number == 4)
    return trace


def spans(events: list[dict[str, Any]], name: str = "") -> list[dict[str, Any]]:
    return [event for event in events if event["ph"] == "X" and (not name or event["name"] == name)]


def assert_valid(events: list[dict[str, Any]]) -> None:
    """The format's required fields; spans of one track do not overlap; everything can be written as JSON."""
    tracks: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for event in json.loads(json.dumps(trace_record(events), allow_nan=False))["traceEvents"]:
        assert event["ph"] in "XCM" and isinstance(event["name"], str) and event["name"]
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
        assert isinstance(event["ts"], (int, float)) and event["ts"] >= 0
        if event["ph"] == "X":
            assert isinstance(event["dur"], (int, float)) and event["dur"] >= 0
            tracks[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
        if event["ph"] == "C":
            assert all(isinstance(value, (int, float)) for value in event["args"].values())
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name") and event["args"]["name"]
    for track in tracks.values():
        assert all(a[1] <= b[0] + 1e-6 for a, b in pairwise(sorted(track)))


def test_waits_and_steps_are_where_the_clocks_saw_them():
    events = trace_events(traced())
    assert_valid(events)
    waits, steps = spans(events, "wait for the batch"), spans(events, "step")
    assert waits[0]["ts"] == 0 and [one["args"]["step"] for one in steps] == [1, 2, 3, 4, 5, 6]
    assert [one["dur"] for one in waits] == pytest.approx([20_000] * 6)
    assert [one["dur"] for one in steps] == pytest.approx([100_000] * 6)
    assert steps[1]["ts"] - steps[0]["ts"] == pytest.approx(130_000)


def test_pauses_are_spans_of_their_own():
    events = trace_events(traced(pauses={3: 0.5, 4: 2.0}))
    assert_valid(events)
    (save,) = spans(events, "checkpoint")
    (edge,) = spans(events, "end of the epoch: validation, checkpoints")
    assert save["dur"] == pytest.approx(500_000) and edge["dur"] == pytest.approx(2_000_000)


def test_only_the_last_steps_are_kept():
    events = trace_events(traced(steps=5000, max_steps=300))
    assert len(spans(events, "step")) == 300 and spans(events, "step")[-1]["args"]["step"] == 5000
    assert len(json.dumps(trace_record(events))) < 300 * 400
    assert trace_events(StepTrace()) == []


def test_steps_of_a_device_follow_each_other_by_its_own_clock():
    """The host launches within 5 ms and waits little; the device takes 100 ms a step, with a gap before the third."""
    clock = Clock()
    trace = StepTrace(100, clock)
    for number in range(1, 5):
        clock.now_s += 0.01
        trace.step(number, 0.004, 0.005, 0.01)
    trace.device_step(None, 0.1)
    trace.device_step(0.0, 0.1)
    trace.device_step(0.03, 0.2, steps=2)  # two steps that were measured as one
    events = trace_events(trace)
    assert_valid(events)
    device = [one for one in spans(events) if one["tid"] == 2]
    assert [one["name"] for one in device] == ["step 1", "step 2", "step 3"]
    assert device[0]["ts"] == spans(events, "step")[0]["ts"]
    assert [b["ts"] - a["ts"] - a["dur"] for a, b in pairwise(device)] == pytest.approx([0, 30_000])


def mark(at_s: float, loader_s: float, main_s: float) -> CpuMark:
    threads = {(11, "loader"): loader_s, (12, "loader"): 0.0, (10, "main"): main_s}
    return CpuMark(at_s, threads, loader_s + main_s, 0.0, loader_s + main_s + 1.0)


def test_loader_threads_have_spans_of_their_share_of_a_core():
    trace = traced(20)
    trace.marks += [mark(900.0, 0.0, 0.0), mark(1000.5, 1.0, 1.0), mark(1001.5, 1.8, 1.5), mark(2000.0, 9.0, 9.0)]
    events = trace_events(trace, {"storage": 0.002, "decode": 0.03}, "first")
    assert_valid(events)
    (busy,) = spans(events, "busy 80%")  # the interval within the trace; the idle thread has no span
    assert busy["tid"] == 11 and busy["dur"] == pytest.approx(1e6)
    assert [one["tid"] for one in events if one["ph"] == "M" and one["args"]["name"] == "loader thread"] == [11]
    (cores,) = [event for event in events if event["ph"] == "C"]
    assert cores["args"]["loader"] == 0.8 and cores["args"]["main"] == 0.5
    assert [one["dur"] for one in spans(events) if one["pid"] == 2] == pytest.approx([2000, 30_000])
