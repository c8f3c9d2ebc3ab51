"""The machine as this process may use it: cores, memory, and what the kernel says about waiting for them. Linux only.

A container, a pod or a batch job often gets less than the machine has: `sched_setaffinity` limits the cores on which a
process may run, a control group (cgroup) limits its CPU time (quota) and its memory. Groups are nested, and each level
may set a limit. Everything that asks for cores or memory asks here. Both versions of control groups are read; `root`
is the folder that holds /proc and /sys, so that tests can bring their own.
"""

from __future__ import annotations

import mmap
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

ROOT = Path("/")
RESOURCES = ("cpu", "io", "memory")  # of pressure stall information (PSI)
MIN_QUOTA_CORES = 0.01


@dataclass(frozen=True)
class Host:
    """What this process may use.

    Attributes:
        machine_cores: cores of the machine.
        affinity_cores: cores on which this process may run.
        quota_cores: cores whose time its control groups allow; None without a quota.
        machine_bytes: memory of the machine.
        limit_bytes: memory that its control groups allow; None without a limit below the machine's memory.
        available_bytes: memory that it can still use. Page cache that can be dropped counts as available.
    """

    machine_cores: int
    affinity_cores: int
    quota_cores: float | None
    machine_bytes: int
    limit_bytes: int | None
    available_bytes: int

    @property
    def cores(self) -> float:
        """Cores that this process may use, which a quota may make a fraction."""
        return min(self.affinity_cores, self.quota_cores or self.affinity_cores)

    @property
    def whole_cores(self) -> int:
        """`cores`, rounded up: how many threads or processes can be busy."""
        return max(1, ceil(round(self.cores, 2)))

    def record(self) -> dict[str, Any]:
        """The entries for stall.json."""
        return {
            "cores": self.cores,
            "affinity_cores": self.affinity_cores,
            "quota_cores": self.quota_cores,
            "machine_cores": self.machine_cores,
            "machine_bytes": self.machine_bytes,
            "limit_bytes": self.limit_bytes,
            "available_bytes": self.available_bytes,
        }

    def __str__(self) -> str:
        cores, why = f"{self.cores:g} of {self.machine_cores} cores", ""
        if self.quota_cores is not None and self.quota_cores < self.affinity_cores:
            why = " (CPU quota)"
        elif self.affinity_cores < self.machine_cores:
            why = " (affinity)"
        memory = f"{self.available_bytes / 2**30:.1f} GiB of memory available"
        if self.limit_bytes is None:
            return f"{cores}{why}; {memory} of {self.machine_bytes / 2**30:.1f}"
        limited = f"the control group's {self.limit_bytes / 2**30:.1f} (the machine has"
        return f"{cores}{why}; {memory} of {limited} {self.machine_bytes / 2**30:.1f})"


def read_host(root: Path = ROOT) -> Host:
    """What this process may use now."""
    memory = _numbers(root / "proc/meminfo", unit=1024)
    machine_bytes, available = memory.get("MemTotal", 0), memory.get("MemAvailable", 0)
    limit_bytes = None
    for group in control_groups("memory", root):
        if (limit := _memory_limit(group)) is None or limit >= machine_bytes:
            continue
        limit_bytes = min(limit, limit_bytes or limit)
        available = min(available, max(0, limit - _memory_in_use(group)))
    quotas = [quota for group in control_groups("cpu", root) if (quota := _quota(group)) is not None]
    return Host(
        machine_cores=os.cpu_count() or 1,
        affinity_cores=len(affinity()),
        quota_cores=max(MIN_QUOTA_CORES, min(quotas)) if quotas else None,
        machine_bytes=machine_bytes,
        limit_bytes=limit_bytes,
        available_bytes=available,
    )


def affinity() -> set[int]:
    """Numbers of the cores on which this process may run."""
    if not hasattr(os, "sched_getaffinity"):  # macOS
        return set(range(os.cpu_count() or 1))
    return os.sched_getaffinity(0)


def whole_cores() -> int:
    """Cores that this process may use now, rounded up: the default number of threads and worker processes."""
    return read_host().whole_cores


