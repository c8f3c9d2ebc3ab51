"""The tables of Kaggle's "ImageNet Object Localization Challenge", for the layout `kaggle`.

    ILSVRC/Data/CLS-LOC/train/<wnid>/*.JPEG   training images by class
    ILSVRC/Data/CLS-LOC/val/*.JPEG            validation images in one folder, or sorted into class folders
    LOC_val_solution.csv                      the class of each validation image
    LOC_synset_mapping.txt                    wnid and words of each class; optional

CLS-LOC/test has no public classes and is ignored.
"""

from __future__ import annotations

import csv
from pathlib import Path

from pipeline.imagenet.entries import text_of

IMAGES = Path("ILSVRC") / "Data" / "CLS-LOC"
SOLUTION = "LOC_val_solution.csv"
MAPPING = "LOC_synset_mapping.txt"
EXPECTED = f"{IMAGES}/train/<wnid>/*.JPEG with {SOLUTION}"


def kaggle_images(root: Path) -> Path | None:
    """The folder of the split folders, if `root` is that of the challenge or its subfolder ILSVRC."""
    return next((p for p in (root / IMAGES, root / Path(*IMAGES.parts[1:])) if p.is_dir()), None)


def read_solution(path: Path) -> dict[str, str]:
    """Image name -> wnid.

    The wnid is the first word of PredictionString, `n01751748 111 108 230 230 ...`; the numbers are a bounding box. An
    image without a class is left out.
    """
    rows = csv.DictReader(text_of(path).splitlines())
    if not {"ImageId", "PredictionString"} <= set(rows.fieldnames or ()):
        raise ValueError(f"{path}: begins with {rows.fieldnames}, expected ImageId,PredictionString; download it again")
    words_of = {row["ImageId"]: (row["PredictionString"] or "").split() for row in rows}
    wnid_of = {name: words[0] for name, words in words_of.items() if words}
    if not wnid_of:
        raise ValueError(f"{path}: line 2 has no class, nor has any other; download it again")
    return wnid_of


def read_mapping(path: Path) -> dict[str, str]:
    """Wnid -> words, from lines such as `n01440764 tench, Tinca tinca`; empty if there is no such file."""
    if not path.is_file():
        return {}
    lines = (line.strip().partition(" ") for line in text_of(path).splitlines())
    return {wnid: words.strip() or wnid for wnid, _, words in lines if wnid}
