"""Whose CPU time it was: this process's threads by what they do, the rest of its job, everybody else on the machine.

Linux only: threads are told apart by their names in /proc (DALI names its own).
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

GROUPS = ("feed", "main", "others")
DALI_PREFIX = "[DALI]"
BUSY = ("user", "nice", "system", "irq", "softirq", "steal")  # of a core's time


def group_of(name: str, is_main: bool) -> str:
    """The group of a thread: "feed" (DALI's), "main" (the one that runs the loop), "others" (the trainer's pool)."""
    if is_main:
        return "main"
    return "feed" if name.startswith(DALI_PREFIX) else "others"


@dataclass(frozen=True)
class CpuUse:
    """CPU seconds during `wall_s`: of this process by group, of its job's other processes on this host (children; under
    torchrun the other ranks and theirs), and of everybody else."""

    wall_s: float
    groups_s: dict[str, float]
    rest_of_job_s: float
    neighbours_s: float

    @property
    def own_s(self) -> float:
        """Of the whole job on this host."""
        return sum(self.groups_s.values()) + self.rest_of_job_s

    def cores(self) -> dict[str, float]:
        """Cores in use on average, by group, rest of the job and neighbours."""
        seconds = {**self.groups_s, "rest of job": self.rest_of_job_s, "neighbours": self.neighbours_s}
        return {name: value / self.wall_s for name, value in seconds.items()}

    def __add__(self, other: CpuUse) -> CpuUse:
        groups_s = {name: self.groups_s[name] + other.groups_s[name] for name in GROUPS}
        return CpuUse(
            self.wall_s + other.wall_s,
            groups_s,
            self.rest_of_job_s + other.rest_of_job_s,
            self.neighbours_s + other.neighbours_s,
        )


@dataclass(frozen=True)
class CpuMark:
    """CPU seconds so far: `threads_s` by (thread, group), `own_s` of the process, of the rest of its job, and of all on
    its cores."""

    at_s: float
    threads_s: dict[tuple[int, str], float]
    own_s: float
    rest_of_job_s: float
    machine_s: float

    def until(self, later: CpuMark) -> CpuUse:
        """What was used between two marks. Threads that ended in between count as "others"."""
        groups_s = dict.fromkeys(GROUPS, 0.0)
        for thread, seconds in later.threads_s.items():
            groups_s[thread[1]] += seconds - self.threads_s.get(thread, 0.0)
        own_s = later.own_s - self.own_s
        groups_s["others"] += max(0.0, own_s - sum(groups_s.values()))
        rest_of_job_s = max(0.0, later.rest_of_job_s - self.rest_of_job_s)
        machine_s = later.machine_s - self.machine_s
        neighbours_s = max(0.0, machine_s - own_s - rest_of_job_s)
        return CpuUse(later.at_s - self.at_s, groups_s, rest_of_job_s, neighbours_s)


def cpu_mark() -> CpuMark:
    """Reads the clocks. Costs a few milliseconds where there are many threads: at the edges of windows, not in them."""
    process = psutil.Process()
    threads_s = {}
    for thread in process.threads():
        try:
            name = Path(f"/proc/self/task/{thread.id}/comm").read_text().strip()
        except FileNotFoundError:
            continue  # it ended between being listed and being asked
        threads_s[thread.id, group_of(name, thread.id == os.getpid())] = thread.user_time + thread.system_time
    own, every_core = process.cpu_times(), psutil.cpu_times(percpu=True)
    rest_of_job_s = 0.0
    for other in _rest_of_job(process):
        try:
            times = other.cpu_times()
        except psutil.NoSuchProcess:
            continue
        rest_of_job_s += times.user + times.system
    # guest time is in user time already; steal is what the hypervisor gave to others, idle and iowait are nobody's
    ours = [every_core[core] for core in os.sched_getaffinity(0) if core < len(every_core)]
    machine_s = sum(getattr(core, name, 0.0) for core in ours for name in BUSY)
    return CpuMark(time.perf_counter(), threads_s, own.user + own.system, rest_of_job_s, machine_s)


def _rest_of_job(process: psutil.Process) -> list[psutil.Process]:
    """Its children. Where several ranks are on this host: all that its parent started, who is torchrun's agent, too."""
    several = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1
    first = (process.parent() if several else None) or process
    return [other for other in (first, *first.children(recursive=True)) if other != process]
