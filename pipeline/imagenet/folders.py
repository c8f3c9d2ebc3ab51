"""ImageNet as image files in folders, for the layouts `folders` and `kaggle`.

    train/<class>/*.JPEG   val/<class>/*.JPEG     nested folders belong to their class
    val/*.JPEG             flat, if a table, the devkit or the file names say the classes

Files are not opened; only their sizes are read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.files import doing
from pipeline.imagenet.annotations import FileClasses
from pipeline.imagenet.entries import (
    Skipped,
    ignored,
    image_suffixes,
    is_dangling,
    is_folder,
    sorted_entries,
    text_of,
    walk_images,
)
from pipeline.imagenet.kaggle import MAPPING, read_mapping
from pipeline.imagenet.labels import LabelledImage, Scan, scan_of
from pipeline.imagenet.listing import ClassName
from pipeline.imagenet.parts import Part, counted

SUFFIXES = image_suffixes()  # of image files, any case
EXPECTED = "train/<wnid>/*.JPEG"
WORDS, LABELS = "words.txt", "Labels.json"


@dataclass(frozen=True)
class Place:
    """Where the split folders are.

    Attributes:
        root: The source's folder.
        images: The folder of the split folders: `root`, or one below it.
        layout: `folders` or `kaggle`.
    """

    root: Path
    images: Path
    layout: str

    def relative(self, paths: Sequence[Path]) -> str:
        """The names of folders below `root`, for the plan."""
        names = [os.path.relpath(path, self.root) for path in paths]
        return f"{self.root.name or self.root}" if names == ["."] else ", ".join(names)


def class_folders(split: str, folders: Sequence[Path], inside: Sequence[Path], place: Place) -> Part:
    """The part for class folders. One without an image is a class, too.

    Args:
        split: `train` or `val`.
        folders: The class folders.
        inside: The split folders that hold them.
        place: The source.
    """

    def scan() -> Scan:
        skipped = Skipped()
        for folder in inside:
            for entry in sorted_entries(folder):
                if reason := _reason_beside_classes(entry):
                    skipped.add(reason, entry.path)
        images = (_image(entry, folder.name) for folder in folders for entry in walk_images(folder, skipped))
        found = scan_of(images, skipped, sorted({folder.name for folder in folders}))
        if not len(found.items):
            raise ValueError(f"{folders[0]}: a class folder with no image, as are all others; add images or remove it")
        return found

    names = {folder.name for folder in folders}
    what = f"{counted(len(names), 'class folder')} in {place.relative(inside)}"
    uses = (*folders, *_word_files(place))
    return Part(place.layout, split, what, uses, scan, lambda _, __, scans: _classes(scans[split], place, folders))


def flat_images(split: str, folder: Path, count: int, classes: FileClasses, place: Place) -> Part:
    """The part for images in one folder without class folders."""

    def scan() -> Scan:
        skipped = Skipped()
        class_of, named = classes.read()
        table = classes.path.name if classes.path else "its name"
        seen = set()

        def images() -> Iterator[LabelledImage]:
            for entry in walk_images(folder, skipped, deep=False):
                seen.add(os.path.splitext(entry.name)[0])
                wnid = class_of(entry.name)
                problem = "" if wnid else f"no line of {table} names it; use matching files"
                yield _image(entry, wnid, problem)
            for stem in sorted(named - seen):
                problem = f"{table} names it, but there is no such file; unpack the set again"
                yield LabelledImage(f"{stem}.JPEG", None, folder / f"{stem}.JPEG", 0, 0, problem)

        return scan_of(images(), skipped)

    source = f"classes from {classes.path.name}" if classes.path else "classes from their names"
    what = f"{counted(count, 'image file')} in {place.relative([folder])}, {source}"
    uses = (folder, *([classes.path] if classes.path else []), *_word_files(place))
    return Part(place.layout, split, what, uses, scan, lambda _, __, scans: _classes(scans[split], place, ()))


def _image(entry: os.DirEntry[str], label: str | None, problem: str = "") -> LabelledImage:
    """An image file with its label, or a link to nowhere."""
    if is_dangling(entry):
        problem = f"a link to {os.readlink(entry.path)}, which does not exist"
        return LabelledImage(entry.name, None, Path(entry.path), 0, 0, problem)
    with doing("read the size", entry.path):
        return LabelledImage(entry.name, label, Path(entry.path), 0, entry.stat().st_size, problem)


def _reason_beside_classes(entry: os.DirEntry[str]) -> str | None:
    """Why an entry beside class folders is skipped; None for a class folder."""
    if reason := ignored(entry.name):
        return reason
    if is_folder(entry):
        return None
    return "file beside class folders"


def _word_files(place: Place) -> list[Path]:
    """The files that name the classes in words."""
    return [place.root / name for name in (MAPPING, WORDS, LABELS) if (place.root / name).is_file()]


def _classes(scan: Scan, place: Place, folders: Sequence[Path]) -> Mapping[str, ClassName]:
    """The class of each label, with words if a file of the source has them. A mapping is the whole list of classes."""
    mapping = read_mapping(place.root / MAPPING)
    if mapping:
        for folder in folders:
            if folder.name not in mapping:
                raise ValueError(f"{folder}: no class of {MAPPING}; use matching files")
        return {wnid: ClassName(wnid, words) for wnid, words in mapping.items()}
    words = _words(place)
    return {label: ClassName(label, words.get(label, label)) for label in scan.labels}


def _words(place: Place) -> dict[str, str]:
    """Wnid -> words, from tiny-imagenet's words.txt or ImageNet-100's Labels.json; empty without them."""
    if (path := place.root / WORDS).is_file():
        lines = (line.partition("\t") for line in text_of(path).splitlines())
        return {wnid: words.strip() or wnid for wnid, _, words in lines}
    if (path := place.root / LABELS).is_file():
        try:
            found = json.loads(path.read_bytes())
            return {str(wnid): str(words) for wnid, words in found.items()} if isinstance(found, dict) else {}
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error}); download it again, or remove it") from error
    return {}
