"""Sets that number or name their classes as they like: first their own labels, then the order of wnids.

A `Scan` is a split under its own labels. `classes_by_label` finds what they mean, from all splits at once; `listing_of`
puts both together.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.imagenet.listing import ClassName, Item, Items, Listing, unique

WNID = re.compile(r"(?:^|_)(n\d{8})(?:_|$)")  # as in n01440764_10026 and ILSVRC2012_val_00000001_n01751748


@dataclass(frozen=True)
class Scan:
    """A split under the set's own labels: an item's label is a position in `labels`, texts such as `17` or `tench`."""

    items: Items
    labels: tuple[str, ...]
    wnids: tuple[frozenset[str], ...]  # of each label: all wnids in its pictures' keys


def scan_of(pictures: Iterable[tuple[str, str, Path, int, int]]) -> Scan:
    """The scan of (key, label, file, offset, size), in that order."""
    codes: dict[str, int] = {}
    wnids: list[set[str]] = []

    def items() -> Iterator[Item]:
        for key, label, file, offset, size in pictures:
            code = codes.setdefault(label, len(codes))
            if code == len(wnids):
                wnids.append(set())
            if found := WNID.search(key):
                wnids[code].add(found[1])
            yield Item(key, code, file, offset, size)

    columns = Items.of(items())
    return Scan(columns, tuple(codes), tuple(map(frozenset, wnids)))


def classes_by_label(scans: Sequence[Scan], words: Mapping[str, str]) -> dict[str, ClassName]:
    """Label -> class, from all splits at once, so that they agree. `words`: the set's own names, if it has any.

    A label is the wnid in its keys, if every label has one and no two the same; else its name, or its number.
    """
    wnids: dict[str, set[str]] = {}
    for scan in scans:
        for label, found in zip(scan.labels, scan.wnids, strict=True):
            wnids.setdefault(label, set()).update(found)
    wnid_of = {label: min(found) for label, found in wnids.items() if len(found) == 1}
    if len(wnid_of) == len(wnids) == len(set(wnid_of.values())):
        return {label: ClassName(wnid, words.get(label, wnid)) for label, wnid in wnid_of.items()}
    width = max(map(len, wnids), default=0)
    names = words or {label: label.zfill(width) for label in wnids}  # so that numbers sort as numbers
    counts = Counter(names.values())  # ImageNet has two cranes: the bird and the machine
    return {label: ClassName(n if counts[n] == 1 else f"{n} ({label})", n) for label, n in names.items()}


def listing_of(layout: str, split: str, scan: Scan, class_of: Mapping[str, ClassName]) -> Listing:
    """The listing of a scan whose labels mean `class_of`; classes sorted by wnid, keys unique."""
    classes = tuple(sorted(set(class_of.values()), key=lambda c: c.wnid))
    position = {name: label for label, name in enumerate(classes)}
    label_of = np.array([position[class_of[label]] for label in scan.labels], np.int32)
    items = unique(scan.items.relabelled(label_of), [c.wnid for c in classes])
    return Listing(layout, split, classes, items)