def control_groups(controller: str, root: Path = ROOT) -> list[Path]:
    """The folders of this process's control groups for `controller`: its own first, then every visible one above it.

    Args:
        controller: "cpu" or "memory".
        root: holds /proc and /sys.
    """
    own = dict[str, str]()
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path)  # the line of version 2 names no controller
    folders = list[Path]()
    for kind, mount_root, mount_point, options in _mounts(root):
        name = "" if kind == "cgroup2" else controller
        if name in own and (kind == "cgroup2" or controller in options):
            top = root / mount_point.lstrip("/")
            below = _below(own[name], mount_root)
            inner = [top / Path(*below[:depth]) for depth in range(len(below), 0, -1)]
            folders += [folder for folder in (*inner, top) if folder.is_dir()]
    return folders


def _below(path: str, mount_root: str) -> tuple[str, ...]:
    """Parts of a group's path below what is mounted; none if the group itself is mounted, or lies outside."""
    inside = path == mount_root or path.startswith(f"{mount_root.rstrip('/')}/")
    parts = Path(path[len(mount_root.rstrip("/")) :].strip("/")).parts if inside else ()
    return () if ".." in parts else parts


def _mounts(root: Path) -> Iterator[tuple[str, str, str, list[str]]]:
    """File system, mounted folder, mount point and options of each mounted hierarchy of control groups."""
    for mount in mounts(root):
        if mount.kind in ("cgroup", "cgroup2"):
            yield mount.kind, mount.mounted, mount.point, mount.options


@dataclass(frozen=True)
class Mount:
    """A line of /proc/self/mountinfo.

    Attributes:
        device: "major:minor" of the file system.
        mounted: the folder of the file system that is mounted.
        point: where it is mounted.
        kind: the type of the file system, e.g. "ext4".
        source: the device, or a name that the file system chose.
        options: options of the file system.
    """

    device: str
    mounted: str
    point: str
    kind: str
    source: str
    options: list[str]


def mounts(root: Path = ROOT) -> list[Mount]:
    """Every mount that this process sees, in the order of the kernel: later ones cover earlier ones."""
    found = []
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        _, _, device, mounted, point, *_ = (_unescaped(word) for word in before.split(" "))
        kind, source, options = [*after.split(" "), "", ""][:3]
        found.append(Mount(device, mounted, point, kind, _unescaped(source), options.split(",")))
    return found


def _unescaped(word: str) -> str:
    """A path of mountinfo, in which the kernel writes spaces and the like as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), word)


def _quota(group: Path) -> float | None:
    """Cores that the group's quota allows: version 2 has `cpu.max`, version 1 two files."""
    for words in (line.split() for line in _lines(group / "cpu.max")):
        return None if words[0] == "max" else int(words[0]) / int(words[1])
    quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
    return quota / period if quota and period and quota > 0 else None


