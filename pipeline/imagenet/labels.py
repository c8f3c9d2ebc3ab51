"""Turns a source's own labels into the project's labels: positions in the sorted classes of all splits.

Layouts number or name their classes in any way. `scan_of` reads a split under its own labels; `classes_by_label` finds
the class of each label from all splits of a layout at once; `listing_of` makes the final `Listing`.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.imagenet.entries import Skipped
from pipeline.imagenet.keys import key_of, stem_of, unique
from pipeline.imagenet.listing import ClassName, Item, Items, Listing, Unusable

WNID = re.compile(r"(?:^|_)(n\d{8})(?:_|$)")  # as in n01440764_10026 and ILSVRC2012_val_00000001_n01751748


MAX_OUTLIERS = 0.01  # share of labels of another kind that are taken for mistakes


class LabelledImage(NamedTuple):
    """One image with the label that the source gives it.

    Attributes:
        name: Its file name in the source, with any folders.
        label: The source's own label as text, such as `17` or `tench`; None if it has no usable one.
        file: As in `Item`.
        offset: As in `Item`.
        size: As in `Item`.
        problem: Why there is no label.
    """

    name: str
    label: str | None
    file: Path
    offset: int
    size: int
    problem: str = ""


@dataclass(frozen=True)
class Scan:
    """A split under the source's own labels.

    Attributes:
        items: The images with a label; an item's label is a position in `labels`.
        labels: The source's labels, in the order of their first image. One may have no image.
        wnids: For each label, all wnids that occur in the keys of its images.
        unusable: The images without a label.
        renamed: Row of `items` -> name of the image, for each name that is not its key.
        skipped: What is not an image.
    """

    items: Items
    labels: tuple[str, ...]
    wnids: tuple[frozenset[str], ...]
    unusable: tuple[Unusable, ...]
    renamed: Mapping[int, str]
    skipped: Skipped


def scan_of(images: Iterable[LabelledImage], skipped: Skipped | None = None, labels: Sequence[str] = ()) -> Scan:
    """The scan of a split's images, in their order.

    Args:
        images: With and without labels.
        skipped: What the layout counted while it made `images`.
        labels: Labels that exist even without an image.

    Raises:
        ValueError: No image has a label; the message is about the first.
    """
    codes = {label: code for code, label in enumerate(labels)}
    wnids: list[set[str]] = [set() for _ in labels]
    unusable: list[Unusable] = []
    renamed: dict[int, str] = {}

    def items() -> Iterator[Item]:
        row = 0
        for name, label, file, offset, size, problem in images:
            key = key_of(name)
            if label is None:
                unusable.append(Unusable(key, problem, file))
                continue
            code = codes.setdefault(label, len(codes))
            if code == len(wnids):
                wnids.append(set())
            if found := WNID.search(key):
                wnids[code].add(found[1])
            if key != stem_of(name):
                renamed[row] = name
            yield Item(key, code, file, offset, size)
            row += 1

    columns = Items.of(items())
    if unusable and not len(columns):
        raise ValueError(f"{unusable[0].file}: {unusable[0].reason}")
    return Scan(columns, tuple(codes), tuple(map(frozenset, wnids)), tuple(unusable), renamed, skipped or Skipped())


def outlying_labels(scans: Iterable[Scan]) -> dict[str, str]:
    """Label -> name for labels that are names; empty if labels are numbers.

    A few names among numbers, or numbers among names, are mistakes; many mean that numbers are names, too.
    """
    counts: Counter[str] = Counter()
    for scan in scans:
        for label, count in zip(scan.labels, np.bincount(scan.items.label, minlength=len(scan.labels)), strict=True):
            counts[label] += int(count)
    names = {label for label in counts if not label.isdecimal()}
    named, total = sum(counts[label] for label in names), counts.total()
    if named <= total * MAX_OUTLIERS:
        return {}
    if total - named <= total * MAX_OUTLIERS:
        return {label: label for label in names}
    return {label: label for label in counts}


def classes_by_label(scans: Iterable[Scan], words: Mapping[str, str]) -> dict[str, ClassName]:
    """The class of each label.

    If the keys of every label hold exactly one wnid, and no two labels have the same wnid, that wnid is the class.
    Otherwise the class is the source's name for the label or, without names, the label itself.

    Args:
        scans: All splits of the source, so that a label means the same in each.
        words: Label -> the source's name for it, for each label that exists; empty if labels are numbers without names.
    """
    wnids: dict[str, set[str]] = {}
    for scan in scans:
        for label, found in zip(scan.labels, scan.wnids, strict=True):
            if label in words if words else label.isdecimal():
                wnids.setdefault(label, set()).update(found)
    wnid_of = {label: min(found) for label, found in wnids.items() if len(found) == 1}
    if wnid_of and len(wnid_of) == len(wnids) == len(set(wnid_of.values())):
        return {label: ClassName(wnid, words.get(label, wnid)) for label, wnid in wnid_of.items()}
    width = max(map(len, wnids), default=0)
    names = words or {label: label.zfill(width) for label in wnids}  # zeros in front, so that numbers sort as numbers
    counts = Counter(names.values())  # ImageNet has two classes named crane: the bird and the machine
    return {label: ClassName(n if counts[n] == 1 else f"{n} ({label})", n) for label, n in names.items()}


def merged_classes(names: Iterable[ClassName]) -> tuple[ClassName, ...]:
    """Each class once, sorted by wnid, as numbers if all are integers. Words are preferred to a mere wnid."""
    by_wnid: dict[str, ClassName] = {}
    for name in names:
        if name.wnid not in by_wnid or by_wnid[name.wnid].words == name.wnid:
            by_wnid[name.wnid] = name
    if all(wnid.isdecimal() and wnid.isascii() for wnid in by_wnid):
        return tuple(sorted(by_wnid.values(), key=lambda c: (int(c.wnid), c.wnid)))
    return tuple(sorted(by_wnid.values(), key=lambda c: c.wnid))


def listing_of(
    layout: str,
    split: str,
    scan: Scan,
    class_of: Mapping[str, ClassName],
    classes: Sequence[ClassName] | None = None,
    root: Path = Path(),
) -> Listing:
    """The listing of a scan.

    Args:
        layout: Name of the source's layout.
        split: `train` or `val`.
        scan: The split under its own labels.
        class_of: The class of each of those labels; an image with another label becomes unusable.
        classes: All classes in the order of their labels; None takes those of `class_of`.
        root: The source's folder; keys do not depend on what is above it.

    Raises:
        ValueError: No image has a label in `class_of`.
    """
    names = merged_classes(class_of.values()) if classes is None else tuple(classes)
    position = {name.wnid: label for label, name in enumerate(names)}
    known = np.array([label in class_of for label in scan.labels], bool)
    label_of = np.array([position[class_of[label].wnid] if label in class_of else 0 for label in scan.labels], np.int32)
    bad_rows = np.flatnonzero(~known[scan.items.label]) if len(scan.items) else np.empty(0, np.int64)
    unusable = list(scan.unusable)
    for row in bad_rows.tolist():
        item = scan.items[row]
        reason = f"no class {scan.labels[item.label]} in the source's list of {len(class_of)} classes"
        unusable.append(Unusable(item.key, reason, item.file))
    if len(bad_rows) and len(bad_rows) == len(scan.items):
        raise ValueError(f"{unusable[-1].file}: {unusable[-1].reason}; use matching files")
    kept = np.delete(np.arange(len(scan.items)), bad_rows)
    items = scan.items.take(kept) if len(bad_rows) else scan.items
    items = unique(items.relabelled(label_of), [c.wnid for c in names], root)
    originals = _originals(scan, kept, items, root)
    return Listing(
        layout, split, names, items, _with_unique_keys(unusable, items, root), originals, scan.skipped.record()
    )


def _originals(scan: Scan, kept: np.ndarray, items: Items, root: Path) -> dict[str, str]:
    """Key -> original path, for each item whose key is not the name of its file."""
    changed = np.flatnonzero(items.key != scan.items.key[kept]) if len(items) else np.empty(0, np.int64)
    new_row = {row: n for n, row in enumerate(kept.tolist())} if scan.renamed else {}
    renamed = {new_row[row]: name for row, name in scan.renamed.items() if row in new_row}
    rows = sorted({*renamed, *changed.tolist()})
    originals = {}
    for row in rows:
        item = items[row]
        path = os.path.relpath(item.file, root)
        if item.offset:  # in a tar or a parquet file; without a name of its own, its plain key is the name
            name = renamed.get(row) or scan.items[int(kept[row])].key
            path = f"{path}: {name}"
        originals[item.key] = os.fsencode(path).decode(errors="backslashreplace")
    return originals


def _with_unique_keys(unusable: Sequence[Unusable], items: Items, root: Path) -> tuple[Unusable, ...]:
    """Gives each unusable image a key that no other image of the split has."""
    if not unusable:
        return ()
    taken = set(items.key.tolist())
    found = []
    for number, image in enumerate(unusable):
        key = image.key
        while key.encode() in taken:
            key = key_of(f"{image.key}_{os.path.relpath(image.file, root)}_{number}".replace("/", "_"))
            number += len(unusable)
        taken.add(key.encode())
        found.append(Unusable(key, image.reason, image.file))
    return tuple(found)
