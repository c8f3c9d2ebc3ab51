"""Atomic file writing and file hashing.

A reader never sees half a file: `published` and `write_atomically` write under a temporary name and rename it once the
bytes are on disk. This is the only module of `pipeline` that writes files atomically.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import parent_process
from pathlib import Path
from typing import IO
from uuid import uuid4

TEMPORARY_NAME = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")  # .<final name>.<random hex>.tmp
# What network, FUSE and object-store file systems answer to an operation that they lack.
UNSUPPORTED = {getattr(errno, n) for n in ("ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EPERM", "EINVAL", "ENOLCK", "ENOTTY")}
_warned: set[str] = set()


@contextmanager
def published(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file for writing that appears at `path` only if the block ends without an error.

    The sequence is: write to a temporary name in the same folder, fsync, rename, fsync of the folder. The temporary
    name is random, so two processes that write the same path do not disturb each other: the last rename wins. After an
    error the temporary file is removed and an existing file at `path` keeps its content.

    Raises:
        OSError: The file cannot be written; the error names `path`.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):  # it may not exist, for example if the folder does not
            temporary.unlink()
        # A full disk names no file, and the temporary name means nothing to the user.
        if isinstance(error, OSError) and (error.filename is None or str(error.filename) == str(temporary)):
            raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error
        raise


@contextmanager
def doing(what: str, path: Path | str) -> Iterator[None]:
    """Makes an `OSError` of the block name its path and what was being done, such as `cannot list the folder`."""
    try:
        yield
    except OSError as error:
        if error.strerror is None or error.strerror.startswith("cannot "):
            raise
        name = path if error.filename is None else error.filename
        raise type(error)(error.errno, f"cannot {what}: {error.strerror}", os.fsdecode(name)) from error


def write_atomically(path: Path, data: str | bytes) -> None:
    """Writes `data` to `path`, text as UTF-8. After an error the file has the content that it had before.

    Raises:
        OSError: The file cannot be written; the error names `path`.
    """
    with published(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def remove_temporary(folder: Path) -> None:
    """Removes temporary files that killed writers left in `folder`. Call it only when no process writes there."""
    for path in folder.iterdir():
        if TEMPORARY_NAME.fullmatch(path.name):
            path.unlink(missing_ok=True)


def fsync_folder(folder: Path) -> None:
    """Flushes the folder's entries to disk. Without it a crash can undo a rename."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        warn_if_unsupported(error, folder, "flush folders", "a power failure may undo the newest files")


def warn_if_unsupported(error: OSError, path: Path, operation: str, consequence: str) -> None:
    """Warns, once per job and operation, that a file system lacks an operation. Raises every other error.

    Worker processes do not warn: the process that started them has met the same file system before.

    Args:
        error: What the operation raised.
        path: Where.
        operation: What the file system cannot do, such as "lock files".
        consequence: What is no longer guaranteed.
    """
    if error.errno not in UNSUPPORTED:
        raise OSError(error.errno, f"cannot {operation}: {error.strerror}", str(path)) from error
    if operation not in _warned and parent_process() is None:
        _warned.add(operation)
        print(
            f"warning: {path}: this file system cannot {operation} ({error.strerror}); {consequence}", file=sys.stderr
        )


def sha256_of(path: Path) -> str:
    """SHA-256 of the file's bytes, in hexadecimal."""
    with doing("read", path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
