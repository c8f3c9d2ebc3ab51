"""A split of a source as columns: which pictures, of which class, at which bytes of which file.

In: `Item`s, one at a time. Out: `Items`, about 70 bytes a picture (ImageNet's 1,281,167 in 90 MB, where as many objects
take 600), and a `Listing`, which adds the classes and knows its fingerprint. A job takes just its rows of it.
"""

from __future__ import annotations

import hashlib
import operator
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

KEY_LIMIT = 90


@dataclass(frozen=True)
class ClassName:
    """A class: WordNet id (or folder name) and its words."""

    wnid: str
    words: str


SPLITS = ("train", "val")
CHUNK = 1 << 14  # items that are Python objects at a time


@dataclass(frozen=True, slots=True)
class Item:
    """One picture: `size` bytes at `offset` of `file`; of a parquet file `offset` is the row, `size` the file's."""

    key: str
    label: int
    file: Path
    offset: int
    size: int


@dataclass(frozen=True, slots=True, eq=False)
class Items:
    """A sequence of `Item`s by column, each (n,) and read-only; `Items.of` makes it, an int index gives an `Item`."""

    parents: tuple[str, ...]  # the files' folders, each once
    parent: NDArray[np.int32]  # position in `parents`
    name: NDArray[np.bytes_]  # of the file, as the file system has it
    key: NDArray[np.bytes_]
    label: NDArray[np.int32]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]

    def __post_init__(self) -> None:
        for column in self._columns():
            column.flags.writeable = False

    @classmethod
    def of(cls, items: Iterable[Item]) -> Items:
        """The columns of `items`, which may be a generator: only `CHUNK` of them are held as objects."""
        parents: dict[str, int] = {}
        columns: list[list[np.ndarray]] = [[np.empty(0, dtype)] for dtype in ("<i4", "S1", "S1", "<i4", "<i8", "<i8")]
        rows = (_row(item, parents) for item in items)
        while chunk := list(islice(rows, CHUNK)):
            for column, values in zip(columns, zip(*chunk, strict=True), strict=True):
                column.append(np.array(values, column[0].dtype.char))  # "S" takes the width of the longest
        for number, column in enumerate(columns):
            columns[number] = [np.concatenate(column)]  # and its parts are let go
        return cls(tuple(parents), *(column for (column,) in columns))

    def take(self, rows: NDArray[np.integer[Any]]) -> Items:
        """Items at `rows` (m,), in that order, with no more folders than they need."""
        used, parent = np.unique(self.parent[rows], return_inverse=True)
        parents = tuple(self.parents[i] for i in used)
        return Items(parents, parent.astype(np.int32), *(column[rows] for column in self._columns()[1:]))

    def relabelled(self, label_of: NDArray[np.int32]) -> Items:
        """The same items, those of label i with label `label_of[i]`."""
        return replace(self, label=label_of[self.label])

    def __len__(self) -> int:
        return len(self.key)

    def __getitem__(self, index: int) -> Item:
        index = operator.index(index)
        return self._item(*(column[index].item() for column in self._columns()))

    def __iter__(self) -> Iterator[Item]:
        for start in range(0, len(self), CHUNK):
            chunk = (column[start : start + CHUNK].tolist() for column in self._columns())
            yield from (self._item(*row) for row in zip(*chunk, strict=True))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Items) or len(self) != len(other):
            return False
        position = {parent: i for i, parent in enumerate(other.parents)}
        parent = np.array([position.get(parent, -1) for parent in self.parents], np.int32)[self.parent]
        mine, theirs = (parent, *self._columns()[1:]), other._columns()
        return all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))

    def __reduce__(self) -> tuple[Any, ...]:
        return Items, (self.parents, *self._columns())

    def _columns(self) -> tuple[NDArray[Any], ...]:
        return self.parent, self.name, self.key, self.label, self.offset, self.size

    def _item(self, parent: int, name: bytes, key: bytes, label: int, offset: int, size: int) -> Item:
        return Item(key.decode(), label, Path(self.parents[parent], os.fsdecode(name)), offset, size)


def _row(item: Item, parents: dict[str, int]) -> tuple[int, bytes, bytes, int, int, int]:
    parent, name = os.path.split(item.file)
    number = parents.setdefault(parent, len(parents))
    return number, os.fsencode(name), item.key.encode(), item.label, item.offset, item.size


@dataclass(frozen=True)
class Listing:
    """A split of the source: items in the source's order and classes sorted by wnid (position = label)."""

    layout: str
    split: str
    classes: tuple[ClassName, ...]
    items: Items

    def record(self) -> dict[str, object]:
        """What the manifest says of the source; the fingerprint changes with any key, label or size."""
        digest = hashlib.sha256()
        for start in range(0, len(self.items), CHUNK):
            rows = slice(start, start + CHUNK)
            keys, labels, sizes = (c[rows].tolist() for c in (self.items.key, self.items.label, self.items.size))
            for key, label, size in zip(keys, labels, sizes, strict=True):
                digest.update(b"%b %d %d\n" % (key, label, size))
        return {"layout": self.layout, "images": len(self.items), "fingerprint": digest.hexdigest()}


def key_of(name: str) -> str:
    """A picture's file name as a key: no folder, no suffix, no dots or spaces, at most 90 characters (ValueError)."""
    key = _plain(os.path.splitext(name.rpartition("/")[2])[0])
    if not 0 < len(key) <= KEY_LIMIT:
        raise ValueError(f"{name}: its name makes a key of {len(key)} characters, expected 1 to {KEY_LIMIT}; rename it")
    return key


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", text)


def unique(items: Items, class_names: Sequence[str]) -> Items:
    """Items whose key stands once: where a name is used several times, its class goes before it.

    ValueError, naming the file, where that makes a key too long or one that another image has.
    """
    repeated = _repeated(items.key)
    if not len(repeated):
        return items
    rows = np.flatnonzero(np.isin(items.key, repeated))
    prefixes = np.array([f"{_plain(name)}_".encode() for name in class_names])
    longer = np.char.add(prefixes[items.label[rows]], items.key[rows])
    lengths = np.char.str_len(longer)
    if lengths.max() > KEY_LIMIT:
        file, found = items[int(rows[lengths.argmax()])].file, lengths.max()
        raise ValueError(f"{file}: with its class, a key of {found} characters, expected 1 to {KEY_LIMIT}; rename it")
    keys = items.key.astype(np.promote_types(items.key.dtype, longer.dtype))
    keys[rows] = longer
    if len(repeated := _repeated(keys)):
        file, key = items[int(np.flatnonzero(keys == repeated[0])[1])].file, repeated[0].decode()
        raise ValueError(f"{file}: its key {key!r} is another image's too; rename one of them")
    return replace(items, key=keys)


def _repeated(keys: NDArray[np.bytes_]) -> NDArray[np.bytes_]:
    ordered = np.sort(keys)
    repeated: NDArray[np.bytes_] = ordered[1:][ordered[1:] == ordered[:-1]]
    return repeated
