"""What of a set's files is in the page cache, so that a figure can be called cold or warm. Linux only.

An epoch that reads from memory says nothing of the disk: look at `cached_share` before and after a measurement, and
`drop_cache` before one that is to be cold.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

_mincore = ctypes.CDLL(None, use_errno=True).mincore
_mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


def cached_share(paths: Iterable[Path]) -> float:
    """Share, 0 to 1, of the files' pages that are in memory; 1 where there are none.

    Raises OSError where a file cannot be read, and ValueError where it is neither the caller's nor writable: the kernel
    then calls every page cached, so that nobody learns what others read.
    """
    pages = cached = 0
    for path in paths:
        if path.stat().st_uid != os.geteuid() and not os.access(path, os.W_OK, effective_ids=True):
            raise ValueError(f"{path}: only its owner, or who may write it, can see what of it is cached; run as such")
        resident = _resident(path)
        pages, cached = pages + len(resident), cached + int(resident.sum())
    return cached / pages if pages else 1.0


def _resident(path: Path) -> np.ndarray:
    """Whether each page of the file is in memory: uint8 (pages,) of 0 and 1. Reads nothing of it."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            return np.zeros(0, np.uint8)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            view = np.frombuffer(mapped, np.uint8)
            resident = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
            failed = _mincore(view.ctypes.data, size, resident.ctypes.data)
            del view  # or the mapping cannot be closed
        if failed:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    return resident & 1  # the other bits are reserved


def drop_cache(paths: Iterable[Path]) -> None:
    """Asks the kernel to forget the files' pages. It keeps those that some process has mapped and touched, so do it
    before a feed runs; and on some file systems (tmpfs) all. `cached_share` tells.

    Raises OSError where a file cannot be read.
    """
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # what is not on the disk yet cannot be forgotten
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
