"""Where ImageNet lives: the layouts it comes in, as one list of items in a fixed order, nothing unpacked.

    ilsvrc      ILSVRC2012_img_train.tar (a tar of one tar per class), ILSVRC2012_img_val.tar (flat) and
                ILSVRC2012_devkit_t12.tar.gz in one folder, as image-net.org serves them
    kaggle      ILSVRC/Data/CLS-LOC/train/<wnid>/*.JPEG, .../val/*.JPEG and LOC_val_solution.csv
    parquet     train-00000-of-00294.parquet ... and validation-*.parquet, as Hugging Face serves them
    webdataset  tars of samples (KEY.jpg, KEY.cls), such as those that make_shards writes
    folders     train/<wnid>/*.JPEG and val/<wnid>/*.JPEG

`open_source` finds the layout; `Source.listing(split)` gives the items. An item says where its bytes are, `ItemReader`
reads them. The same files always give the same listing, and classes are in the order of their wnids in all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from pipeline.imagenet.folders import ClassFolders
from pipeline.imagenet.ilsvrc import DEVKIT, TRAIN_TAR, VAL_TAR, IlsvrcTars
from pipeline.imagenet.kaggle import KaggleFolders
from pipeline.imagenet.listing import SPLITS, Item, Items, Listing
from pipeline.imagenet.parquet import HuggingFaceParquet, ParquetRows
from pipeline.imagenet.webdataset import WebDatasetTars

__all__ = [
    "DEVKIT",
    "LAYOUTS",
    "SPLITS",
    "TRAIN_TAR",
    "VAL_TAR",
    "Item",
    "ItemReader",
    "Items",
    "Listing",
    "Source",
    "open_source",
]


class Source(Protocol):
    """A place that holds ImageNet in some layout, or does not (then it has no splits)."""

    @property
    def layout(self) -> str:
        """Its name, for the manifest and the log."""
        ...

    @property
    def expected(self) -> str:
        """What the layout looks like, in a few words, for messages."""
        ...

    def splits(self) -> list[str]:
        """The splits that are there, of SPLITS."""
        ...

    def listing(self, split: str) -> Listing:
        """Reads the split's listing; ValueError where its files are not what the layout says."""
        ...


AGAIN = "run the same command again"
# In the order of recognition: those with names of their own first, folders of anything last.
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
    """The source under `root` in the layout named, or recognised; ValueError with what was expected if not there."""
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
    """Reads items' bytes, as a context; keeps the last file open, since neighbours share a tar or a parquet file."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: _Bytes | ParquetRows | None = None

    def read(self, item: Item) -> bytes:
        """The item's bytes; ValueError where the file is gone or not as long as it was when listed."""
        try:
            if self._file is None or self._path != item.file:
                self._close()
                self._file = ParquetRows(item.file) if item.file.suffix == ".parquet" else _Bytes(item.file)
                self._path = item.file
            data = self._file.read(item)
        except FileNotFoundError as error:
            raise ValueError(f"{item.file}: gone since it was listed (image {item.key}); {AGAIN}") from error
        if data is None:
            raise ValueError(f"{item.file}: changed since it was listed (image {item.key}); {AGAIN}")
        return data

    def __enter__(self) -> ItemReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._path = self._file = None


class _Bytes:
    """Reads stretches of one file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)

    def read(self, item: Item) -> bytes | None:
        """The item's bytes; None where the file is shorter, or is the picture itself and longer."""
        data = os.pread(self._file.fileno(), item.size, item.offset)
        changed = len(data) != item.size or (item.offset == 0 and os.fstat(self._file.fileno()).st_size != item.size)
        return None if changed else data

    def close(self) -> None:
        """Lets the file go."""
        self._file.close()
