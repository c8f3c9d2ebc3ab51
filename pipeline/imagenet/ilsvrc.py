"""ImageNet as image-net.org distributes it, in tars that stay packed: the layout `ilsvrc`.

    ILSVRC2012_img_train.tar          one tar per class, named by wnid, inside one tar
    ILSVRC2012_img_val.tar            validation images in one tar, numbered
    ILSVRC2012_devkit_t12.tar.gz      class names (data/meta.mat) and validation classes (ground truth)
    train/<wnid>.tar                  or the class tars, after the training tar was unpacked once

Names such as `ILSVRC2012_img_val (1).tar` are recognised, and tars that were made again from class folders are read.
Without the devkit, a class is its wnid, and val needs wnids in its members' names. Items give the byte range of each
image in the outer tar, so an image takes one read, even in a tar inside a tar.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pipeline.imagenet.devkit import DEVKIT as DEVKIT
from pipeline.imagenet.devkit import find_devkit, number_of, read_ground_truth, read_synsets
from pipeline.imagenet.entries import Skipped, ignored_in_path, image_suffixes, member_skip_reason, suffix_of
from pipeline.imagenet.labels import WNID, LabelledImage, Scan, scan_of
from pipeline.imagenet.listing import ClassName
from pipeline.imagenet.parts import Part, Problem, counted
from pipeline.imagenet.tar_members import read_members
from pipeline.imagenet.tar_samples import OneSplit
from pipeline.imagenet.unreadable import why_unreadable

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
EXPECTED = f"{TRAIN_TAR} or {VAL_TAR} with {DEVKIT}"
IMAGE_TAR = re.compile(r"ILSVRC2012_img_(train|val)(?![a-z0-9]).*\.tar", re.IGNORECASE)
CLASS_TAR = re.compile(r"n\d{8}\.tar")


def image_tars(
    split: str, files: Sequence[Path], others: Sequence[Path], folders: Sequence[Path]
) -> list[Part | Problem]:
    """The parts for the image tars of a split.

    Args:
        split: `train` or `val`.
        files: Where to look for the tar by its name.
        others: Tars of the split with any name. If there is one, its members decide whether it is the image tar.
        folders: Where to look for the devkit.
    """
    tars = [p for p in files if (match := IMAGE_TAR.fullmatch(p.name)) and match[1].lower() == split]
    exact = [path for path in tars if path.name in (TRAIN_TAR, VAL_TAR)]
    if tars and len(exact or tars) > 1:
        names = " and ".join(map(str, exact or tars))
        return [Problem("ilsvrc", split, f"{names}: two tars for {split}; move one of them away")]
    if not tars and len(others) == 1 and _is_image_tar(others[0]):
        tars = list(others)
    if not tars:
        return []
    path, devkit = (exact or tars)[0], find_devkit(*folders)
    if split == "val" and devkit is None and _first_label(path) is None:
        text = f"{folders[0] / DEVKIT}: missing; it has the class of each image in {path.name}; put it beside the image"
        return [Problem("ilsvrc", split, f"{text} tars, or use --split train")]
    uses = (path,) if devkit is None else (path, devkit)
    read = _train_scan if split == "train" else _val_scan
    return [
        Part("ilsvrc", split, path.name, uses, lambda: read(path, devkit), lambda _, __, s: _classes(s[split], devkit))
    ]


def class_tars(split: str, tars: Sequence[Path], folders: Sequence[Path], where: str) -> Part:
    """The part for tars that are named by their class, such as n01440764.tar."""
    devkit = find_devkit(*folders)

    def scan() -> Scan:
        skipped = Skipped()
        images = (image for tar in tars for image in _class_images(tar, None, tar.stem, skipped))
        return scan_of(images, skipped, [tar.stem for tar in tars])

    what = f"{counted(len(tars), 'class tar')} in {where}"
    uses = (*tars, devkit) if devkit else tuple(tars)
    return Part("ilsvrc", split, what, uses, scan, lambda _, __, scans: _classes(scans[split], devkit))


def _is_image_tar(path: Path) -> bool:
    """Whether the first member is a class tar, or a validation image without a label or a class in its name."""
    try:
        names = [name for name, _ in zip((name for name, _, _ in read_members(path)), range(2), strict=False)]
    except ValueError:
        return False
    images = [name.rpartition("/")[2].startswith("ILSVRC2012_val_") and _wnid_in(name) is None for name in names]
    same_key = len({name.rpartition("/")[2].partition(".")[0] for name in names}) < len(names)
    return bool(names) and (names[0].endswith(".tar") or (all(images) and not same_key))


def _classes(scan: Scan, devkit: Path | None) -> Mapping[str, ClassName]:
    """The devkit's classes; without a devkit those of the scan."""
    if devkit is None:
        return {label: ClassName(label, label) for label in scan.labels}
    return {name.wnid: name for name in read_synsets(devkit).values()}


