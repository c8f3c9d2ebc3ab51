"""Opens ImageNet in any of the layouts in which it is distributed, without unpacking it.

    ilsvrc      ILSVRC2012_img_train.tar (a tar of one tar per class), ILSVRC2012_img_val.tar (flat) and
                ILSVRC2012_devkit_t12.tar.gz in one folder, as image-net.org distributes them
    kaggle      ILSVRC/Data/CLS-LOC/train/<wnid>/*.JPEG, .../val/*.JPEG and LOC_val_solution.csv
    parquet     train-00000-of-00294.parquet ... and validation-*.parquet, as Hugging Face distributes them
    webdataset  tars of samples (KEY.jpg, KEY.cls), such as those that make_shards writes
    folders     train/<wnid>/*.JPEG and val/<wnid>/*.JPEG

Each split is read from where it is, so train may be in class folders beside the tar of val. `open_source` decides
which part gives which split, `Source.listing(split)` lists the images of a split as items, and `ItemReader` reads the
bytes of an item. The same files always give the same listing. All splits have one list of classes, sorted by wnid
(WordNet id).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np

from pipeline.imagenet import folders, ilsvrc, kaggle, parquet, webdataset
from pipeline.imagenet.agreement import check_agreement, renumbered
from pipeline.imagenet.choose import decide, descend, unused_entries
from pipeline.imagenet.entries import shown, text_of
from pipeline.imagenet.labels import Scan, listing_of, merged_classes
from pipeline.imagenet.listing import SPLITS, ClassName, Listing
from pipeline.imagenet.parquet import ColumnNames as ColumnNames
from pipeline.imagenet.parts import Part, counted

# Layout -> its files in a few words, for messages.
LAYOUTS: Mapping[str, str] = MappingProxyType(
    {
        "ilsvrc": ilsvrc.EXPECTED,
        "kaggle": kaggle.EXPECTED,
        "parquet": parquet.EXPECTED,
        "webdataset": webdataset.EXPECTED,
        "folders": folders.EXPECTED,
    }
)
FIND_COLUMNS = ColumnNames()
MAX_NAMES = 8  # names in a line of the plan


@dataclass(frozen=True)
class Source:
    """ImageNet in a folder: for each split, the part that gives it.

    Attributes:
        root: The folder, or the one in it that holds the layout.
        parts: Split -> its part.
        unused: Entries of the folder that no part reads.
        class_list: The classes, if the user gave them.
    """

    root: Path
    parts: Mapping[str, Part]
    unused: tuple[Path, ...] = ()
    class_list: tuple[ClassName, ...] | None = None
    _scans: dict[str, Scan] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def layout(self) -> str:
        """Name of the layout, for the log; of all layouts if the splits have several."""
        return ", ".join(dict.fromkeys(part.layout for part in self.parts.values()))

    def splits(self) -> list[str]:
        """The splits of `listing.SPLITS` that the source holds."""
        return [split for split in SPLITS if split in self.parts]

    def listing(self, split: str) -> Listing:
        """Lists the images of a split, with the classes of all splits.

        Raises:
            ValueError: A file is missing, damaged or does not fit the others; the message names it.
        """
        part, class_of = self.parts[split], self._class_of[split]
        return listing_of(part.layout, split, self._scan(split), class_of, self._classes, self.root)

    def plan(self, listings: Sequence[Listing]) -> list[str]:
        """What will be read and what will not, a line each."""
        lines = []
        for listing in listings:
            count = f"{counted(len(listing.items), 'image')} of {counted(len(listing.classes), 'class', 'classes')}"
            lines.append(f"{listing.split}: {self.parts[listing.split].what}, {count}, layout {listing.layout}")
            lines += [f"  skipped: {skipped}" for skipped in listing.skipped]
            if listing.unusable:
                first = f"{listing.unusable[0].file}: {listing.unusable[0].reason}"
                lines.append(f"  unusable: {len(listing.unusable):,} (first: {first})")
            if without := listing.classes_without_images():
                lines.append(f"  classes without images: {len(without):,} ({_names(without)})")
            lines += renumbered(listing)
        if unused := [shown(os.path.relpath(path, self.root)) for path in self.unused]:
            lines.append(f"not used: {_names(unused)}")
        return lines

    @cached_property
    def _class_of(self) -> dict[str, Mapping[str, ClassName]]:
        """Split -> source's label -> class."""
        class_of: dict[str, Mapping[str, ClassName]] = {}
        for split, part in self.parts.items():
            same = {s: other for s, other in self.parts.items() if other.layout == part.layout}
            class_of[split] = part.classes(split, same, {s: self._scan(s) for s in same})
        if self.class_list is None:
            return class_of
        return {split: _listed(names, self.class_list, self.root) for split, names in class_of.items()}

    @cached_property
    def _classes(self) -> tuple[ClassName, ...]:
        """One list of classes over all splits."""
        if self.class_list is not None:
            return merged_classes(self.class_list)
        found = merged_classes(name for names in self._class_of.values() for name in names.values())
        listed = [{name.wnid for name in names.values()} for names in self._class_of.values()]
        check_agreement(listed, [self._classes_with_images(split) for split in self._class_of], self.root)
        return found

    def _classes_with_images(self, split: str) -> set[str]:
        """The wnids of the classes that have images in a split."""
        scan, class_of = self._scan(split), self._class_of[split]
        counts = np.bincount(scan.items.label, minlength=len(scan.labels)).tolist()
        used = [label for label, count in zip(scan.labels, counts, strict=True) if count and label in class_of]
        return {class_of[label].wnid for label in used}

    def _scan(self, split: str) -> Scan:
        if split not in self._scans:
            self._scans[split] = self.parts[split].scan()
        return self._scans[split]


