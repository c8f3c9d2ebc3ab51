"""Reads the bytes of listed images, whatever file holds them."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.files import doing
from pipeline.imagenet.listing import Item
from pipeline.imagenet.parquet import ParquetRows, is_parquet


class ItemReader:
    """Reads the bytes of items. Use it as a context manager.

    It keeps the last file open, because neighbouring items are usually in the same tar or parquet file.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: _ByteRanges | ParquetRows | None = None

    def read(self, item: Item) -> bytes:
        """The bytes of the item.

        Raises:
            ValueError: The file is gone, or its size has changed since it was listed.
        """
        try:
            with doing("read", item.file):
                data = self._read(item)
        except FileNotFoundError as error:
            raise ValueError(
                f"{item.file}: gone since it was listed (image {item.key}); run the same command again"
            ) from error
        if data is None:
            raise ValueError(f"{item.file}: changed since it was listed (image {item.key}); run the same command again")
        return data

    def _read(self, item: Item) -> bytes | None:
        """The bytes of the item; None if its file has changed."""
        if self._file is None or self._path != item.file:
            self._close()
            self._file = ParquetRows(item.file) if is_parquet(item.file.name) else _ByteRanges(item.file)
            self._path = item.file
        return self._file.read(item)

    def __enter__(self) -> ItemReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._path = self._file = None


class _ByteRanges:
    """Reads byte ranges of one file: a tar or an image file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)  # each item is one read, so a buffer would only copy

    def read(self, item: Item) -> bytes | None:
        """The bytes of the item; None if the file is too short, or is an image file of another size."""
        data = os.pread(self._file.fileno(), item.size, item.offset)
        is_image_file = item.offset == 0  # in a tar a header comes first
        changed = len(data) != item.size or (is_image_file and os.fstat(self._file.fileno()).st_size != item.size)
        return None if changed else data

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
