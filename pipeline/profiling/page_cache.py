"""Which share of a set's files is in the page cache, so that a figure can be called cold or warm. Linux only.

An epoch that reads from memory says nothing about the disk. Call `cached_share` before and after a measurement, and
`drop_cache` before a measurement that must be cold.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_mincore = ctypes.CDLL(None, use_errno=True).mincore
_mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


def cached_share(paths: Iterable[Path]) -> float:
    """Share, 0 to 1, of the files' pages that are in memory; 1 if the files have no pages.

    Raises:
        OSError: a file cannot be read.
        ValueError: the caller neither owns nor may write a file. The kernel then reports every page as cached, so that
            a user cannot find out what other users read.
    """
    pages = cached = 0
    for path in paths:
        resident = resident_pages(path)
        pages, cached = pages + len(resident), cached + int(resident.sum())
    return cached / pages if pages else 1.0


def cached_share_of_parts(path: Path, offsets: NDArray[np.int64], sizes: NDArray[np.int64]) -> tuple[int, int]:
    """Pages of these parts of a file: how many are in memory, and how many there are. A page of two parts counts twice.

    Args:
        path: the file, which the caller owns or may write.
        offsets: (N,) first byte of each part.
        sizes: (N,) bytes of each part, at least 1.
    """
    cached_before = np.concatenate([[0], np.cumsum(resident_pages(path), dtype=np.int64)])
    first, end = offsets // mmap.PAGESIZE, (offsets + sizes - 1) // mmap.PAGESIZE + 1
    return int((cached_before[end] - cached_before[first]).sum()), int((end - first).sum())


def resident_pages(path: Path) -> NDArray[np.uint8]:
    """Whether each page of the file is in memory: (pages,) of 0 and 1. It reads nothing of the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: see `cached_share`.
    """
    if path.stat().st_uid != os.geteuid() and not os.access(path, os.W_OK, effective_ids=True):
        raise ValueError(
            f"{path}: the kernel shows what is cached only to the file's owner or a user who may write it;"
            " run as one of them"
        )
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            return np.zeros(0, np.uint8)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            view = np.frombuffer(mapped, np.uint8)
            resident = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
            failed = _mincore(view.ctypes.data, size, resident.ctypes.data)
            del view  # a mapping that an array refers to cannot be closed
        if failed:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    resident &= 1  # mincore reserves the other bits
    return resident


def drop_cache(paths: Iterable[Path]) -> None:
    """Drops the files' pages from the page cache.

    The kernel keeps pages that some process has mapped and read, so call this before a loader runs. Some file systems
    (tmpfs) keep all pages. Check with `cached_share`.

    Raises:
        OSError: a file cannot be read.
    """
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # pages that are not on the disk yet cannot be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
