"""A slow block device for tests: a file as a disk (loop device), whose reads a control group limits."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.host import mounts
from tests.support.control_groups import within

MIB = 2**20


class NoBlockDevice(Exception):
    """No slow block device can be made here; the text says why."""


@contextmanager
def slow_disk(source: Path, folder: Path, bytes_s: int) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """A disk with the files of `source`, none of them in memory.

    Args:
        source: its files are copied, one level.
        folder: for the file that holds the disk, and the mount point.
        bytes_s: bytes a second that processes of a control group may read from it.

    Yields:
        Where it is mounted, and the start of a command line that runs the rest of it under that limit.

    Raises:
        NoBlockDevice: the machine does not allow it.
    """
    if os.geteuid() or not Path("/dev/loop-control").exists():
        raise NoBlockDevice("a loop device requires /dev/loop-control and root")
    folder.mkdir(parents=True, exist_ok=True)
    image, mount = folder / "disk.img", folder / "mount"
    mount.mkdir(exist_ok=True)
    with image.open("wb") as file:
        file.truncate(sum(path.stat().st_size for path in source.iterdir()) * 5 // 4 + 64 * MIB)
    try:
        _run("mkfs.ext4", "-q", "-F", str(image))
        _run("mount", "-o", "loop", str(image), str(mount))
    except (OSError, subprocess.CalledProcessError) as error:
        image.unlink()
        raise NoBlockDevice(f"{error}; a loop device could not be mounted") from error
    group = None
    try:
        for path in source.iterdir():
            shutil.copy2(path, mount / path.name)
        os.sync()
        for path in (image, *mount.iterdir()):
            if path.is_file():
                _drop(path)
        group = _group(mount, bytes_s)
        yield mount, tuple(within([group / "cgroup.procs"]))
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=False)
        if group is not None:
            time.sleep(0.2)
            group.rmdir()
        image.unlink(missing_ok=True)


def _group(mount: Path, bytes_s: int) -> Path:
    """A control group of either version that may read so many bytes a second from what is mounted there."""
    device = os.stat(mount).st_dev
    numbers = f"{os.major(device)}:{os.minor(device)}"
    for top in [
        Path(m.point) for m in mounts() if m.kind == "cgroup2" or (m.kind == "cgroup" and "blkio" in m.options)
    ]:
        group = top / f"stall-test-io-{os.getpid()}-{time.monotonic_ns()}"
        try:
            group.mkdir()
            for name, limit in (
                ("io.max", f"{numbers} rbps={bytes_s}"),
                ("blkio.throttle.read_bps_device", f"{numbers} {bytes_s}"),
            ):
                if (group / name).exists():
                    (group / name).write_text(limit)
                    return group
            group.rmdir()
        except OSError as error:
            raise NoBlockDevice(f"{error}; limiting reads requires root and the controller io or blkio") from error
    raise NoBlockDevice("no mounted control group limits reads here")


def _drop(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
