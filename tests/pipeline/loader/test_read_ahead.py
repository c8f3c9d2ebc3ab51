"""The kernel is asked to read exactly the bytes of the images, several batches before they are decoded."""

import mmap
import os
import time
from itertools import islice

import numpy as np
import pytest

from pipeline.loader.loader import TrainLoader
from pipeline.profiling.page_cache import resident_pages
from pipeline.shards.reader import ShardSet
from pipeline.shards.tar_files import TarFiles
from tests.support.loader_fixtures import settings


def test_advice_reads_exactly_these_bytes(tmp_path):
    """The kernel reads the pages of the given parts of a file, and no other page."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(64 * mmap.PAGESIZE))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident_pages(path).any():
        pytest.skip("this file system does not drop its cached pages")
    size = path.stat().st_size
    TarFiles([path], [size]).advise([0, 0], [mmap.PAGESIZE * 8 + 100, size - 5], [mmap.PAGESIZE * 2, 5])
    deadline = time.monotonic() + 10
    while resident_pages(path).sum() < 4 and time.monotonic() < deadline:
        pass
    assert np.flatnonzero(resident_pages(path)).tolist() == [8, 9, 10, 63]


def test_bytes_are_read_ahead(shards, basis, monkeypatch):
    """Once a batch is returned, a thread asks for the bytes of the next ones: `prefetched_batches` in all."""
    asked = []
    monkeypatch.setattr(ShardSet, "read_ahead", lambda self, ids: asked.append(ids))
    how = settings()
    with TrainLoader(shards, basis, how) as loader:
        next(loader)
        deadline = time.monotonic() + 10
        while len(asked) < how.prefetched_batches and time.monotonic() < deadline:
            pass
        prefetched = len(asked)
        batches = list(islice(loader, 3))
    assert prefetched == how.prefetched_batches
    for batch, ids in zip(batches, asked[1:], strict=False):
        assert np.array_equal(ids, batch.ids)
