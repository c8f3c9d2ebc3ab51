"""A lock on a run folder, so that two trainings never write to it at once."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

REFRESH_S = 30.0  # between two signs of life of the holder
STALE_S = 300.0  # without a sign of life after which a holder on another machine counts as dead
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # the same in all containers of a machine


class RunLock:
    """A lock file with the holder's host, process id and start time. Use it as a context manager.

    Processes of one machine exclude each other by `flock`, which the kernel releases when a process dies, however it
    dies. File systems that machines share do not always pass `flock` on. So a holder on another machine counts as alive
    as long as it refreshes the file's time.

    Args:
        path: the lock file.

    Raises:
        ValueError: on entering, if another process holds the lock. The message names its process and host.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1
        self._ended = threading.Event()

    def __enter__(self) -> RunLock:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = self._open()
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(this_process()).encode(), 0)
        except OSError as error:  # a full disk; the call does not know the file's name
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        threading.Thread(target=self._refresh, name="run lock", daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._path.unlink(missing_ok=True)  # before the lock is released: `_open` notices it
        os.close(self._descriptor)

    def _open(self) -> int:
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                alive = self._alive_elsewhere(descriptor)
            except BlockingIOError:
                alive = True
            except OSError:  # a file system without locks
                alive = self._alive_elsewhere(descriptor)
            if alive:
                holder = _holder(descriptor)
                os.close(descriptor)
                raise ValueError(self._refusal(holder))
            try:
                if os.fstat(descriptor).st_ino == self._path.stat().st_ino:
                    return descriptor
            except FileNotFoundError:
                pass
            os.close(descriptor)  # the holder removed the file between the two calls above

    def _alive_elsewhere(self, descriptor: int) -> bool:
        """Whether a process of another machine, which `flock` may not see, holds the lock."""
        holder, own = _holder(descriptor), this_process()
        if not holder or holder.get("boot") == own["boot"] or holder.get("host") == own["host"]:
            return False
        refreshed_s = os.fstat(descriptor).st_mtime
        clock = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        clock.touch()  # its time is from the file server's clock, like that of the lock
        age_s = clock.stat().st_mtime - refreshed_s
        clock.unlink()
        return age_s < STALE_S

    def _refusal(self, holder: dict[str, Any]) -> str:
        where = f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown host')}"
        since = f", started {holder['started']}" if "started" in holder else ""
        return (
            f"{self._path.parent}: {where} is training in this run folder{since}; "
            "wait for it, stop it, or choose another --run-name NAME"
        )

    def _refresh(self) -> None:
        while not self._ended.wait(REFRESH_S):
            try:
                os.utime(self._path)
            except OSError:
                return


def this_process() -> dict[str, Any]:
    """Host, boot, process id and start time of this process."""
    return {
        "host": platform.node(),
        "boot": BOOT_ID.read_text().strip() if BOOT_ID.is_file() else "",
        "pid": os.getpid(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(_started_s())),
    }


def _started_s() -> float:
    """When this process started, in seconds since 1970."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.time()


def _holder(descriptor: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
