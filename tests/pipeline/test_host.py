"""Cores, memory and pressure as a process may use them: trees of files as the kernel writes them, and real groups."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import host
from pipeline.host import Pressure, control_groups, mounts, pressure_mark, read_host
from pipeline.loader.settings import default_threads
from tests.support.control_groups import NoControlGroups, limited
from tools.shared import cli

GIB = 2**30
V2_MOUNT = "30 20 0:26 / /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNTS = (
    "31 20 0:27 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "32 20 0:28 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
)


class Tree:
    """A folder that looks like / to `pipeline.host`: 16 GiB, of which 12 are available, on 8 cores."""

    def __init__(self, root: Path, mountinfo: str, cgroup: str) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal: {16 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {12 * 2**20} kB\n")
        self.write("proc/self/mountinfo", f"20 1 8:1 / / rw - ext4 /dev/sda1 rw\n{mountinfo}\n")
        self.write("proc/self/cgroup", cgroup)

    def write(self, path: str, text: str) -> None:
        """A file, and the folders above it."""
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def group(self, path: str, **files: object) -> None:
        """Files of a group; a double underscore in a name is a dot."""
        for name, text in files.items():
            self.write(f"sys/fs/cgroup/{path}/{name.replace('__', '.')}", f"{text}\n")


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "real" not in request.node.name:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
        monkeypatch.setattr(os, "cpu_count", lambda: 8)


def test_without_limits_the_machine_counts(tmp_path: Path):
    tree = Tree(tmp_path, V2_MOUNT, "0::/\n")
    tree.group("", cgroup__procs="1")
    found = read_host(tree.root)
    assert (found.cores, found.whole_cores, found.quota_cores) == (8, 8, None)
    assert (found.limit_bytes, found.available_bytes) == (None, 12 * GIB)
    assert "8 of 8 cores;" in str(found) and "12.0 GiB of memory available of 16.0" in str(found)


@pytest.mark.parametrize(("own", "above", "cores"), [("max", "150000 100000", 1.5), ("100000 50000", "max", 2.0)])
def test_the_smallest_quota_of_nested_groups_counts(tmp_path: Path, own: str, above: str, cores: float):
    """A pod limits its containers, or a container itself."""
    tree = Tree(tmp_path, V2_MOUNT, "0::/pod/box\n")
    tree.group("pod", cpu__max=above)
    tree.group("pod/box", cpu__max=own)
    found = read_host(tree.root)
    assert (found.cores, found.whole_cores) == (cores, 2)
    assert f"{cores:g} of 8 cores (CPU quota)" in str(found)


def test_version_1_has_quota_and_limit_in_files_of_its_own(tmp_path: Path):
    tree = Tree(tmp_path, V1_MOUNTS.format(root="/"), "5:memory:/docker/a\n3:cpu,cpuacct:/docker/a\n0::/\n")
    tree.group("cpu,cpuacct/docker/a", cpu__cfs_quota_us=250000, cpu__cfs_period_us=100000)
    tree.group("cpu,cpuacct", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    stat = f"inactive_file 0\ntotal_inactive_file {GIB}\ntotal_active_file {GIB}"
    tree.group("memory/docker/a", memory__limit_in_bytes=4 * GIB, memory__usage_in_bytes=3 * GIB, memory__stat=stat)
    tree.group("memory", memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=10 * GIB)
    found = read_host(tree.root)
    assert (found.cores, found.whole_cores) == (2.5, 3)
    assert (found.limit_bytes, found.available_bytes) == (4 * GIB, 3 * GIB), "page cache of 2 GiB can be dropped"


def test_a_container_sees_its_own_group_as_the_top(tmp_path: Path):
    """Docker mounts the container's group of version 1; /proc/self/cgroup still has the path on the host."""
    tree = Tree(tmp_path, V1_MOUNTS.format(root="/docker/a"), "5:memory:/docker/a\n3:cpu,cpuacct:/docker/a\n")
    tree.group("cpu,cpuacct", cpu__cfs_quota_us=100000, cpu__cfs_period_us=100000)
    tree.group("memory", memory__limit_in_bytes=GIB, memory__usage_in_bytes=0)
    assert [path.name for path in control_groups("cpu", tree.root)] == ["cpu,cpuacct"]
    assert read_host(tree.root).cores == 1
    assert read_host(tree.root).available_bytes == GIB