def _counts(path: Path, name: str, offset: int, skipped: Skipped) -> bool:
    """Whether a member of a tar is an image; counts it otherwise."""
    reason = member_skip_reason(path, name, offset)
    if reason:
        skipped.add(reason, name)
    return reason is None


def _wnid_in(name: str) -> str | None:
    """The wnid of the folder or of the file in a member's name."""
    *folders, base = name.split("/")
    if folders and re.fullmatch(r"n\d{8}", folders[-1]):
        return folders[-1]
    found = WNID.search(base.partition(".")[0])
    return found[1] if found else None


def _first_label(path: Path) -> str | None:
    """The wnid in the name of the first image of a tar; None if there is none."""
    skipped = Skipped()
    members = (name for name, offset, _ in read_members(path) if _counts(path, name, offset, skipped))
    return next(map(_wnid_in, members), None)


def _class_images(path: Path, within: tuple[int, int] | None, wnid: str, skipped: Skipped) -> Iterator[LabelledImage]:
    """The images of one class tar, which is a file or a member of one."""
    found = False
    for name, offset, size in read_members(path, within):
        if within is not None and suffix_of(name) == ".cls":
            found_inside = f"{wnid}.tar in it holds samples with labels, so it is no class"
            raise ValueError(f"{path}: {found_inside}; unpack the outer tar: tar -xf {path.name}")
        if _counts(path, name, offset, skipped):
            found = True
            yield LabelledImage(name, wnid, path, offset, size)
    if not found:
        what = path if within is None else f"{path}: {wnid}.tar in it"
        raise ValueError(f"{what} holds no image; download it again")


def _train_scan(path: Path, devkit: Path | None) -> Scan:
    """The images of the training tar, class tar by class tar; images in folders named by a wnid are read, too."""
    wnids = None if devkit is None else {name.wnid for name in read_synsets(devkit).values()}
    skipped = Skipped()

    splits = OneSplit(path)

    def images() -> Iterator[LabelledImage]:
        for name, offset, size in read_members(path):
            splits.check(name)
            if ignored_in_path(name):
                skipped.add(str(ignored_in_path(name)), name)
                continue
            if suffix_of(name) not in image_suffixes() and (why := why_unreadable(Path(name))):
                raise ValueError(f"{path}: holds {name}: {why}")
            is_class_tar = name.endswith(".tar")
            wnid = name.removesuffix(".tar").rpartition("/")[2] if is_class_tar else _wnid_in(name)
            if wnids is not None and (is_class_tar or wnid) and wnid not in wnids:
                raise ValueError(f"{path}: holds {name}, which is no class of the devkit; use matching files")
            if is_class_tar and wnid:
                yield from _class_images(path, (offset, size), wnid, skipped)
            elif _counts(path, name, offset, skipped):
                problem = "" if wnid else f"{name} has no wnid in its path; expected class tars or class folders"
                yield LabelledImage(name, wnid, path, offset, size, problem)

    return _not_empty(scan_of(images(), skipped), path)


def _val_scan(path: Path, devkit: Path | None) -> Scan:
    """The images of the validation tar, whose classes are in their names or in the devkit's ground truth."""
    skipped = Skipped()
    wnid_of_number = [] if devkit is None else read_ground_truth(devkit)
    seen: set[int] = set()

    def images() -> Iterator[LabelledImage]:
        for name, offset, size in read_members(path):
            if not _counts(path, name, offset, skipped):
                continue
            number, wnid, problem = number_of(name), _wnid_in(name), ""
            if wnid is None and number and number <= len(wnid_of_number):
                wnid = wnid_of_number[number - 1]
            if wnid is None:
                last = f"{len(wnid_of_number):08d}"
                problem = f"holds {name}, expected ILSVRC2012_val_00000001.JPEG to {last}; download it again"
            elif number in seen:
                wnid, problem = None, f"holds the number of {name} twice; download it again"
            seen.add(number or -len(seen))
            yield LabelledImage(name, wnid, path, offset, size, problem)

    scan = _not_empty(scan_of(images(), skipped), path)
    found = len(scan.items) + len(scan.unusable)
    if wnid_of_number and found != len(wnid_of_number):
        raise ValueError(
            f"{path}: {found} images, but the devkit's ground truth has {len(wnid_of_number)}; use matching files"
        )
    return scan


def _not_empty(scan: Scan, path: Path) -> Scan:
    if not len(scan.items):
        raise ValueError(f"{path}: no image in it; download it again")
    return scan
