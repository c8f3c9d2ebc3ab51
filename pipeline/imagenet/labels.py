"""Turns a source's own labels into the project's labels: positions in the classes sorted by wnid.

Parquet files and WebDataset tars number or name their classes in any way. `scan_of` reads a split under its own labels;
`classes_by_label` finds the class of each label from all splits at once; `listing_of` makes the final `Listing`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.imagenet.listing import ClassName, Item, Items, Listing, unique

WNID = re.compile(r"(?:^|_)(n\d{8})(?:_|$)")  # as in n01440764_10026 and ILSVRC2012_val_00000001_n01751748


class LabelledImage(NamedTuple):
    """One image with the label that the source gives it.

    Attributes:
        key: As in `Item`.
        label: The source's own label as text, such as `17` or `tench`.
        file: As in `Item`.
        offset: As in `Item`.
        size: As in `Item`.
    """

    key: str
    label: str
    file: Path
    offset: int
    size: int


@dataclass(frozen=True)
class Scan:
    """A split under the source's own labels.

    Attributes:
        items: The images; an item's label is a position in `labels`.
        labels: The source's labels, in the order of their first image.
        wnids: For each label, all wnids that occur in the keys of its images.
    """

    items: Items
    labels: tuple[str, ...]
    wnids: tuple[frozenset[str], ...]


def scan_of(images: Iterable[LabelledImage]) -> Scan:
    """The scan of a split's images, in their order."""
    codes: dict[str, int] = {}
    wnids: list[set[str]] = []

    def items() -> Iterator[Item]:
        for key, label, file, offset, size in images:
            code = codes.setdefault(label, len(codes))
            if code == len(wnids):
                wnids.append(set())
            if found := WNID.search(key):
                wnids[code].add(found[1])
            yield Item(key, code, file, offset, size)

    columns = Items.of(items())
    return Scan(columns, tuple(codes), tuple(map(frozenset, wnids)))


def classes_by_label(scans: Sequence[Scan], words: Mapping[str, str]) -> dict[str, ClassName]:
    """The class of each label.

    If the keys of every label hold exactly one wnid, and no two labels have the same wnid, that wnid is the class.
    Otherwise the class is the source's name for the label or, without names, the label itself.

    Args:
        scans: All splits of the source, so that a label means the same in each.
        words: Label -> the source's name for it; empty if the source has no names.
    """
    wnids: dict[str, set[str]] = {}
    for scan in scans:
        for label, found in zip(scan.labels, scan.wnids, strict=True):
            wnids.setdefault(label, set()).update(found)
    wnid_of = {label: min(found) for label, found in wnids.items() if len(found) == 1}
    if len(wnid_of) == len(wnids) == len(set(wnid_of.values())):
        return {label: ClassName(wnid, words.get(label, wnid)) for label, wnid in wnid_of.items()}
    width = max(map(len, wnids), default=0)
    names = words or {label: label.zfill(width) for label in wnids}  # zeros in front, so that numbers sort as numbers
    counts = Counter(names.values())  # ImageNet has two classes named crane: the bird and the machine
    return {label: ClassName(n if counts[n] == 1 else f"{n} ({label})", n) for label, n in names.items()}


def listing_of(layout: str, split: str, scan: Scan, class_of: Mapping[str, ClassName]) -> Listing:
    """The listing of a scan.

    Args:
        layout: Name of the source's layout.
        split: `train` or `val`.
        scan: The split under its own labels.
        class_of: The class of each of those labels.
    """
    classes = tuple(sorted(set(class_of.values()), key=lambda c: c.wnid))
    position = {name: label for label, name in enumerate(classes)}
    label_of = np.array([position[class_of[label]] for label in scan.labels], np.int32)
    items = unique(scan.items.relabelled(label_of), [c.wnid for c in classes])
    return Listing(layout, split, classes, items)
