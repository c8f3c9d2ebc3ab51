"""The watch of a run's input among ranks: the longest wait counts, and only the first rank reads counters."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipeline.host import PressureMark
from pipeline.profiling.cpu_time import CpuMark
from tools.shared.input_watch import Counters, InputWatch, read_counters, storage_bytes


class Host:
    """Counters of a host on which time passes with each reading."""

    def __init__(self) -> None:
        self.at_s = self.machine_s = 0.0
        self.bytes = self.readings = 0

    def __call__(self) -> Counters:
        """The counters now."""
        self.readings += 1
        pressure = PressureMark(self.at_s, (), {}, 0)
        return Counters(CpuMark(self.at_s, {}, 0.0, 0.0, self.machine_s, pressure), self.bytes)


def ranks(first: bool = True, share_elsewhere: float = 0.0) -> Any:
    """This rank among others, of which one waits for `share_elsewhere` of the time."""
    return SimpleNamespace(first=first, largest=lambda number: max(number, round(1e6 * share_elsewhere)))


def trained(watch: InputWatch, host: Host, intervals: int, wait_s: float, start: int = 0, read: int = 0) -> list[str]:
    """Lines of logging intervals of 20 steps of 0.1 s each, in which `read` bytes a step come from storage."""
    said = []
    for interval in range(start, start + intervals):
        for _ in range(20):
            watch.step(wait_s, 0.1, False)
        host.at_s += 2.0
        host.bytes += 20 * read
        said.append(watch.after_interval(20 * (interval + 1)))
    return [line for line in said if line]


def test_the_counters_are_read_once_a_block_and_name_the_part():
    host = Host()
    watch = InputWatch(ranks(), False, step_bytes=1000, block_s=10.0, counters=host)
    assert trained(watch, host, 52, 0.001) == [] and host.readings == 11
    (line,) = trained(watch, host, 20, 0.05, 52, read=900)
    assert "at step 1,041" in line and "storage: 90% of the images' bytes come from storage" in line
    assert watch.input_bound


def test_the_wait_of_the_slowest_rank_counts():
    host = Host()
    watch = InputWatch(ranks(), False, 1000, 10.0, counters=host)
    assert trained(watch, host, 42, 0.001) == []
    watch._ranks = ranks(share_elsewhere=0.5)
    (line,) = trained(watch, host, 20, 0.001, 42)
    assert "it waits 50% of the time" in line


def test_other_ranks_say_nothing_and_read_no_counters():
    host = Host()
    watch = InputWatch(ranks(first=False), False, 1000, 10.0, counters=host)
    assert trained(watch, host, 40, 0.001) + trained(watch, host, 40, 0.08, 40) == [] and not host.readings


def test_the_counters_of_this_host_can_be_read(tmp_path: Path):
    assert read_counters().cpu.until(read_counters().cpu).wall_s >= 0
    (tmp_path / "io").write_text("rchar: 5\nread_bytes: 4096\nwrite_bytes: 1\n")
    assert storage_bytes(tmp_path / "io") == 4096
    assert storage_bytes(tmp_path / "missing") == 0
