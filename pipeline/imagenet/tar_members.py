"""Lists the members of a tar, or of a tar inside a tar, with their byte ranges. Nothing is unpacked.

A link to an earlier member has the byte range of that member. A member that is stored sparse (GNU tar --sparse) has no
single byte range, so it is refused by name.
"""

from __future__ import annotations

import posixpath
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from pipeline.files import doing
from pipeline.imagenet.entries import remedy

DAMAGED = (tarfile.TarError, EOFError, zlib.error, ValueError)


def open_tar(path: Path) -> tarfile.TarFile:
    """Opens a tar, compressed or not.

    Raises:
        ValueError: The file is not a tar.
    """
    try:
        return tarfile.open(path)
    except (*DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path}: not a whole tar; {remedy(path)}") from error


def read_members(path: Path, within: tuple[int, int] | None = None) -> Iterator[tuple[str, int, int]]:
    """Lists the files in an uncompressed tar, links to earlier members included.

    Args:
        path: The file on disk.
        within: (offset, size) of the tar to list, if it is itself a member of the tar at `path`.

    Yields:
        (name, offset, size) of each member in tar order; `offset` counts from the start of the file at `path`.

    Raises:
        ValueError: The tar is damaged, cut off or compressed, or a member cannot be read in place.
    """
    ranges: dict[str, tuple[int, int]] = {}  # of the members so far, for links to them
    with doing("read", path), path.open("rb") as file:
        start, size = within or (0, path.stat().st_size)
        try:
            with tarfile.open(fileobj=_Window(file, start, size), mode="r:") as tar:  # type: ignore[call-overload]
                for member in tar:
                    if member.isreg() or member.issym() or member.islnk():
                        found = _byte_range(path, member, ranges, start)
                        ranges[_normal(member.name)] = found
                        yield member.name, *found
                    tar.members.clear()  # tarfile keeps every header that it has read: gigabytes for ImageNet
                _check_end(path, tar, within, size)
        except tarfile.TarError as error:
            if within is None and (kind := _compression(path)):
                raise ValueError(f"{path}: compressed by {kind}; decompress it to a plain .tar first") from error
            raise ValueError(f"{path}: not a whole tar at byte {start} ({error}); {remedy(path)}") from error


def _check_end(path: Path, tar: tarfile.TarFile, within: tuple[int, int] | None, size: int) -> None:
    """Raises ValueError if a tar has no mark behind its last member: it may have been cut off there."""
    if tar.offset < size:
        return
    where = path if within is None else f"{path}: the tar at its byte {within[0]}"
    fix = "download it again" if within else f"download it again or, if it is whole, run: truncate -s +1024 {path.name}"
    raise ValueError(f"{where} has no end mark behind its last member, so it may be cut off; {fix}")


def _byte_range(
    path: Path, member: tarfile.TarInfo, ranges: Mapping[str, tuple[int, int]], start: int
) -> tuple[int, int]:
    """(offset, size) of a file or of what a link names."""
    if member.sparse is not None:
        raise ValueError(f"{path}: {member.name} is stored sparse; write the tar again without --sparse")
    if member.isreg():
        return start + member.offset_data, member.size
    target = member.linkname
    if member.issym():
        target = posixpath.join(posixpath.dirname(member.name), target)
    if (found := ranges.get(_normal(target))) is None:
        raise ValueError(
            f"{path}: {member.name} is a link to {member.linkname}, which is not before it in the tar;"
            " write the tar again with --dereference --hard-dereference"
        )
    return found


def _normal(name: str) -> str:
    return posixpath.normpath(name).lstrip("/")


def _compression(path: Path) -> str | None:
    """The name of the tool that compressed a file, by its first bytes; None if it is not compressed."""
    with path.open("rb") as file:
        head = file.read(6)
    kinds = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK": "zip"}
    return next((kind for magic, kind in kinds.items() if head.startswith(magic)), None)


class _Window:
    """A byte range of a file as a file object of its own; it has the methods that tarfile needs."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self.file, self.start, self.size, self.position = file, start, size, 0

    def seek(self, position: int) -> int:
        self.position = position
        return position

    def tell(self) -> int:
        return self.position

    def read(self, count: int) -> bytes:
        self.file.seek(self.start + self.position)
        data = self.file.read(max(0, min(count, self.size - self.position)))
        self.position += len(data)
        return data
