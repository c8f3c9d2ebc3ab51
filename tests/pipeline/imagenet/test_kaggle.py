"""Layout `kaggle`: classes without the mapping, and files that do not fit each other."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.imagenet.source import open_source
from tests.pipeline.imagenet.layout_files import WNIDS, error_of


def edit(path: Path, old: str, new: str) -> None:
    """Replaces `old`, which must be there, in a text file."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_without_the_mapping_a_class_is_its_wnid_in_both_splits(roots: Callable[[str], Path], tmp_path: Path):
    """The classes are those of training folders and solution together, so that labels agree."""
    root = shutil.copytree(roots("kaggle"), tmp_path / "copy")
    (root / "LOC_synset_mapping.txt").unlink()
    shutil.rmtree(root / "ILSVRC/Data/CLS-LOC/train" / WNIDS[0])
    edit(root / "LOC_val_solution.csv", WNIDS[1], WNIDS[2])
    train, val = (open_source(root).listing(split) for split in ("train", "val"))
    assert train.classes == val.classes
    assert [(c.wnid, c.words) for c in val.classes] == [(wnid, wnid) for wnid in sorted(WNIDS)]
    assert sorted(set(train.items.label.tolist())) == [1, 2, 3]


VAL_1 = "ILSVRC2012_val_00000001"
WRONG_KAGGLE: dict[str, Callable[[Path], object]] = {
    "LOC_val_solution.csv: missing; it has the classes of val; put it there": lambda r: (
        r / "LOC_val_solution.csv"
    ).unlink(),
    "begins with ['ImageId', 'Prediction'], expected ImageId,PredictionString": lambda r: edit(
        r / "LOC_val_solution.csv", "PredictionString", "Prediction"
    ),
    "LOC_val_solution.csv: line 2 has no class": lambda r: (r / "LOC_val_solution.csv").write_text(
        f"ImageId,PredictionString\n{VAL_1},\n"
    ),
    "train/n12345678: no class of LOC_synset_mapping.txt": lambda r: (
        r / "ILSVRC/Data/CLS-LOC/train/n12345678"
    ).mkdir(),
}
UNUSABLE: dict[str, Callable[[Path], object]] = {
    "no line of LOC_val_solution.csv names it": lambda r: edit(
        r / "LOC_val_solution.csv", VAL_1, "ILSVRC2012_val_00000002"
    ),
    "LOC_val_solution.csv names it, but there is no such file": lambda r: (
        r / f"ILSVRC/Data/CLS-LOC/val/{VAL_1}.JPEG"
    ).unlink(),
    "no class n12345678 in the source's list of 4 classes": lambda r: edit(
        r / "LOC_val_solution.csv",
        f"{VAL_1},{_class_of_val_1(r)}",
        f"{VAL_1},n12345678",
    ),
}


def _class_of_val_1(root: Path) -> str:
    text = (root / "LOC_val_solution.csv").read_text()
    return next(wnid for wnid in WNIDS if f"{VAL_1},{wnid}" in text)


@pytest.mark.parametrize("reason", UNUSABLE)
def test_an_image_that_does_not_fit_is_not_an_item(reason: str, roots: Callable[[str], Path], tmp_path: Path):
    """It is unusable, with a reason, and the other images are listed."""
    root = shutil.copytree(roots("kaggle"), tmp_path / "copy")
    UNUSABLE[reason](root)
    listing = open_source(root).listing("val")
    assert [(image.key, image.reason.partition(";")[0]) for image in listing.unusable] == [(VAL_1, reason)]
    assert len(listing.items) == len(open_source(roots("kaggle")).listing("val").items) - 1


@pytest.mark.parametrize("message", WRONG_KAGGLE)
def test_a_file_that_does_not_fit_is_named(message: str, roots: Callable[[str], Path], tmp_path: Path):
    """Images, solution and mapping must agree."""
    root = shutil.copytree(roots("kaggle"), tmp_path / "copy")
    WRONG_KAGGLE[message](root)
    assert message in error_of(root, "val")


def test_an_empty_class_folder_is_a_class_without_images(roots: Callable[[str], Path], tmp_path: Path):
    """It may be the rest of an interrupted download. The plan names it."""
    root = shutil.copytree(roots("kaggle"), tmp_path / "copy")
    for path in (root / "ILSVRC/Data/CLS-LOC/train" / WNIDS[0]).iterdir():
        path.unlink()
    source = open_source(root)
    listing = source.listing("train")
    assert listing.classes_without_images() == [WNIDS[0]]
    assert f"  classes without images: 1 ({WNIDS[0]})" in source.plan([listing])