def test_memory_that_is_left_within_the_smallest_group(tmp_path: Path):
    """`memory.high` limits as `memory.max` does; usage without page cache is what is taken."""
    tree = Tree(tmp_path, V2_MOUNT, "0::/pod/box\n")
    tree.group("pod", memory__max=8 * GIB, memory__high="max", memory__current=7 * GIB, memory__stat="inactive_file 0")
    stat = f"active_file {GIB // 2}\ninactive_file {GIB // 2}\nanon 5"
    tree.group("pod/box", memory__max="max", memory__high=2 * GIB, memory__current=2 * GIB, memory__stat=stat)
    found = read_host(tree.root)
    assert (found.limit_bytes, found.available_bytes) == (2 * GIB, GIB)


def test_affinity_limits_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tree = Tree(tmp_path, V2_MOUNT, "0::/\n")
    tree.group("", cpu__max="400000 100000")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5, 6})
    assert read_host(tree.root).cores == 3
    assert "3 of 8 cores (affinity)" in str(read_host(tree.root))


def test_a_system_without_these_files_has_the_cores_of_its_affinity(tmp_path: Path):
    assert read_host(tmp_path).cores == 8
    assert pressure_mark(tmp_path).until(pressure_mark(tmp_path)).record()["throttled_s"] == 0


def test_paths_with_spaces_are_read(tmp_path: Path):
    tree = Tree(tmp_path, "40 20 0:50 / /mnt/a\\040b rw - fuse.sshfs host:/x\\040y rw", "0::/\n")
    assert [(mount.point, mount.source) for mount in mounts(tree.root)][-1] == ("/mnt/a b", "host:/x y")


@pytest.mark.parametrize("version", [1, 2])
def test_pressure_is_what_was_counted_between_two_marks(tmp_path: Path, version: int):
    if version == 2:
        tree = Tree(tmp_path, V2_MOUNT, "0::/a\n")
        stats = [f"nr_periods {n}0\nnr_throttled {n}\nthrottled_usec {n}00000" for n in (1, 3)]
        folder = "a"
    else:
        tree = Tree(tmp_path, V1_MOUNTS.format(root="/"), "3:cpu,cpuacct:/a\n")
        stats = [f"nr_periods {n}0\nnr_throttled {n}\nthrottled_time {n}00000000" for n in (1, 3)]
        folder = "cpu,cpuacct/a"
    marks = []
    for n, stat in enumerate(stats):
        tree.group(folder, cpu__stat=stat)
        for name, total in (("cpu", 10**6), ("io", 3 * 10**5)):
            tree.write(f"proc/pressure/{name}", f"some avg10=0.00 total={n * total}\nfull avg10=0.00 total=7\n")
        tree.write("proc/vmstat", f"pswpin {n * 256}\n")
        marks.append(pressure_mark(tree.root))
    found = marks[0].until(marks[1])
    assert (found.periods, found.throttled_periods, found.throttled_s) == (20, 2, pytest.approx(0.2))
    assert found.waiting_s == pytest.approx({"cpu": 1.0, "io": 0.3})
    assert found.swapped_in_bytes == 256 * os.sysconf("SC_PAGESIZE")
    twice = found + found
    assert (twice.throttled_s, twice.waiting_s["io"]) == (pytest.approx(0.4), pytest.approx(0.6))
    assert twice.throttled_share == found.throttled_share == 0.1
    assert "throttled in 10% of the quota's periods, 0.2 s" in str(found)


def test_every_part_asks_for_cores_here(monkeypatch: pytest.MonkeyPatch):
    """Loader threads and workers follow a quota of 1.5 cores."""
    monkeypatch.setattr(host, "read_host", lambda: SimpleNamespace(whole_cores=2))
    assert (default_threads(), cli.cores()) == (3, 2)


BUSY = """
import json, os, sys, time
from pathlib import Path
from pipeline.host import pressure_mark, read_host
from pipeline.loader.settings import default_threads
for group in sys.argv[1:]:
    Path(group).write_text(str(os.getpid()))
mark, end = pressure_mark(), time.perf_counter() + 0.5
while time.perf_counter() < end:
    pass
used = mark.until(pressure_mark())
print(json.dumps([read_host().record(), used.throttled_share, used.throttled_s, default_threads()]))
"""


def test_real_groups_limit_a_real_process():
    """A process that may use a tenth of a core and 2 GiB says so, and how often the quota stopped it."""
    try:
        with limited(0.1, 2 * GIB) as groups:
            command = [sys.executable, "-c", BUSY, *map(str, groups)]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except NoControlGroups as reason:
        pytest.skip(str(reason))
    record, throttled_share, throttled_s, threads = json.loads(printed)
    assert (record["cores"], record["limit_bytes"], threads) == (0.1, 2 * GIB, 2)
    assert 0 < record["available_bytes"] < 2 * GIB
    assert throttled_share > 0 and throttled_s > 0


def test_sums_of_pressure_start_from_nothing():
    assert Pressure() + Pressure() == Pressure()
    assert Pressure().waiting_shares == {} and str(Pressure()) == ""
