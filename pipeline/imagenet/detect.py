"""Looks at everything in a folder: finds for each split every way to read it, and what looks like a split but is not.

`find` gives all parts and problems; `source.py` decides between them. Detection reads names only, except that it looks
for one image in each class folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.imagenet.annotations import find_file_classes, missing_classes
from pipeline.imagenet.contents import Contents
from pipeline.imagenet.devkit import number_of
from pipeline.imagenet.entries import (
    folders_in,
    has_image,
    ignored,
    is_dangling,
    sorted_entries,
)
from pipeline.imagenet.folders import Place, class_folders, flat_images
from pipeline.imagenet.ilsvrc import class_tars, image_tars
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
    split_word,
)
from pipeline.imagenet.unreadable import problem_of
from pipeline.imagenet.webdataset import webdataset_part

WRAPPERS = frozenset({"images", "image", "imgs", "data", "jpegimages"})  # folders around class folders or images
WNID_FOLDER = re.compile(r"n\d{8}")
FEW_FILES = 0.01  # share of images beside class folders that is skipped rather than refused
SAMPLE_NAMES = 100  # file names that are looked at to find out how images are named


def find(root: Path, names: ColumnNames) -> Findings:
    """All parts and problems in a folder and in the folders of splits in it."""
    place = _place(root)
    findings = Findings()
    inside: dict[str, list[Path]] = {}
    for folder in folders_in(place.images):
        if split := split_of_folder(folder.name):
            inside.setdefault(split, []).append(folder)
    findings.add(*_no_folders(place, inside))
    for split in SPLITS:
        if split not in inside and (folders := _folders_with_word(split, place.images, bool(inside))):
            inside[split] = folders
    for split, folders in inside.items():
        findings.add(*_in_split_folders(split, folders, place, names))
    here = Contents.of(root)
    for split in SPLITS:
        by_name = [path for path in here.shards() if split_in_file(path.name) == split]
        findings.add(*image_tars(split, here.files, by_name, [root, *folders_in(root)]))
    findings.add(*_shards_by_name(here, place, findings), *_parquet_by_name(here, place, names, findings))
    if findings.parts:
        findings.add(*_unnamed_splits(place, findings, inside))
    return findings


def _folders_with_word(split: str, folder: Path, beside_others: bool) -> list[Path]:
    """The folders that have the split as a word in their names, such as `val_sorted`, and seem to hold a split.

    Without a split folder beside them they need class folders, tars or parquet files: a class may be a bullet train.
    """
    found = []
    for path in folders_in(folder):
        if split_of_folder(path.name) is None and split_word(path.name) == split:
            content = Contents.of(path)
            packed = content.class_tars() or content.shards() or content.parquet()
            if packed or any(map(has_image, content.folders)) or (beside_others and content.images):
                found.append(path)
    return found


def _unnamed_splits(place: Place, findings: Findings, inside: Mapping[str, Sequence[Path]]) -> Iterator[Problem]:
    """Problems for folders that hold class folders as the one split does, if nothing gives the other split."""
    seen = {part.split for part in findings.parts} | {problem.split for problem in findings.problems}
    missing = next((split for split in SPLITS if split not in seen), None)
    if missing is None or not inside:
        return
    splits = [path for paths in inside.values() for path in paths]
    classes = [folder for path in splits for folder in folders_in(_unwrapped("", path))]
    names, read = {folder.name for folder in classes}, {path.resolve() for path in (*splits, *classes)}
    for path in folders_in(place.images):
        inner = folders_in(path)
        if not read.isdisjoint(folder.resolve() for folder in (path, *inner)):  # read already, perhaps by links
            continue
        if split_word(path.name) == _other(missing) or (missing == "train" and path.name.lower() == "test"):
            continue
        if any(folder.name in names and has_image(folder) for folder in inner):
            text = f"{path}: class folders like those of {_other(missing)}, but nothing is named {missing}; rename it"
            fix = f"to {missing} if it is that split, or use --split {_other(missing)}"
            yield Problem(place.layout, missing, f"{text} {fix}")


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
    has_classes = any(has_image(folder) for folder in classes)
    contents = _contents(inside, () if has_classes else classes)
    where = place.relative(inside)
    found: list[Part | Problem | None] = []
    shards = [path for content in contents for path in content.shards()]
    parquet = [path for content in contents for path in content.parquet()]
    tars = [path for content in contents for path in content.class_tars()]
    if has_classes:
        found += [class_folders(split, classes, inside, place), *_beside_classes(split, classes, contents, tars, place)]
    elif tars:
        found.append(class_tars(split, tars, [place.root, *inside], where))
    elif len(inside) == 1 and contents[0].images:
        found.append(_flat(split, contents[0], place))
    files = [path for content in contents for path in content.files]
    if not has_classes:
        found += image_tars(split, files, shards, [place.root, *inside])
        shards = [path for path in shards if not any(isinstance(f, Part) and path in f.uses for f in found)]
    found += [webdataset_part(split, shards, where), parquet_parts(split, parquet, where, names)]
    if not has_classes:
        found += [problem_of(split, path, always=True) for content in contents for path in content.archives()[:1]]
    if not any(found):
        names_found = ", ".join(sorted(p.name for c in contents for p in (*c.folders, *c.files))[:5])
        text = f"{full[0]}: no image in it or its folders (found {names_found}); expected class folders with images"
        found.append(Problem(place.layout, split, f"{text}, or use --split {_other(split)}"))
    return found


def _contents(inside: Sequence[Path], folders: Sequence[Path]) -> list[Contents]:
    """The contents of split folders, or of the folders in them if only those hold tars or parquet files."""
    contents = [Contents.of(path) for path in inside]
    if not any(content.shards() or content.parquet() or content.images for content in contents):
        deeper = [Contents.of(path) for path in folders]
        if any(content.shards() or content.parquet() for content in deeper):
            return deeper
    return contents


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
    if nested := _nested(split, classes):
        return [Problem(place.layout, split, nested, always=True)]
    archives = [path for content in contents for path in content.archives() if re.match(r"n\d{8}\.", path.name)]
    packed = [path for path in (*tars, *archives) if path.name.partition(".")[0] not in full]
    problems = []
    for path in [path for content in contents for path in content.dangling][:1]:
        text = f"{path}: a link to {os.readlink(path)}, which does not exist; correct it, or remove it"
        problems.append(Problem(place.layout, split, text, always=True))
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


def _nested(split: str, classes: Sequence[Path]) -> str | None:
    """Why class folders seem to be folders of splits or of class folders; None if they do not."""
    if {split_of_folder(path.name) for path in classes} == {"train", "val"}:
        return f"{classes[0].parent}: holds the folders of both splits, not the classes of {split}; move them up"
    for path in classes[:SAMPLE_NAMES]:
        inner = folders_in(path)
        of_classes = inner and all(WNID_FOLDER.fullmatch(folder.name) for folder in inner)
        if of_classes and not WNID_FOLDER.fullmatch(path.name) and not Contents.of(path).images:
            return f"{path}: holds class folders, so it is not a class of {split}; move them into {path.parent}"
    return None


def _unwrapped(split: str, folder: Path) -> Path:
    """The folder that holds the class folders: below `folder` if there is one folder too many (val/val, val/images)."""
    content = Contents.of(folder)
    if len(content.folders) != 1 or content.images or content.shards() or content.class_tars() or content.parquet():
        return folder
    (child,) = content.folders
    inner = folders_in(child)
    wraps = split_of_folder(child.name) == split or child.name.lower() in WRAPPERS
    if wraps or (inner and all(WNID_FOLDER.fullmatch(path.name) for path in inner)):
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
    missing = [split for split in SPLITS if split not in given]
    if given and missing and "webdataset" in given.values() and None in split_of.values():
        path = next(path for path, split in split_of.items() if split is None)
        text = f"{path}: no split in its name, and nothing else gives {missing[0]}; move it into a folder {missing[0]}"
        return [Problem("webdataset", missing[0], f"{text}, or use --split {_other(missing[0])}")]
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
        by_split = {_split_of_source(place.root) or "train": unclear}
    return [webdataset_part(split, tars, place.relative([place.root])) for split, tars in by_split.items()]


def _parquet_by_name(
    here: Contents, place: Place, names: ColumnNames, findings: Findings
) -> list[Part | Problem | None]:
    """The parts for parquet files in the source's folder or in its subfolder data."""
    for content in (here, Contents.of(place.root / "data")):
        files = content.parquet()
        by_split = {split: [path for path in files if parquet_split(path.name) == split] for split in SPLITS}
        where = place.relative([content.folder])
        found: list[Part | Problem | None] = [parquet_parts(s, paths, where, names) for s, paths in by_split.items()]
        unclear = [path for path in files if split_in_file(path.name) is None]
        if unclear and not findings.parts:
            text = f"{unclear[0]}: no split in its name; rename it to train-{unclear[0].name}"
            return [*found, *(Problem("parquet", s, text, any(found)) for s in SPLITS)]
        if any(found):
            return found
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
    split = _split_of_source(root) or "train"
    folders = [folder for folder in here.folders if folder.name.lower() != "test"]
    if any(has_image(folder) for folder in folders):
        if len(folders) > 1 and (nested := _nested(split, folders)):
            findings.add(Problem(place.layout, split, f"{nested}, or run make_shards.py with it as SOURCE"))
            return
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


def _split_of_source(root: Path) -> str | None:
    """The split that the name of the source's folder means, such as `imagenetv2-format-val`; None if it means none."""
    name = root.resolve().name
    word = split_word(name)
    return split_of_folder(name) or (word if word in SPLITS else None)


def _other(split: str) -> str:
    return "train" if split == "val" else "val"
