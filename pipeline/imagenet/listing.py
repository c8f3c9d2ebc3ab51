"""One split of a source as columns: which images it has, their classes, and at which bytes of which file they are.

In: `Item`s, one at a time. Out: `Items`, which stores them by column, and `Listing`, which adds the class names and a
fingerprint. The columns take about 70 bytes an image: 90 MB for ImageNet's 1,281,167 training images, against 600 MB
for Python objects. A job receives only its own rows, by `Items.take`.
"""

from __future__ import annotations

import hashlib
import operator
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.imagenet.entries import SkippedFiles

SPLITS = ("train", "val")
KEY_LIMIT = 90  # characters of a key; with its suffix it must fit the 100 bytes of a USTAR member name
ITEMS_PER_CHUNK = 1 << 14  # how many items exist as Python objects at a time


@dataclass(frozen=True)
class ClassName:
    """The name of a class.

    Attributes:
        wnid: WordNet id such as `n01440764`; a folder name or label if the source has no WordNet ids.
        words: What people call it, such as `tench, Tinca tinca`.
    """

    wnid: str
    words: str


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a source.

    Attributes:
        key: Its unique name without folder and suffix.
        label: Position of its class in `Listing.classes`.
        file: The file that holds it: an image file, a tar or a parquet file.
        offset: First byte of the image in `file`; in a parquet file, the row number.
        size: Bytes of the image; in a parquet file, the size of the whole file.
    """

    key: str
    label: int
    file: Path
    offset: int
    size: int


@dataclass(frozen=True, slots=True, eq=False)
class Items:
    """A read-only sequence of `Item`s, stored by column. `Items.of` makes it; an integer index gives an `Item`.

    Attributes:
        parents: The folders of the files, each once.
        parent: (n,) Position of the file's folder in `parents`.
        name: (n,) File name, encoded as the file system has it.
        key: (n,) As in `Item`, as ASCII bytes.
        label: (n,) As in `Item`.
        offset: (n,) As in `Item`.
        size: (n,) As in `Item`.
    """

    parents: tuple[str, ...]
    parent: NDArray[np.int32]
    name: NDArray[np.bytes_]
    key: NDArray[np.bytes_]
    label: NDArray[np.int32]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]

    def __post_init__(self) -> None:
        for column in self._columns():
            column.flags.writeable = False

    @classmethod
    def of(cls, items: Iterable[Item]) -> Items:
        """Stores `items` by column. From a generator, only `ITEMS_PER_CHUNK` exist as objects at a time."""
        parents: dict[str, int] = {}
        columns: list[list[np.ndarray]] = [[np.empty(0, dtype)] for dtype in ("<i4", "S1", "S1", "<i4", "<i8", "<i8")]
        rows = (_row(item, parents) for item in items)
        while chunk := list(islice(rows, ITEMS_PER_CHUNK)):
            for column, values in zip(columns, zip(*chunk, strict=True), strict=True):
                column.append(np.array(values, column[0].dtype.char))  # "S" takes the width of the longest
        for number, column in enumerate(columns):
            columns[number] = [np.concatenate(column)]  # frees this column's chunks before the next column is joined
        return cls(tuple(parents), *(column for (column,) in columns))

    def take(self, rows: NDArray[np.integer[Any]]) -> Items:
        """The items at `rows` (m,), in that order. Only the folders that these items need are kept."""
        used, parent = np.unique(self.parent[rows], return_inverse=True)
        parents = tuple(self.parents[i] for i in used)
        return Items(parents, parent.astype(np.int32), *(column[rows] for column in self._columns()[1:]))

    def relabelled(self, label_of: NDArray[np.int32]) -> Items:
        """The same items with label `label_of[i]` in place of label i."""
        return replace(self, label=label_of[self.label])

    def __len__(self) -> int:
        return len(self.key)

    def __getitem__(self, index: int) -> Item:
        index = operator.index(index)  # a slice raises TypeError: use `take`
        return self._item(*(column[index].item() for column in self._columns()))

    def __iter__(self) -> Iterator[Item]:
        for start in range(0, len(self), ITEMS_PER_CHUNK):
            chunk = (column[start : start + ITEMS_PER_CHUNK].tolist() for column in self._columns())
            yield from (self._item(*row) for row in zip(*chunk, strict=True))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Items) or len(self) != len(other):
            return False
        # The same folders may be numbered differently, so translate this object's numbers to the other's.
        position = {parent: i for i, parent in enumerate(other.parents)}
        parent = np.array([position.get(parent, -1) for parent in self.parents], np.int32)[self.parent]
        mine, theirs = (parent, *self._columns()[1:]), other._columns()
        return all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))

    def __reduce__(self) -> tuple[Any, ...]:
        return Items, (self.parents, *self._columns())  # by way of the constructor, so that columns stay read-only

    def _columns(self) -> tuple[NDArray[Any], ...]:
        return self.parent, self.name, self.key, self.label, self.offset, self.size

    def _item(self, parent: int, name: bytes, key: bytes, label: int, offset: int, size: int) -> Item:
        return Item(key.decode(), label, Path(self.parents[parent], os.fsdecode(name)), offset, size)


def _row(item: Item, parents: dict[str, int]) -> tuple[int, bytes, bytes, int, int, int]:
    """The item's values in the order of the columns. Adds its folder to `parents` (folder -> number) if it is new."""
    parent, name = os.path.split(item.file)
    number = parents.setdefault(parent, len(parents))
    return number, os.fsencode(name), item.key.encode(), item.label, item.offset, item.size


@dataclass(frozen=True)
class Unusable:
    """An image of the source that cannot become a sample, known before any image is read: it has no usable label.

    Attributes:
        key: As in `Item`, distinct from the keys of the items.
        reason: What is wrong, such as `sample a has no label (.jpg)`.
        file: The file that holds it.
    """

    key: str
    reason: str
    file: Path


@dataclass(frozen=True)
class Listing:
    """All images of one split.

    Attributes:
        layout: Name of the source's layout, one of `source.LAYOUTS`.
        split: `train` or `val`.
        classes: Of all splits of the source, sorted by wnid; the position is the label.
        items: In the order of the source.
        unusable: Images without a usable label. They count as quarantined and are not among the items.
        originals: Key -> path of the image in the source, for each key that is not the name of its file.
        skipped: Entries of the source that are no images, by reason.
    """

    layout: str
    split: str
    classes: tuple[ClassName, ...]
    items: Items
    unusable: tuple[Unusable, ...] = ()
    originals: Mapping[str, str] = field(default_factory=dict)
    skipped: tuple[SkippedFiles, ...] = ()

    def classes_without_images(self) -> list[str]:
        """The wnids of the classes that no item has."""
        counts = np.bincount(self.items.label, minlength=len(self.classes))
        return [name.wnid for name, count in zip(self.classes, counts.tolist(), strict=True) if not count]

    def record(self) -> dict[str, object]:
        """What the manifest stores about the source. The fingerprint changes with any key, label or size."""
        digest = hashlib.sha256()
        for start in range(0, len(self.items), ITEMS_PER_CHUNK):
            rows = slice(start, start + ITEMS_PER_CHUNK)
            keys, labels, sizes = (c[rows].tolist() for c in (self.items.key, self.items.label, self.items.size))
            for key, label, size in zip(keys, labels, sizes, strict=True):
                digest.update(b"%b %d %d\n" % (key, label, size))
        return {"layout": self.layout, "images": len(self.items), "fingerprint": digest.hexdigest()}
