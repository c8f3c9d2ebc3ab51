"""CPU time by user: this process's threads by task, the other processes of its job, and all other processes.

Linux only: threads are told apart by their names in /proc, and DALI names its threads "[DALI]...". The worker processes
of a torch DataLoader count as threads of the loader.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from pipeline.host import Pressure, PressureMark, affinity, pressure_mark

GROUPS = ("loader", "main", "others")
DALI_PREFIX = "[DALI]"
DATALOADER_WORKER = "pt_data_worker"  # the name that torch gives to a worker process of its DataLoader
USED_CPU_STATES = ("user", "nice", "system", "irq", "softirq", "steal")  # psutil's names for time that a core was used


def group_of(name: str, is_main: bool) -> str:
    """The group of a thread: "loader" (DALI's), "main" (it runs the loop) or "others" (for example torch's pool)."""
    if is_main:
        return "main"
    return "loader" if name.startswith(DALI_PREFIX) else "others"


@dataclass(frozen=True)
class CpuUse:
    """CPU seconds that were used between two marks.

    Attributes:
        wall_s: seconds between the marks.
        groups_s: CPU seconds of this process, by group of threads.
        rest_of_job_s: of the job's other processes on this host: children and, under torchrun, the other ranks.
        neighbours_s: of all processes that do not belong to the job.
        pressure: what the kernel counted meanwhile.
    """

    wall_s: float
    groups_s: dict[str, float]
    rest_of_job_s: float
    neighbours_s: float
    pressure: Pressure = field(default_factory=Pressure)

    @property
    def own_s(self) -> float:
        """CPU seconds of the whole job on this host."""
        return sum(self.groups_s.values()) + self.rest_of_job_s

    def cores(self) -> dict[str, float]:
        """Mean number of cores in use: by group, by the rest of the job and by neighbours."""
        seconds = {**self.groups_s, "rest of job": self.rest_of_job_s, "neighbours": self.neighbours_s}
        return {name: value / self.wall_s for name, value in seconds.items()}

    def __add__(self, other: CpuUse) -> CpuUse:
        groups_s = {name: self.groups_s[name] + other.groups_s[name] for name in GROUPS}
        return CpuUse(
            self.wall_s + other.wall_s,
            groups_s,
            self.rest_of_job_s + other.rest_of_job_s,
            self.neighbours_s + other.neighbours_s,
            self.pressure + other.pressure,
        )


@dataclass(frozen=True)
class CpuMark:
    """CPU seconds since each process started, read at one moment.

    Attributes:
        at_s: the moment, by `time.perf_counter`.
        threads_s: CPU seconds of this process's threads and its DataLoader's worker processes, by (id, group).
        own_s: CPU seconds of this process and of its DataLoader's worker processes.
        rest_of_job_s: CPU seconds of the job's other processes on this host.
        machine_s: CPU seconds of everything that ran on the cores that this process may use.
        pressure: the kernel's counters; None if they were not read.
    """

    at_s: float
    threads_s: dict[tuple[int, str], float]
    own_s: float
    rest_of_job_s: float
    machine_s: float
    pressure: PressureMark | None = None

    def until(self, later: CpuMark) -> CpuUse:
        """What was used between this mark and a later one. Threads that ended in between count as "others"."""
        groups_s = dict.fromkeys(GROUPS, 0.0)
        for thread, seconds in later.threads_s.items():
            groups_s[thread[1]] += seconds - self.threads_s.get(thread, 0.0)
        own_s = later.own_s - self.own_s
        groups_s["others"] += max(0.0, own_s - sum(groups_s.values()))
        rest_of_job_s = max(0.0, later.rest_of_job_s - self.rest_of_job_s)
        machine_s = later.machine_s - self.machine_s
        neighbours_s = max(0.0, machine_s - own_s - rest_of_job_s)
        pressure = self.pressure.until(later.pressure) if self.pressure and later.pressure else Pressure()
        return CpuUse(later.at_s - self.at_s, groups_s, rest_of_job_s, neighbours_s, pressure)


def cpu_mark() -> CpuMark:
    """Reads all CPU clocks. It costs a few milliseconds with many threads: call it between windows, not within one."""
    process = psutil.Process()
    threads_s = {}
    for thread in process.threads():
        try:
            name = Path(f"/proc/self/task/{thread.id}/comm").read_text().strip()
        except FileNotFoundError:
            continue  # the thread ended after it was listed
        threads_s[thread.id, group_of(name, thread.id == os.getpid())] = thread.user_time + thread.system_time
    own, every_core = process.cpu_times(), psutil.cpu_times(percpu=True)
    rest_of_job_s = workers_s = 0.0
    for other in _rest_of_job(process):
        try:
            times = other.cpu_times()
            is_worker = other.ppid() == process.pid and other.name() == DATALOADER_WORKER
        except psutil.NoSuchProcess:
            continue
        if is_worker:
            threads_s[other.pid, "loader"] = times.user + times.system
            workers_s += times.user + times.system
        else:
            rest_of_job_s += times.user + times.system
    # Guest time is part of user time. Steal is what the hypervisor gave to other machines, so it counts as used.
    usable = [every_core[core] for core in affinity() if core < len(every_core)]
    machine_s = sum(getattr(core, state, 0.0) for core in usable for state in USED_CPU_STATES)
    own_s = own.user + own.system + workers_s
    return CpuMark(time.perf_counter(), threads_s, own_s, rest_of_job_s, machine_s, pressure_mark())


def _rest_of_job(process: psutil.Process) -> list[psutil.Process]:
    """The children of `process`. With several ranks on this host: torchrun's agent and all its descendants."""
    several = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1
    first = (process.parent() if several else None) or process
    return [other for other in (first, *first.children(recursive=True)) if other != process]
