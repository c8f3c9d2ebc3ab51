"""The last steps of a run as a trace: waits, steps, pauses, the device, and the loader's threads on one time axis.

`StepTrace` keeps what the clocks of a run measure anyway. `trace_events` writes it in the Chrome trace event format,
which ui.perfetto.dev and chrome://tracing open. The fields of an event:

    ph    "X" a span, "C" values of a counter, "M" the name of a process or thread
    ts    begin, in microseconds since the first step of the trace
    dur   length of a span, in microseconds
    pid   a group of tracks; tid: the track within it
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pipeline.profiling.cpu_time import CpuMark

MAX_TRACE_STEPS = 2000  # about 0.6 MB
MAX_TRACE_MARKS = 200
MIN_PAUSE_S = 1e-4  # shorter ones are what the loop does between a step and the next
MIN_THREAD_SHARE = 0.01  # of a core: threads that use less have no span
RUN, STAGES = 1, 2  # groups of tracks: the run, and one batch as the stall report measured it
HOST, DEVICE = 1, 2  # tracks of the run; the loader's threads have their thread ids
Event = dict[str, Any]


@dataclass(frozen=True)
class TracedStep:
    """A step by the host's clocks.

    Attributes:
        number: optimizer steps of the run, this one included.
        ended_s: when it ended, by the clock of the trace.
        wait_s: seconds that it waited for its batch.
        step_s: seconds of the step.
        pause_s: seconds of the pause before it (validation, checkpoint).
        edge: whether it began an epoch.
    """

    number: int
    ended_s: float
    wait_s: float
    step_s: float
    pause_s: float = 0.0
    edge: bool = False

    @property
    def began_s(self) -> float:
        """When the step began, after its wait."""
        return self.ended_s - self.step_s


class StepTrace:
    """Keeps the last steps of a run.

    The device's clock and the host's have no common zero. The first step after each pause is taken to begin on the
    device when the host launched it; the gaps and steps after it add up from there.

    Args:
        max_steps: how many steps are kept.
        clock: gives the time in seconds.

    Attributes:
        steps: the last steps, by the host's clocks.
        device: begin, end and number of the last steps on the device.
        marks: CPU clocks that were read during the run: they give the loader's threads and the cores in use.
    """

    def __init__(self, max_steps: int = MAX_TRACE_STEPS, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.steps = deque[TracedStep](maxlen=max_steps)
        self.device = deque[tuple[float, float, int]](maxlen=max_steps)
        self.marks = deque[CpuMark](maxlen=MAX_TRACE_MARKS)
        self._launched = deque[TracedStep](maxlen=max_steps)  # steps that the device has not passed yet
        self._device_s = 0.0

    def step(self, number: int, wait_s: float, step_s: float, loop_s: float, edge: bool = False) -> None:
        """Adds a step that has just ended; `loop_s` is as in `StepClocks.add`."""
        ended_s = self._clock()
        pause_s = ended_s - self.steps[-1].ended_s - loop_s if self.steps else 0.0
        step = TracedStep(number, ended_s, wait_s, step_s, pause_s if pause_s > MIN_PAUSE_S else 0.0, edge)
        self.steps.append(step)
        self._launched.append(step)

    def device_step(self, gap_s: float | None, step_s: float, steps: int = 1) -> None:
        """Adds a step by the device's clock; the arguments are those of `StepClocks.add_device`."""
        launched = [self._launched.popleft() for _ in range(min(steps, len(self._launched)))]
        if not launched:
            return
        began_s = launched[0].began_s if gap_s is None else self._device_s + gap_s
        self._device_s = began_s + step_s
        self.device.append((began_s, self._device_s, launched[0].number))


