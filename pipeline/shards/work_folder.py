"""The folder of an unfinished shard set: its locks, and what differs between two records of what a set is made from.

One run without parts locks the folder alone. Parts share it, and the part that finds all shards complete publishes the
set alone. Some file systems have no locks, and some (NFS or Lustre with local locks) keep them within one machine. So
the part that publishes also creates a file, which every file system lets only one process create.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.files import doing, warn_if_unsupported

LOCK = "lock"
CLAIM = "publishing"  # created by the part that publishes, with its machine
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # the same in all containers of a machine


@contextmanager
def locked(work: Path) -> Iterator[None]:
    """Makes the work folder and locks it, so that no other run or part writes there at the same time."""
    with _open_lock(work) as lock:
        if _taken(lock, fcntl.LOCK_EX, work, "do not start two runs on this folder at once") is False:
            raise ValueError(f"{work}: another run is writing here; wait for it or choose another folder")
        yield


@contextmanager
def shared(work: Path) -> Iterator[bool]:
    """Makes the work folder and shares it with other parts. Yields False if a process has locked it alone."""
    with _open_lock(work) as lock:
        yield _taken(lock, fcntl.LOCK_SH, work, "while parts run, start no run without --part") is not False


@contextmanager
def publishing(work: Path) -> Iterator[bool]:
    """Yields whether this process may publish the set: no part is writing, and no other process publishes it.

    If the block fails, another process may publish next. A claim that a killed process left counts as abandoned only if
    the lock shows it: the killed process was on this machine, and the file system has locks. Otherwise a run without
    parts removes it.
    """
    if not work.is_dir():  # published meanwhile
        yield False
        return
    with _open_lock(work) as lock:
        alone = _taken(lock, fcntl.LOCK_EX, work, "while parts run, start no run without --part")
        if alone is False or not _claimed(work / CLAIM, take_over=alone is True):
            yield False
            return
        try:
            yield True
        finally:
            (work / CLAIM).unlink(missing_ok=True)  # the folder has its final name if the block ended well


@contextmanager
def _open_lock(work: Path) -> Iterator[int]:
    with doing("make the folder", work):
        work.mkdir(parents=True, exist_ok=True)
    with doing("write", work / LOCK):  # NFS requires a file that is open for both to lock it either way
        lock = os.open(work / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield lock
    finally:
        os.close(lock)


def _taken(lock: int, kind: int, work: Path, consequence: str) -> bool | None:
    """Whether the lock was taken; None, with a warning, if the file system has no locks."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        warn_if_unsupported(error, work, "lock files", consequence)
        return None
    return True


def _claimed(path: Path, take_over: bool) -> bool:
    """Creates the claim. With `take_over`, one that a process of this machine left is this process's."""
    boot = BOOT_ID.read_text().strip() if BOOT_ID.is_file() else ""
    try:
        with path.open("x") as file:
            json.dump({"host": platform.node(), "boot": boot}, file)
    except FileExistsError:
        return take_over and bool(boot) and read_record(path).get("boot") == boot
    except FileNotFoundError:  # published meanwhile
        return False
    return True


def read_record(path: Path) -> dict[str, Any]:
    """The JSON object in a file of the work folder; empty if it is damaged."""
    with doing("read", path):
        data = path.read_bytes()
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def difference_of(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """The entries that differ, as `quality 90, now 85`; empty if all are equal."""
    if not isinstance(found, dict) or found.keys() != expected.keys():
        return "its record is damaged"
    parts = []
    for key, value in expected.items():
        if isinstance(value, dict):
            parts.append(difference_of(found[key], value))
        elif found[key] != value:
            parts.append(f"{key} {found[key]}, now {value}")
    return ", ".join(filter(None, parts))
