"""Looks at everything in a folder: finds for each split every way to read it, and what looks like a split but is not.

`find` gives all parts and problems; `source.py` decides between them. Detection reads names only, except that it looks
for one image in each class folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.imagenet.annotations import find_file_classes, missing_classes
from pipeline.imagenet.devkit import NAME as DEVKIT_NAME
from pipeline.imagenet.devkit import number_of
from pipeline.imagenet.entries import folders_in, has_image, ignored, is_dangling, skip_reason, sorted_entries
from pipeline.imagenet.folders import Place, class_folders, flat_images
from pipeline.imagenet.ilsvrc import CLASS_TAR, IMAGE_TAR, class_tars, image_tars
from pipeline.imagenet.kaggle import SOLUTION, kaggle_images
from pipeline.imagenet.labels import WNID
from pipeline.imagenet.listing import SPLITS
from pipeline.imagenet.parquet import ColumnNames, parquet_parts, parquet_split
from pipeline.imagenet.parts import (
    Findings,
    Part,
    Problem,
    counted,
    is_numbered,
    split_in_file,
    split_of_folder,
)
from pipeline.imagenet.webdataset import webdataset_part

ARCHIVE = re.compile(r".*\.(zip|7z|rar|tar\.\w+|tgz|tbz2?|txz)", re.IGNORECASE)
WRAPPERS = frozenset({"images", "image", "imgs", "data", "jpegimages"})  # folders around class folders or images
FEW_FILES = 0.01  # share of images beside class folders that is skipped rather than refused
SAMPLE_NAMES = 100  # file names that are looked at to find out how images are named


@dataclass(frozen=True)
class Contents:
    """The entries of a folder by kind, without ignored ones.

    Attributes:
        folder: The folder.
        folders: Folders in it.
        images: Names of the image files.
        files: Other files.
    """

    folder: Path
    folders: list[Path]
    images: list[str]
    files: list[Path]

    @classmethod
    def of(cls, folder: Path) -> Contents:
        """Reads the names in a folder."""
        found = cls(folder, folders_in(folder), [], [])
        for entry in sorted_entries(folder):
            if not ignored(entry.name) and not entry.is_dir():
                if skip_reason(entry) is None:
                    found.images.append(entry.name)
                else:
                    found.files.append(Path(entry.path))
        return found

    def class_tars(self) -> list[Path]:
        """Tars that are named by a wnid."""
        return [path for path in self.files if CLASS_TAR.fullmatch(path.name)]

    def shards(self) -> list[Path]:
        """Tars of any other name."""
        others = (CLASS_TAR, IMAGE_TAR, DEVKIT_NAME)
        tars = [path for path in self.files if path.suffix.lower() == ".tar" and path.is_file()]
        return [path for path in tars if not any(other.fullmatch(path.name) for other in others)]

    def parquet(self) -> list[Path]:
        """Parquet files, without the tables that img2dataset writes beside its tars."""
        return [p for p in self.files if p.suffix == ".parquet" and not p.with_suffix(".tar").is_file()]

    def archives(self) -> list[Path]:
        """Files that must be unpacked or decompressed first."""
        return [p for p in self.files if ARCHIVE.fullmatch(p.name) and not DEVKIT_NAME.fullmatch(p.name)]


def find(root: Path, names: ColumnNames) -> Findings:
    """All parts and problems in a folder and in the folders of splits in it."""
    place = _place(root)
    findings = Findings()
    inside: dict[str, list[Path]] = {}
    for folder in folders_in(place.images):
        if split := split_of_folder(folder.name):
            inside.setdefault(split, []).append(folder)
    findings.add(*_no_folders(place, inside))
    for split, folders in inside.items():
        findings.add(*_in_split_folders(split, folders, place, names))
    here = Contents.of(root)
    for split in SPLITS:
        findings.add(*image_tars(split, here.files, [root, *folders_in(root)]))
    findings.add(*_shards_by_name(here, place, findings), *_parquet_by_name(here, place, names))
    return findings


def _no_folders(place: Place, inside: Mapping[str, object]) -> Iterator[Problem]:
    """Problems for entries that are named by a split, but are no folder: links to nowhere, and files."""
    for entry in sorted_entries(place.images):
        split = split_of_folder(entry.name)
        if split is not None and split not in inside and not entry.is_dir():
            what = "a link to a folder that does not exist" if is_dangling(entry) else "not a folder"
            text = f"{entry.path}: {what}; correct it, or remove it, or use --split {_other(split)}"
            yield Problem(place.layout, split, text)


def _place(root: Path) -> Place:
    images = kaggle_images(root)
    if images is not None:
        return Place(root, images, "kaggle")
    return Place(root, root, "kaggle" if (root / SOLUTION).is_file() else "folders")


def _in_split_folders(
    split: str, folders: Sequence[Path], place: Place, names: ColumnNames
) -> list[Part | Problem | None]:
    """The parts and problems in the folders that are named by one split."""
    full = [folder for folder in folders if any(not ignored(entry.name) for entry in sorted_entries(folder))]
    if not full:
        text = f"{folders[0]}: empty; fill it, or remove it, or use --split {_other(split)}"
        return [Problem(place.layout, split, text)]
    if len(full) > 1 and not all(is_numbered(folder.name) for folder in full):
        text = f"{' and '.join(map(str, full))}: two folders for {split}; move one of them away"
        return [Problem(place.layout, split, text, always=True)]
    inside = [_unwrapped(split, folder) for folder in full]
    classes = [folder for path in inside for folder in folders_in(path)]
    contents = [Contents.of(path) for path in inside]
    where = place.relative(inside)
    found: list[Part | Problem | None] = []
    shards = [path for content in contents for path in content.shards()]
    parquet = [path for content in contents for path in content.parquet()]
    tars = [path for content in contents for path in content.class_tars()]
    has_classes = any(has_image(folder) for folder in classes)
    if has_classes:
        found += [class_folders(split, classes, inside, place), *_beside_classes(split, classes, contents, tars, place)]
    elif tars:
        found.append(class_tars(split, tars, [place.root, *inside], where))
    elif len(inside) == 1 and contents[0].images:
        found.append(_flat(split, contents[0], place))
    files = [path for content in contents for path in content.files]
    if not has_classes:
        found += image_tars(split, files, [place.root, *inside])
    found += [webdataset_part(split, shards, where), parquet_parts(split, parquet, where, names)]
    if not has_classes:
        found += [_packed(split, path, always=True) for content in contents for path in content.archives()[:1]]
    if not any(found):
        names_found = ", ".join(sorted(p.name for c in contents for p in (*c.folders, *c.files))[:5])
        text = f"{full[0]}: no image in it or its folders (found {names_found}); expected class folders with images"
        found.append(Problem(place.layout, split, f"{text}, or use --split {_other(split)}"))
    return found


def _beside_classes(
    split: str, classes: Sequence[Path], contents: Sequence[Contents], tars: Sequence[Path], place: Place
) -> list[Problem]:
    """Problems of what lies beside class folders: classes that are still packed, and images without a class."""
    full = {folder.name for folder in classes if has_image(folder)}
    if len(classes) == 1 and not (content := Contents.of(classes[0])).images and len(content.folders) > 1:
        text = (
            f"{classes[0]}: {len(content.folders)} folders in the only folder of {split}, so it is not clear which are"
        )
        fix = f"the classes; move them up into {classes[0].parent}, or their images into {classes[0]}"
        return [Problem(place.layout, split, f"{text} {fix}", always=True)]
    archives = [path for content in contents for path in content.archives() if re.match(r"n\d{8}\.", path.name)]
    packed = [path for path in (*tars, *archives) if path.name.partition(".")[0] not in full]
    problems = []
    if packed:
        text = f"{packed[0]}: a class that is not unpacked, unlike others ({counted(len(packed), 'file')} in all)"
        problems.append(Problem(place.layout, split, f"{text}; unpack it into a folder, or remove it", always=True))
    for content in contents:
        named = [n for n in content.images[:SAMPLE_NAMES] if WNID.search(n.partition(".")[0]) or number_of(n)]
        if named or len(content.images) > max(3, FEW_FILES * 50 * len(full)):
            image = content.folder / content.images[0]
            text = f"{image}: {counted(len(content.images), 'image')} beside class folders; move each into its class"
            problems.append(Problem(place.layout, split, f"{text} folder, or away", always=True))
    return problems


def _unwrapped(split: str, folder: Path) -> Path:
    """The folder that holds the class folders: below `folder` if there is one folder too many (val/val, val/images)."""
    content = Contents.of(folder)
    if len(content.folders) != 1 or content.images or content.shards() or content.class_tars() or content.parquet():
        return folder
    (child,) = content.folders
    inner = folders_in(child)
    wraps = split_of_folder(child.name) == split or child.name.lower() in WRAPPERS
    if wraps or (inner and all(re.fullmatch(r"n\d{8}", path.name) for path in inner)):
        return _unwrapped(split, child)
    return folder


def _flat(split: str, content: Contents, place: Place) -> Part | Problem:
    """The part for images without class folders; a problem if nothing says their classes."""
    count, first = len(content.images), content.images[:SAMPLE_NAMES]
    classes = find_file_classes(split, content.folder, first, [place.root, *folders_in(place.root)])
    if classes is None:
        text = missing_classes(split, content.folder, count, place.root, place.layout == "kaggle")
        return Problem(place.layout, split, text)
    return flat_images(split, content.folder, count, classes, place)


def _shards_by_name(here: Contents, place: Place, findings: Findings) -> list[Part | Problem | None]:
    """The parts for tars in the source's folder, whose names contain the split.

    If a folder gives the split already, its shards or the one tar from which it was unpacked have no use.
    """
    split_of = {path: split_in_file(path.name) for path in here.shards()}
    given = {part.split: part.layout for part in findings.parts}
    if given:
        split_of = {path: split for path, split in split_of.items() if split}
        for split, layout in given.items():
            tars = [path for path, s in split_of.items() if s == split]
            if layout == "webdataset" or len(tars) == 1:
                split_of = {path: s for path, s in split_of.items() if s != split}
    unclear = [path for path, split in split_of.items() if split is None]
    if unclear and len(unclear) < len(split_of):
        text = "no split in its name, unlike other tars; expected train or val in it; rename it"
        return [Problem("webdataset", split, f"{unclear[0]}: {text}", always=True) for split in SPLITS]
    by_split = {split: [path for path, s in split_of.items() if s == split] for split in SPLITS}
    if unclear:
        by_split = {split_of_folder(place.root.resolve().name) or "train": unclear}
    return [webdataset_part(split, tars, place.relative([place.root])) for split, tars in by_split.items()]


def _parquet_by_name(here: Contents, place: Place, names: ColumnNames) -> list[Part | Problem | None]:
    """The parts for parquet files in the source's folder or in its subfolder data."""
    for content in (here, Contents.of(place.root / "data")):
        files = content.parquet()
        by_split = {split: [path for path in files if parquet_split(path.name) == split] for split in SPLITS}
        where = place.relative([content.folder])
        found: list[Part | Problem | None] = [parquet_parts(s, paths, where, names) for s, paths in by_split.items()]
        unclear = [path for path in files if split_in_file(path.name) is None]
        if any(found):
            return found
        if unclear:
            text = f"{unclear[0]}: no split in its name; rename it to train-{unclear[0].name}"
            return [Problem("parquet", "train", text)]
    return []


