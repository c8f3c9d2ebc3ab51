"""The kernel is asked to read exactly the bytes of the images, several batches before they are decoded."""

import ctypes
import mmap
import os
import time
from itertools import islice

import numpy as np
import pytest

from pipeline.loader import inputs
from pipeline.loader.loader import TrainLoader
from tests.support.loader_fixtures import settings


def test_advice_reads_exactly_these_bytes(tmp_path):
    """The kernel reads the pages of the given parts of a mapped file, and no other page."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(64 * mmap.PAGESIZE))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    pages = np.frombuffer(mapped, np.uint8)
    resident = np.zeros(64, np.uint8)

    def in_memory() -> list[int]:
        mincore = ctypes.CDLL(None, use_errno=True).mincore
        address = ctypes.c_void_p(pages.ctypes.data)
        assert mincore(address, ctypes.c_size_t(len(pages)), ctypes.c_void_p(resident.ctypes.data)) == 0
        return np.flatnonzero(resident & 1).tolist()

    if in_memory():
        pytest.skip("this file system does not drop its cached pages")
    starts = np.array([mmap.PAGESIZE * 8 + 100, len(pages) - 5])
    inputs._advise_read(pages.ctypes.data + starts, np.array([mmap.PAGESIZE * 2, 5], np.int32))
    deadline = time.monotonic() + 10
    while len(in_memory()) < 4 and time.monotonic() < deadline:
        pass
    assert in_memory() == [8, 9, 10, 63]


def test_bytes_are_read_ahead(shards, basis, monkeypatch):
    """Once a batch is returned, a thread asks for the bytes of the next ones: `prefetched_batches` in all."""
    sizes_by_batch = []
    monkeypatch.setattr(inputs, "_advise_read", lambda addresses, sizes: sizes_by_batch.append(sizes))
    how = settings()
    with TrainLoader(shards, basis, how) as loader:
        next(loader)
        deadline = time.monotonic() + 10
        while len(sizes_by_batch) < how.prefetched_batches and time.monotonic() < deadline:
            pass
        prefetched = len(sizes_by_batch)
        batches = list(islice(loader, 3))
    assert prefetched == how.prefetched_batches
    for batch, sizes in zip(batches, sizes_by_batch[1:], strict=False):
        assert np.array_equal(sizes, shards.index["size"][batch.ids])
