"""Reads parts of a shard set's tars by byte offset, as copies in memory of this process.

The tars are not memory-mapped. The kernel ends a process with SIGBUS when it touches a mapped page of a file that was
truncated meanwhile, or that the disk cannot read. A read returns fewer bytes or an error instead, which names the tar.
Bytes that were checked also cannot change before they are decoded.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from pipeline.shards.format import repair_hint

SPARE_FILES = 512  # open files that the rest of the process may need


class TarFiles:
    """The tars of a shard set, opened on first use and closed with this object. Threads may share it.

    A tar that is replaced or removed while it is open keeps its content for this process.

    Args:
        tars: the tars in shard order.
        sizes: the bytes of each, as the manifest states.
    """

    def __init__(self, tars: Sequence[Path], sizes: Sequence[int]) -> None:
        self._tars, self._sizes = tars, sizes
        self._open: dict[int, _OpenTar] = {}  # by shard
        self._most_open = _allowed_open_files(len(tars))

    def read(self, shards: Sequence[int], starts: Sequence[int], lengths: Sequence[int]) -> list[np.ndarray]:
        """Reads N parts.

        Args:
            shards: the shard of each part.
            starts: the offset of its first byte.
            lengths: in bytes.

        Returns:
            For each part a read-only uint8 vector.

        Raises:
            ValueError: a tar is missing, ends before a part, or cannot be read.
        """
        ends = list(accumulate(lengths))
        memory = np.empty(ends[-1] if ends else 0, np.uint8)
        parts, writable = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)], memory.data
        for shard, start, part in zip(shards, starts, parts, strict=True):
            self._read_into(writable[part], shard, start)
        memory.flags.writeable = False
        return [memory[part] for part in parts]

    def advise(self, shards: Sequence[int], starts: Sequence[int], lengths: Sequence[int]) -> None:
        """Asks the kernel to read exactly these parts into its page cache in the background.

        Without this advice a read waits for the disk, and the kernel reads its whole read-ahead window around each
        part, which was measured to be 23 times as many bytes. A failure is left to `read`: it only costs time.
        """
        if not hasattr(os, "posix_fadvise"):  # macOS
            return
        for shard, start, length in zip(shards, starts, lengths, strict=True):
            try:
                os.posix_fadvise(self._opened(shard).descriptor, start, length, os.POSIX_FADV_WILLNEED)
            except (OSError, ValueError):
                return

    def _read_into(self, part: memoryview, shard: int, start: int) -> None:
        try:
            tar, end = self._opened(shard), start + len(part)
            while start < end:
                count = os.preadv(tar.descriptor, [part], start)
                if not count:
                    raise ValueError(self._other_size(shard, tar.size()))
                start, part = start + count, part[count:]
        except OSError as error:
            raise ValueError(f"{self._tars[shard]}: cannot be read ({error.strerror})") from error

    def _opened(self, shard: int) -> _OpenTar:
        if (found := self._open.get(shard)) is not None:
            return found
        tar = _OpenTar(self._tars[shard])
        if (size := tar.size()) != self._sizes[shard]:
            raise ValueError(self._other_size(shard, size))
        excess = max(0, len(self._open) + 1 - self._most_open)
        for earliest in tuple(self._open)[:excess]:
            self._open.pop(earliest, None)  # closed once no thread reads from it
        self._open[shard] = tar
        return tar

    def _other_size(self, shard: int, size: int) -> str:
        path = self._tars[shard]
        found = f"{size:,} bytes, expected {self._sizes[shard]:,}; it was changed while it was in use"
        return f"{path}: {found}; {repair_hint(path.parent)}"


class _OpenTar:
    """An open file that is closed with its last reference."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def size(self) -> int:
        """Its bytes now."""
        return os.fstat(self.descriptor).st_size

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def _allowed_open_files(wanted: int) -> int:
    """How many tars may be open at once. Raises this process's soft limit of open files towards the hard one for it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + SPARE_FILES
    if resource.RLIM_INFINITY not in (soft, hard) and soft < needed:
        soft = min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY or soft >= needed else max(1, soft // 4)