def innermost(root: Path) -> Path:
    """The folder that holds class folders: `root`, or below it if each folder has nothing but one folder of folders."""
    content = Contents.of(root)
    if len(content.folders) == 1 and not content.images and not content.class_tars():
        inner = Contents.of(content.folders[0])
        if not inner.images and (inner.class_tars() or any(has_image(folder) for folder in inner.folders)):
            return innermost(inner.folder)
    return root


def find_without_split(root: Path, findings: Findings) -> None:
    """Adds the part for a folder that is itself a split: class folders, class tars or images without a split folder."""
    here, place = Contents.of(root), _place(root)
    split = split_of_folder(root.resolve().name) or "train"
    folders = [folder for folder in here.folders if folder.name.lower() != "test"]
    if any(has_image(folder) for folder in folders):
        part = class_folders(split, folders, [root], place)
        note = f"{part.what} itself, which has no folder for a split"
        siblings = [f for f in folders_in(root.resolve().parent) if split_of_folder(f.name) == _other(split)]
        if split_of_folder(root.resolve().name) and siblings:
            note += f" ({siblings[0].name} is beside it: give the folder above as SOURCE to read both)"
        findings.add(replace(part, what=note))
    elif tars := here.class_tars():
        findings.add(class_tars(split, tars, [root], place.relative([root])))
    elif here.images:
        findings.add(_flat(split, here, place))


