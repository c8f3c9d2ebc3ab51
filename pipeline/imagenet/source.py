"""Opens ImageNet in any of the layouts in which it is distributed, without unpacking it.

    ilsvrc      ILSVRC2012_img_train.tar (a tar of one tar per class), ILSVRC2012_img_val.tar (flat) and
                ILSVRC2012_devkit_t12.tar.gz in one folder, as image-net.org distributes them
    kaggle      ILSVRC/Data/CLS-LOC/train/<wnid>/*.JPEG, .../val/*.JPEG and LOC_val_solution.csv
    parquet     train-00000-of-00294.parquet ... and validation-*.parquet, as Hugging Face distributes them
    webdataset  tars of samples (KEY.jpg, KEY.cls), such as those that make_shards writes
    folders     train/<wnid>/*.JPEG and val/<wnid>/*.JPEG

`open_source` detects the layout, `Source.listing(split)` lists the images of a split as items, and `ItemReader` reads
the bytes of an item. The same files always give the same listing. In every layout classes are sorted by wnid (WordNet
id).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from pipeline.imagenet.folders import ClassFolders
from pipeline.imagenet.ilsvrc import IlsvrcTars
from pipeline.imagenet.kaggle import KaggleFolders
from pipeline.imagenet.listing import Item, Listing
from pipeline.imagenet.parquet import HuggingFaceParquet, ParquetRows
from pipeline.imagenet.webdataset import WebDatasetTars


class Source(Protocol):
    """A folder read as one layout. If the folder does not hold that layout, there are no splits."""

    @property
    def layout(self) -> str:
        """Name of the layout, for the manifest and the log."""
        ...

    @property
    def expected(self) -> str:
        """What files the layout has, in a few words, for messages."""
        ...

    def splits(self) -> list[str]:
        """The splits of `listing.SPLITS` that the folder holds."""
        ...

    def listing(self, split: str) -> Listing:
        """Lists the images of a split.

        Raises:
            ValueError: A file is missing, damaged or does not fit the others; the message names it.
        """
        ...


# In the order of detection: layouts with distinctive file names first, folders with any names last.
LAYOUTS: Mapping[str, Callable[[Path], Source]] = MappingProxyType(
    {
        "ilsvrc": IlsvrcTars,
        "kaggle": KaggleFolders,
        "parquet": HuggingFaceParquet,
        "webdataset": WebDatasetTars,
        "folders": ClassFolders,
    }
)


def open_source(root: Path, layout: str | None = None) -> Source:
    """Opens the folder `root` as a source.

    Args:
        root: The folder that holds ImageNet.
        layout: A key of `LAYOUTS`; None detects it.

    Raises:
        ValueError: There is no such folder or layout; the message says which files were expected.
    """
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r}, expected one of {', '.join(LAYOUTS)}")
    sources = [make(root) for name, make in LAYOUTS.items() if layout in (None, name)]
    expected = "; or ".join(source.expected for source in sources)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; expected one with {expected}")
    for source in sources:
        if source.splits():
            return source
    found = ", ".join(sorted(path.name for path in root.iterdir())[:5]) or "nothing"
    what = f"layout {layout} is not here" if layout else "no ImageNet layout here"
    raise ValueError(f"{root}: {what} (found {found}); expected {expected}")


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
            if self._file is None or self._path != item.file:
                self._close()
                self._file = ParquetRows(item.file) if item.file.suffix == ".parquet" else _ByteRanges(item.file)
                self._path = item.file
            data = self._file.read(item)
        except FileNotFoundError as error:
            raise ValueError(
                f"{item.file}: gone since it was listed (image {item.key}); run the same command again"
            ) from error
        if data is None:
            raise ValueError(f"{item.file}: changed since it was listed (image {item.key}); run the same command again")
        return data

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
