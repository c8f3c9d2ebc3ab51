"""ImageNet as image files in class folders: the layout `folders`, and the helpers that layout `kaggle` shares.

    train/<wnid>/*.JPEG   val/<wnid>/*.JPEG

In: a folder. Out: a `Listing` with one item per file, by class folder, then file name. Files are not opened; only their
sizes are read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.imagenet.listing import SPLITS, ClassName, Item, Items, Listing, key_of, unique

SUFFIXES = frozenset({".jpeg", ".jpg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})  # of image files, any case


@dataclass(frozen=True)
class ClassFolders:
    """A `Source` with image files in `root`/train/<class>/ and `root`/val/<class>/."""

    root: Path
    layout: str = "folders"
    expected: str = "train/<wnid>/*.JPEG"

    def splits(self) -> list[str]:
        """The splits whose folder holds at least one folder."""
        return [split for split in SPLITS if next(list_folders(self.root / split), None)]

    def listing(self, split: str) -> Listing:
        """Items by class, then name. Labels are positions in the sorted class folders of the split."""
        folders = sorted(list_folders(self.root / split))
        names = [folder.name for folder in folders]
        classes = tuple(ClassName(name, name) for name in names)
        return Listing(self.layout, split, classes, unique(Items.of(items_by_folder(folders, names)), names))


def items_by_folder(folders: Sequence[Path], names: Sequence[str]) -> Iterator[Item]:
    """The images in class folders, by folder, then file name.

    Args:
        folders: The class folders.
        names: The class names; an item's label is the position of its folder's name.

    Raises:
        ValueError: A folder holds no image file.
    """
    label_of = {name: label for label, name in enumerate(names)}
    for folder in folders:
        entries = sorted(list_files(folder), key=lambda e: e.name)
        if not entries:
            raise ValueError(f"{folder}: a class folder with no image; add its images or remove the folder")
        yield from (folder_item(entry, label_of[folder.name]) for entry in entries)


def folder_item(entry: os.DirEntry[str], label: int) -> Item:
    """The item for an image file with that label."""
    return Item(key_of(entry.name), label, Path(entry.path), 0, entry.stat().st_size)


def list_folders(path: Path) -> Iterator[Path]:
    """The folders in `path`, in no particular order; empty if `path` is no folder."""
    return (p for p in path.iterdir() if p.is_dir()) if path.is_dir() else iter(())


def list_files(path: Path) -> Iterator[os.DirEntry[str]]:
    """The image files in `path`, in no particular order; empty if `path` is no folder."""
    if path.is_dir():
        with os.scandir(path) as entries:
            yield from (e for e in entries if e.is_file() and os.path.splitext(e.name)[1].lower() in SUFFIXES)
