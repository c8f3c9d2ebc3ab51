"""Writes files and folders atomically: a reader finds the complete new content, the old content, or nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY, REPLACED = ".tmp", ".old"  # endings of what a killed writer may leave behind


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, where the caller creates a file or a folder of files.

    When the block ends, everything is written to disk (fsync) and renamed to `path`, and the rename is written to disk,
    too. If the block or the rename raises, the temporary path is removed. Only one writer may use a path at a time.
    """
    temporary, replaced = (path.with_name(f".{path.name}{ending}") for ending in (TEMPORARY, REPLACED))
    _remove(temporary)
    try:
        yield temporary
        if temporary.is_dir():
            for entry in temporary.iterdir():
                _fsync(entry)
        _fsync(temporary)
        if path.is_dir():  # a rename replaces a file, but not a folder with files in it
            _remove(replaced)  # of a writer that was killed here
            path.rename(replaced)
        temporary.replace(path)
        _fsync(path.parent)
    except BaseException:
        _remove(temporary)
        raise
    _remove(replaced)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