def find_packed(root: Path, findings: Findings) -> None:
    """Adds problems for archives that seem to hold a split, or some of its tars, which cannot be read."""
    given = {part.split: part.layout for part in findings.parts}
    for content in (Contents.of(root), Contents.of(root / "data")):
        for path in content.archives():
            split = split_in_file(path.name) or ("train" if not given else None)
            if split in SPLITS and given.get(str(split), "webdataset") == "webdataset":
                findings.add(_packed(str(split), path, always=str(split) in given))


def _packed(split: str, path: Path, always: bool = False) -> Problem:
    """The problem of an archive that must be unpacked first."""
    if path.suffix.lower() in (".zip", ".7z", ".rar"):
        tool = {".zip": "unzip", ".7z": "7z x", ".rar": "unrar x"}[path.suffix.lower()]
        fix = f"unpack it there: {tool} {path.name}"
    else:
        fix = f"decompress it to a .tar, which is then read in place: gunzip {path.name}"
        if not re.search(r"\.(tar\.gz|tgz)$", path.name, re.IGNORECASE):
            fix = f"unpack it there: tar -xf {path.name}"
    return Problem("webdataset", split, f"{path}: packed, so its images cannot be read in place; {fix}", always)


def _other(split: str) -> str:
    return "train" if split == "val" else "val"
