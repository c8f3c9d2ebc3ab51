"""Keys of samples: any file name gives a distinct, stable and legal key.

A key has at most KEY_LIMIT characters, letters, digits, `_` and `-` only. It is the file's name without folder and
suffix if that is legal and unique. Otherwise the class is put in front, and if that does not help, a digest of the
file's path in the source is put behind. So a key does not depend on where the source is or on the order of reading.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.imagenet.listing import KEY_LIMIT, Items

DIGEST_DIGITS = 12


def stem_of(name: str) -> str:
    """A file's name without folder and suffix."""
    return os.path.splitext(name.rpartition("/")[2])[0]


def key_of(name: str) -> str:
    """The key for an image's file name: no folder, no suffix, and `_` for each dot, space or other special character.

    A longer key than KEY_LIMIT is cut and gets a digest of the name.
    """
    key = _plain(stem_of(name)) or "_"
    return key if len(key) <= KEY_LIMIT else _with_digest(key, os.fsencode(name))


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", text)


def _with_digest(key: str, origin: bytes) -> str:
    digest = hashlib.sha256(origin).hexdigest()[:DIGEST_DIGITS]
    return f"{key[: KEY_LIMIT - DIGEST_DIGITS - 1]}_{digest}"


def unique(items: Items, class_names: Sequence[str], root: Path = Path()) -> Items:
    """The items with unique keys.

    A key that several items share gets its class name as a prefix. If that is not unique or too long, it also gets a
    digest of the file's path below `root` and the offset.
    """
    repeated = _repeated(items.key)
    if not len(repeated):
        return items
    rows = np.flatnonzero(np.isin(items.key, repeated))
    prefixes = np.array([f"{_plain(name)}_".encode() for name in class_names])
    longer = np.char.add(prefixes[items.label[rows]], items.key[rows])
    keys = items.key.astype(np.promote_types(items.key.dtype, longer.dtype))
    keys[rows] = longer
    too_long = np.char.str_len(keys) > KEY_LIMIT
    again = np.flatnonzero(too_long | np.isin(keys, _repeated(keys)))
    if len(again):
        keys = _with_digests(items, keys, again.tolist(), root)
    return replace(items, key=keys)


def _with_digests(items: Items, keys: NDArray[np.bytes_], rows: Iterable[int], root: Path) -> NDArray[np.bytes_]:
    """The keys with a digest behind each of `rows`. Items at the same bytes (hard links) also get a number."""
    names = keys.tolist()
    rows = list(rows)
    renamed = set(rows)
    taken = {name for row, name in enumerate(names) if row not in renamed}
    for row in rows:
        item = items[row]
        origin = b"%b\0%d\0%b" % (os.fsencode(os.path.relpath(item.file, root)), item.offset, names[row])
        key, number = _with_digest(names[row].decode(), origin).encode(), 1
        while key in taken:
            number += 1
            key = _with_digest(names[row].decode(), b"%b\0%d" % (origin, number)).encode()
        taken.add(key)
        names[row] = key
    return np.array(names, "S")


def _repeated(keys: NDArray[np.bytes_]) -> NDArray[np.bytes_]:
    """Every key that occurs more than once."""
    ordered = np.sort(keys)
    repeated: NDArray[np.bytes_] = ordered[1:][ordered[1:] == ordered[:-1]]
    return repeated
