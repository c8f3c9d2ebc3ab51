"""Lists the members of a tar, or of a tar inside a tar, with their byte ranges. Nothing is unpacked."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO


def open_tar(path: Path) -> tarfile.TarFile:
    """Opens a tar, compressed or not.

    Raises:
        ValueError: The file is not a tar.
    """
    try:
        return tarfile.open(path)
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not a tar ({error}); download it again") from error


def read_members(path: Path, within: tuple[int, int] | None = None) -> Iterator[tuple[str, int, int]]:
    """Lists the regular files in an uncompressed tar.

    Args:
        path: The file on disk.
        within: (offset, size) of the tar to list, if it is itself a member of the tar at `path`.

    Yields:
        (name, offset, size) of each member in tar order; `offset` counts from the start of the file at `path`.

    Raises:
        ValueError: The tar is damaged or cut off.
    """
    with path.open("rb") as file:
        start, size = within or (0, path.stat().st_size)
        try:
            with tarfile.open(fileobj=_Window(file, start, size), mode="r:") as tar:  # type: ignore[call-overload]
                for member in tar:
                    if member.isreg():
                        yield member.name, start + member.offset_data, member.size
                    tar.members.clear()  # tarfile keeps every header that it has read: gigabytes for ImageNet
        except tarfile.TarError as error:
            raise ValueError(f"{path}: not a whole tar at byte {start} ({error}); download it again") from error


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