def open_source(
    root: Path,
    layout: str | None = None,
    split: str | None = None,
    columns: ColumnNames = FIND_COLUMNS,
    class_list: Sequence[ClassName] | None = None,
) -> Source:
    """Opens the folder `root` as a source.

    Args:
        root: The folder that holds ImageNet, or a folder around it.
        layout: A key of `LAYOUTS`; None detects it for each split.
        split: Only this split must be readable; None requires every split that seems to be there.
        columns: Columns of parquet files.
        class_list: All classes, if they are more than those in the source.

    Raises:
        ValueError: There is no such folder or layout, or a split that seems to be there cannot be read, or can be read
            in two ways; the message says what to do.
    """
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r}, expected one of {', '.join(LAYOUTS)}")
    expected = LAYOUTS[layout] if layout else "; or ".join(LAYOUTS.values())
    if root.exists() and not root.is_dir():
        raise ValueError(f"{root}: a file, expected the folder that holds it; use {root.parent} as SOURCE")
    if not root.is_dir():
        what = "no such folder; expected one"
        if root.is_symlink():
            what = f"a link to {os.readlink(root)}, which does not exist; expected a folder"
        raise ValueError(f"{root}: {what} with {expected}")
    folder, findings = descend(root, columns)
    parts = decide(findings, layout, split, folder)
    if not parts:
        found = _names([path.name for path in sorted(root.iterdir())]) or "nothing"
        what = f"layout {layout} is not here" if layout else "no ImageNet layout here"
        raise ValueError(f"{root}: {what} (found {found}); expected {expected}")
    classes = None if class_list is None else tuple(class_list)
    return Source(folder, parts, tuple(unused_entries(folder, parts)), classes)


def read_class_list(path: Path) -> list[ClassName]:
    """The classes in a file, in its order: a wnid per line, with its words behind it if there are any."""
    try:
        lines = [line.split(maxsplit=1) for line in text_of(path).splitlines() if line.strip()]
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; expected a text file with a wnid per line") from error
    names = [ClassName(line[0], line[-1].strip()) for line in lines]  # without words, the wnid is the words
    if not names or len({name.wnid for name in names}) < len(names):
        raise ValueError(f"{path}: {'a class twice' if names else 'no class'}; expected each wnid once, one per line")
    return names


def _listed(class_of: Mapping[str, ClassName], class_list: Sequence[ClassName], root: Path) -> Mapping[str, ClassName]:
    """The class of each label in a list that the user gave. Label n is the n-th line if labels are mere numbers."""
    by_wnid = {name.wnid: name for name in class_list}
    if all(name.wnid.isdecimal() for name in class_of.values()) and not any(w.isdecimal() for w in by_wnid):
        numbers = {label: int(name.wnid) for label, name in class_of.items()}
        return {label: class_list[number] for label, number in numbers.items() if number < len(class_list)}
    if missing := sorted({name.wnid for name in class_of.values()} - set(by_wnid)):
        raise ValueError(
            f"{root}: {len(missing)} of its classes are not in the class list ({_names(missing)}); add them to the list"
        )
    return {label: by_wnid[name.wnid] for label, name in class_of.items()}


def _names(names: Sequence[str]) -> str:
    """The first few of some names, and how many more there are."""
    more = f" and {len(names) - MAX_NAMES:,} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more
