"""Real control groups (cgroups) for tests: a process that may use so much CPU time and memory, of either version."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.host import control_groups

PERIOD_US = 100_000


class NoControlGroups(Exception):
    """This process may not make control groups; the text says why."""


@contextmanager
def limited(cores: float | None = None, memory_bytes: int | None = None) -> Iterator[list[Path]]:
    """Makes groups with these limits; yields the files into which a process writes its id to join them.

    Raises:
        NoControlGroups: the machine does not allow it.
    """
    limits = dict[str, dict[str, str]]()
    if cores is not None:
        quota = str(round(cores * PERIOD_US))
        limits["cpu"] = {"cpu.max": f"{quota} {PERIOD_US}", "cpu.cfs_quota_us": quota}
    if memory_bytes is not None:
        limits["memory"] = {"memory.max": str(memory_bytes), "memory.limit_in_bytes": str(memory_bytes)}
    made = list[Path]()
    try:
        for controller, files in limits.items():
            made.append(_group(controller, files))
        yield [group / "cgroup.procs" for group in made]
    finally:
        for group in made:
            _remove(group)


def within(groups: list[Path]) -> list[str]:
    """The start of a command line that runs the rest of it in these groups."""
    return ["sh", "-c", f'{" && ".join(f"echo $$ > {group}" for group in groups)} && exec "$0" "$@"']


def _group(controller: str, files: dict[str, str]) -> Path:
    """A new group at the top, with the first of `files` that its version has."""
    for top in control_groups(controller):
        if top.parent in control_groups(controller):
            continue
        group = top / f"stall-test-{os.getpid()}-{time.monotonic_ns()}"
        try:
            group.mkdir()
            if names := [name for name in files if (group / name).exists()]:
                (group / names[0]).write_text(files[names[0]])
                return group
            group.rmdir()
        except OSError as error:
            raise NoControlGroups(f"{error}; making control groups requires root") from error
    raise NoControlGroups(f"no mounted control group limits {controller} here")


def _remove(group: Path) -> None:
    """Ends what still runs in the group, and removes it."""
    for _ in range(100):
        for pid in (group / "cgroup.procs").read_text().split():
            subprocess.run(["kill", "-9", pid], check=False)
        try:
            group.rmdir()
            return
        except OSError:  # its processes have not ended yet
            time.sleep(0.05)
