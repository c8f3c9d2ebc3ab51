"""The page cache: which share of files is in memory, and dropping it."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from pipeline.profiling.page_cache import cached_share, drop_cache

PAGES = 64


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of PAGES pages, the last one not full, none of them in the page cache."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(PAGES * mmap.PAGESIZE - 100))
    assert cached_share([path]) == 1  # just written
    drop_cache([path])
    if cached_share([path]) == 1:
        pytest.skip("this file system keeps its cached pages")
    return path


def test_reading_caches_the_pages_that_were_read(file: Path):
    """No page after dropping; the page that was read; all pages after reading all. Asking changes nothing."""
    assert cached_share([file]) == cached_share([file]) == 0
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead
    os.pread(descriptor, 1, 5 * mmap.PAGESIZE)
    os.close(descriptor)
    assert cached_share([file]) == 1 / PAGES
    file.read_bytes()
    assert cached_share([file]) == 1
    drop_cache([file])
    assert cached_share([file]) == 0


def test_the_share_is_of_all_files_together(file: Path, tmp_path: Path):
    """Files count by their pages, and an empty file has none."""
    warm, empty = tmp_path / "warm", tmp_path / "empty"
    warm.write_bytes(bytes(3 * PAGES * mmap.PAGESIZE))
    empty.touch()
    assert cached_share([file, warm, empty]) == 0.75
    assert cached_share([empty]) == cached_share([]) == 1


def test_a_share_that_cannot_be_known_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A missing file, and a file of another user, which the kernel would report as cached."""
    with pytest.raises(FileNotFoundError):
        cached_share([tmp_path / "missing"])
    path = tmp_path / "file"
    path.write_bytes(b"of another user")
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    assert cached_share([path]) == 1  # asked by the owner
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(ValueError, match="only to the file's owner"):
        cached_share([path])
