"""ILSVRC2012's development kit: class names (data/meta.mat) and the validation images' classes (ground truth).

It is read packed or unpacked: ILSVRC2012_devkit_t12.tar.gz, .tar or a folder with data/meta.mat in it.
"""

from __future__ import annotations

import re
from io import BytesIO
from pathlib import Path

import scipy.io

from pipeline.imagenet.entries import sorted_entries
from pipeline.imagenet.listing import ClassName
from pipeline.imagenet.tar_members import DAMAGED, open_tar

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
NAME = re.compile(r"ILSVRC2012_devkit_t12\b.*?(\.tar|\.tar\.gz|\.tgz)?", re.IGNORECASE)
GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"


def find_devkit(*folders: Path) -> Path | None:
    """The development kit in one of `folders`, packed or unpacked; None if there is none."""
    for folder in folders:
        names = [Path(e.path) for e in sorted_entries(folder) if NAME.fullmatch(e.name)]
        found = [p for p in names if p.is_file() or (p / "data" / "meta.mat").is_file() or (p / p.name).is_dir()]
        if found:
            return min(found, key=lambda path: (path.name != DEVKIT, path.name))
        if (folder / "data" / "meta.mat").is_file():
            return folder
    return None


def read_synsets(devkit: Path) -> dict[int, ClassName]:
    """ILSVRC2012_ID -> class, from the devkit's data/meta.mat. Only leaves of the WordNet tree are classes."""
    data = _devkit_file(devkit, "data/meta.mat")
    try:
        synsets = scipy.io.loadmat(BytesIO(data), squeeze_me=True, chars_as_strings=True)["synsets"]
        columns = [synsets[name] for name in ("ILSVRC2012_ID", "WNID", "words", "num_children")]
        if synsets.ndim == 0:  # one class only
            columns = [[column.item()] for column in columns]
        rows = zip(*columns, strict=True)
        return {int(i): ClassName(str(wnid), str(words)) for i, wnid, words, children in rows if not children}
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{devkit}: its data/meta.mat holds no synsets ({error}); download it again") from error


def read_ground_truth(devkit: Path) -> list[str]:
    """The wnid of every validation image, in the order of their numbers."""
    class_of_id = read_synsets(devkit)
    try:
        ids = [int(line) for line in _devkit_file(devkit, GROUND_TRUTH).split()]
    except ValueError as error:
        if str(devkit) in str(error):
            raise
        raise ValueError(f"{devkit}: its {GROUND_TRUTH} is not one number per line; download it again") from error
    if unknown := set(ids) - set(class_of_id):
        raise ValueError(
            f"{devkit}: its ground truth names class {min(unknown)}, but its meta.mat has no such class;"
            " download it again"
        )
    return [class_of_id[i].wnid for i in ids]


def number_of(name: str) -> int | None:
    """The number of a validation image by its name, ILSVRC2012_val_<8 digits>.JPEG; None if it has none."""
    match = re.search(r"_(\d{8})(?=[._]|$)", name)
    return int(match[1]) if match else None


def _devkit_file(devkit: Path, name: str) -> bytes:
    """The devkit's member whose path ends with `name`."""
    if devkit.is_dir():
        for folder in (devkit, devkit / devkit.name):
            if (folder / name).is_file():
                return (folder / name).read_bytes()
    else:
        try:
            with open_tar(devkit) as tar:
                for member in tar:
                    if member.name.endswith(name):
                        file = tar.extractfile(member)
                        assert file is not None
                        return file.read()
        except DAMAGED as error:
            if str(devkit) in str(error):
                raise
            raise ValueError(f"{devkit}: damaged ({error}); download it again") from error
    raise ValueError(f"{devkit}: no {name} in it; expected ILSVRC2012's devkit for tasks 1 and 2, download it again")