def trace_events(trace: StepTrace, stage_s: Mapping[str, float] | None = None, name: str = "run") -> list[Event]:
    """The trace as events; empty without a step.

    Args:
        trace: the last steps.
        stage_s: seconds of a batch in each stage of the loader, as the stall report measured them.
        name: of the run.
    """
    if not trace.steps:
        return []
    first = trace.steps[0]
    zero_s = first.ended_s - first.step_s - first.wait_s
    events = [_named(RUN, 0, "process_name", name), _named(RUN, HOST, "thread_name", "training loop (host)")]
    for step in trace.steps:
        events += _host_spans(step, zero_s)
    if trace.device:
        events.append(_named(RUN, DEVICE, "thread_name", "training steps (device)"))
        spans = (span for span in trace.device if span[0] >= zero_s)
        events += [_span(RUN, DEVICE, f"step {number}", a, b, zero_s) for a, b, number in spans]
    kept = [mark for mark in trace.marks if zero_s <= mark.at_s <= trace.steps[-1].ended_s]
    events += _thread_spans(kept, zero_s)
    events += _counters(kept, zero_s)
    if stage_s:
        events += _stage_spans(stage_s)
    return events


def _host_spans(step: TracedStep, zero_s: float) -> Iterator[Event]:
    waited_s = step.began_s - step.wait_s
    if step.pause_s:
        what = "end of the epoch: validation, checkpoints" if step.edge else "checkpoint"
        # What the loop did just before the wait is in the pause too: the clocks do not tell them apart.
        yield _span(RUN, HOST, what, waited_s - step.pause_s, waited_s, zero_s)
    yield _span(RUN, HOST, "wait for the batch", waited_s, step.began_s, zero_s, step=step.number)
    yield _span(RUN, HOST, "step", step.began_s, step.ended_s, zero_s, step=step.number, first_of_epoch=step.edge)


def _thread_spans(marks: Sequence[CpuMark], zero_s: float) -> Iterator[Event]:
    """Each loader thread between two marks, with its share of a core."""
    threads = sorted({thread for mark in marks for thread, group in mark.threads_s if group == "loader"})
    for thread in threads:
        named = False
        for before, after in pairwise(marks):
            key = (thread, "loader")
            if key not in before.threads_s or key not in after.threads_s:
                continue
            share = (after.threads_s[key] - before.threads_s[key]) / (after.at_s - before.at_s)
            if share >= MIN_THREAD_SHARE:
                if not named:
                    named = True
                    yield _named(RUN, thread, "thread_name", "loader thread")
                yield _span(RUN, thread, f"busy {share:.0%}", before.at_s, after.at_s, zero_s, cores=round(share, 3))


def _counters(marks: Sequence[CpuMark], zero_s: float) -> Iterator[Event]:
    """Cores in use, and shares of the time in which some task waited for a resource."""
    for before, after in pairwise(marks):
        use = before.until(after)
        yield _counter("cores in use", before.at_s - zero_s, use.cores())
        if shares := use.pressure.waiting_shares:
            yield _counter("share of the time in which some task waited for", before.at_s - zero_s, shares)


def _stage_spans(stage_s: Mapping[str, float]) -> Iterator[Event]:
    yield _named(STAGES, 0, "process_name", "the loader's work for one batch: means of the stall report")
    yield _named(STAGES, 1, "thread_name", "stages")
    began_s = 0.0
    for stage, seconds in stage_s.items():
        yield _span(STAGES, 1, stage, began_s, began_s + seconds, 0.0)
        began_s += seconds


def _named(pid: int, tid: int, kind: str, name: str) -> Event:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "ts": 0, "args": {"name": name}}


def _span(pid: int, tid: int, name: str, began_s: float, ended_s: float, zero_s: float, **args: object) -> Event:
    # Whole nanoseconds, so that spans that touch do not overlap after rounding.
    began_ns, ended_ns = (max(0, round(1e9 * (at_s - zero_s))) for at_s in (began_s, ended_s))
    span = {"ph": "X", "name": name, "pid": pid, "tid": tid, "ts": began_ns / 1000, "dur": (ended_ns - began_ns) / 1000}
    return span | ({"args": args} if args else {})


def _counter(name: str, at_s: float, values: Mapping[str, float]) -> Event:
    shown = {key: round(value, 3) for key, value in values.items()}
    return {"ph": "C", "name": name, "pid": RUN, "tid": HOST, "ts": round(1e9 * at_s) / 1000, "args": shown}


def trace_record(events: Iterable[Event]) -> dict[str, Any]:
    """The content of trace.json."""
    return {"traceEvents": list(events), "displayTimeUnit": "ms"}
