"""TODO-DOC pipeline.files (from pipeline.shards)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO
from uuid import uuid4

TEMPORARY = ".tmp"


@contextmanager
def published(path: Path) -> Iterator[IO[bytes]]:
    """A file for writing that appears under `path` only when the block ends well: temporary name, fsync, rename, fsync
    of the folder. The temporary name is nobody else's, so two who write the same file do not meet. OSErrors name it."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):  # as where the folder itself is gone
            temporary.unlink()
        if isinstance(error, OSError) and error.filename is None:  # a full disk names no file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def remove_temporary(folder: Path) -> None:
    """Removes what killed writers left; nobody may be writing there."""
    for path in folder.glob(f".*{TEMPORARY}"):
        path.unlink(missing_ok=True)


def fsync_folder(folder: Path) -> None:
    """Has the disk keep the names in `folder`."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