def _memory_limit(group: Path) -> int | None:
    """Bytes that the group allows; version 1 writes a huge number for no limit."""
    limits = [_number(group / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
    return min((limit for limit in limits if limit is not None), default=None)


def _memory_in_use(group: Path) -> int:
    """Bytes of the group that cannot be dropped: all but the page cache of files."""
    used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes") or 0
    stat = _numbers(group / "memory.stat")
    prefix = "total_" if "total_inactive_file" in stat else ""  # version 1: with the groups below
    return used - sum(stat.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))


# ---- waiting for cores, storage and memory ------------------------------------------------------------------------


@dataclass(frozen=True)
class Pressure:
    """What the kernel counted between two marks.

    Attributes:
        wall_s: seconds between the marks.
        periods: periods of the CPU quota, usually of 0.1 s, in which the group ran.
        throttled_periods: those of them in which the quota was used up.
        throttled_s: seconds for which the quota stopped the group, summed over cores.
        waiting_s: seconds in which some task waited, by resource ("cpu", "io", "memory"); empty if the kernel does not
            count them (pressure stall information, PSI).
        swapped_in_bytes: read from swap, on the whole machine.
    """

    wall_s: float = 0.0
    periods: int = 0
    throttled_periods: int = 0
    throttled_s: float = 0.0
    waiting_s: dict[str, float] = field(default_factory=dict)
    swapped_in_bytes: int = 0

    def __add__(self, other: Pressure) -> Pressure:
        resources = [name for name in RESOURCES if name in self.waiting_s or name in other.waiting_s]
        return Pressure(
            self.wall_s + other.wall_s,
            self.periods + other.periods,
            self.throttled_periods + other.throttled_periods,
            self.throttled_s + other.throttled_s,
            {name: self.waiting_s.get(name, 0.0) + other.waiting_s.get(name, 0.0) for name in resources},
            self.swapped_in_bytes + other.swapped_in_bytes,
        )

    @property
    def throttled_share(self) -> float:
        """Share of the quota's periods in which it was used up; 0 without a quota."""
        return self.throttled_periods / self.periods if self.periods else 0.0

    @property
    def waiting_shares(self) -> dict[str, float]:
        """`waiting_s` as shares of the time."""
        return {name: seconds / self.wall_s for name, seconds in self.waiting_s.items()} if self.wall_s else {}

    def record(self) -> dict[str, Any]:
        """The entries for stall.json."""
        return {
            "throttled_share": self.throttled_share,
            "throttled_s": self.throttled_s,
            "waiting_shares": self.waiting_shares,
            "swapped_in_bytes": self.swapped_in_bytes,
        }

    def __str__(self) -> str:
        parts = [f"{name} {share:.0%}" for name, share in self.waiting_shares.items()]
        texts = [f"some task waited for {', '.join(parts)} of the time"] if parts else []
        if self.throttled_periods:
            texts.append(f"throttled in {self.throttled_share:.0%} of the quota's periods, {self.throttled_s:.1f} s")
        if self.swapped_in_bytes:
            texts.append(f"{self.swapped_in_bytes / 2**20:,.0f} MiB read from swap")
        return "; ".join(texts)


@dataclass(frozen=True)
class PressureMark:
    """The kernel's counters at one moment; see `Pressure`. `groups` has periods, throttled periods and nanoseconds."""

    at_s: float
    groups: tuple[tuple[int, int, int], ...]
    waiting_us: dict[str, int]
    swapped_pages: int

    def until(self, later: PressureMark) -> Pressure:
        """What was counted between this mark and a later one. Of nested groups the most throttled one counts."""
        pairs = zip(self.groups, later.groups, strict=False)
        passed = [(d - a, e - b, f - c) for (a, b, c), (d, e, f) in pairs]
        periods, throttled, throttled_ns = max(passed, key=lambda group: (group[2], group[0]), default=(0, 0, 0))
        waited = {name: (us - self.waiting_us.get(name, us)) / 1e6 for name, us in later.waiting_us.items()}
        swapped = (later.swapped_pages - self.swapped_pages) * mmap.PAGESIZE
        return Pressure(later.at_s - self.at_s, periods, throttled, throttled_ns / 1e9, waited, swapped)


def pressure_mark(root: Path = ROOT) -> PressureMark:
    """Reads the counters. It takes well under a millisecond."""
    groups = []
    for group in control_groups("cpu", root):
        stat = _numbers(group / "cpu.stat")
        throttled_ns = stat.get("throttled_time", 1000 * stat.get("throttled_usec", 0))
        groups.append((stat.get("nr_periods", 0), stat.get("nr_throttled", 0), throttled_ns))
    own = next(iter(control_groups("", root)), None)  # the group of version 2 counts its own waiting
    waiting_us = {}
    for name in RESOURCES:
        paths = ([own / f"{name}.pressure"] if own else []) + [root / f"proc/pressure/{name}"]
        for line in next((lines for path in paths if (lines := _lines(path))), [])[:1]:
            waiting_us[name] = int(line.rpartition("total=")[2])
    swapped = _numbers(root / "proc/vmstat").get("pswpin", 0)
    return PressureMark(time.perf_counter(), tuple(groups), waiting_us, swapped)


def _lines(path: Path) -> list[str]:
    """The lines of a file of the kernel; none if it is missing, or if this process may not read it."""
    with suppress(OSError):
        return path.read_text().splitlines()
    return []


def _number(path: Path) -> int | None:
    """The number in a file; None if there is none, for example "max"."""
    return next((int(line) for line in _lines(path)[:1] if line.lstrip("-").isdigit()), None)


def _numbers(path: Path, unit: int = 1) -> dict[str, int]:
    """The numbers of a file of lines "name number", times `unit`."""
    rows = (line.replace(":", " ").split() for line in _lines(path))
    return {row[0]: unit * int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
