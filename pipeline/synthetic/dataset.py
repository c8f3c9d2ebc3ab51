"""A small set of drawn pictures in ILSVRC2012's own files, for when ImageNet is not at hand.

In: SampleSettings. Out, in one folder: `ILSVRC2012_img_train.tar` (one tar per class, members `n01234567_1.JPEG`),
`ILSVRC2012_img_val.tar` (flat, classes shuffled), `ILSVRC2012_devkit_t12.tar.gz` (`meta.mat` and the validation ground
truth) and `sample.json` (settings, counts, classes, which training key is which oddity). Same settings, same bytes,
with any number of workers: a picture is a pure function of (seed, split, class, index).

As in ImageNet, not every training file is a three-channel, upright, whole JPEG: see ODDITIES. The truncated one must
be refused by whoever decodes it.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from scipy import io as matlab

from pipeline.imagenet.ilsvrc import DEVKIT, TRAIN_TAR, VAL_TAR
from pipeline.synthetic.drawing import MAX_CLASSES, class_words, draw
from pipeline.workers import Workers

RECORD = "sample.json"
FORMAT = 1  # of the pictures and the files; raise it when the same settings come to mean other bytes
TRAIN, VAL, WHOLE_SET = 0, 1, 2  # second word of every random seed
INNER_WNID = "n90000000"  # before those of all classes
ODDITIES = ("greyscale", "cmyk", "png", "exif_rotated", "truncated")
EXIF_ORIENTATION, TURN_CLOCKWISE_TO_VIEW = 0x0112, 6


@dataclass(frozen=True)
class SampleSettings:
    """What to draw: images per class, sides in pixels; checked on construction (ValueError)."""

    classes: int = 12
    train_images: int = 150
    val_images: int = 30
    min_side: int = 150
    max_side: int = 600
    seed: int = 2012

    def __post_init__(self) -> None:
        if not 2 <= self.classes <= MAX_CLASSES:
            raise ValueError(f"classes is {self.classes}; choose 2 to {MAX_CLASSES}")
        if self.val_images < 1 or self.classes * self.train_images < 8:
            raise ValueError(
                f"{self.train_images} train and {self.val_images} val images for each of {self.classes} classes; "
                f"choose at least 8 train images altogether and 1 val image per class"
            )
        if not 32 <= self.min_side <= self.max_side:
            raise ValueError(f"sides of {self.min_side} to {self.max_side} pixels; choose 32 <= min_side <= max_side")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; choose 0 or more")

    @property
    def images(self) -> int:
        """Images of both splits."""
        return self.classes * (self.train_images + self.val_images)


def already_made(out: Path, settings: SampleSettings) -> bool:
    """True if the folder holds this very sample, False if it holds none of its files.

    Raises ValueError for anything else, so that nobody's ImageNet is ever overwritten.
    """
    found = [name for name in (TRAIN_TAR, VAL_TAR, DEVKIT, RECORD) if (out / name).exists()]
    if not found:
        return False
    try:
        record = json.loads((out / RECORD).read_text())
        is_ours = (record["format"], record["settings"]) == (FORMAT, asdict(settings))
        same_sizes = is_ours and all((out / name).stat().st_size == size for name, size in record["bytes"].items())
    except (OSError, ValueError, KeyError, TypeError):
        same_sizes = False
    if not same_sizes:
        raise ValueError(
            f"{out} holds {', '.join(found)}, not made with these settings; name another folder or move them away"
        )
    return True


def make_sample(out: Path, settings: SampleSettings, workers: Workers, progress: Callable[[int], None]) -> None:
    """Draws the set into the folder `out`; does nothing if it is already there.

    `progress` is called with the number of images newly drawn. Raises ValueError as `already_made` does.
    """
    if already_made(out, settings):
        return
    out.mkdir(parents=True, exist_ok=True)
    partial = {name: out / f".{name}.partial" for name in (TRAIN_TAR, VAL_TAR, DEVKIT, RECORD)}
    wnids = class_wnids(settings)

    val_files: list[list[bytes]] = []
    with _open_tar(partial[TRAIN_TAR]) as train_tar:
        drawn = workers.map(_draw_class, repeat(settings), range(settings.classes))
        for label, (class_tar, val_of_class) in enumerate(drawn):
            _add(train_tar, f"{wnids[label]}.tar", class_tar)
            val_files.append(val_of_class)
            progress(settings.train_images + settings.val_images)

    val_labels = _val_labels(settings)
    with _open_tar(partial[VAL_TAR]) as val_tar:
        for position, label in enumerate(val_labels, start=1):
            _add(val_tar, f"ILSVRC2012_val_{position:08}.JPEG", val_files[label].pop())
    partial[DEVKIT].write_bytes(_devkit(settings, val_labels))

    record = {
        "format": FORMAT,
        "settings": asdict(settings),
        "counts": {"train": settings.classes * settings.train_images, "val": len(val_labels)},
        "classes": [{"wnid": wnid, "words": class_words(label)} for label, wnid in enumerate(wnids)],
        "oddities": {kind: f"{wnids[label]}_{index + 1}" for (label, index), kind in _oddities(settings).items()},
        "bytes": {name: partial[name].stat().st_size for name in (TRAIN_TAR, VAL_TAR, DEVKIT)},
    }
    partial[RECORD].write_text(json.dumps(record, indent=2) + "\n")
    for name, path in partial.items():  # the record last
        path.rename(out / name)


def class_wnids(settings: SampleSettings) -> list[str]:
    """Invented WordNet ids, sorted, so that position = label. WordNet's own never begin with n9."""
    rng = np.random.default_rng([settings.seed, WHOLE_SET, 0])
    return [f"n{90_000_001 + offset}" for offset in sorted(rng.choice(9_999_999, settings.classes, replace=False))]


def contact_sheet(settings: SampleSettings, columns: int = 8, tile: int = 112) -> Image.Image:
    """A row per class: its words, then its first training pictures, cropped to squares of `tile` pixels."""
    label_width = tile * 8 // 5
    sheet = Image.new("RGB", (label_width + columns * tile, settings.classes * tile), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=tile / 7)
    for label in range(settings.classes):
        pen.text((tile / 10, (label + 0.5) * tile), class_words(label).split(",")[0], "black", font, anchor="lm")
        for index in range(min(columns, settings.train_images)):
            picture, _ = _picture(settings, TRAIN, label, index)
            square = ImageOps.fit(picture, (tile, tile), Image.Resampling.BOX)
            sheet.paste(square, (label_width + index * tile, label * tile))
    return sheet


def _draw_class(settings: SampleSettings, label: int) -> tuple[bytes, list[bytes]]:
    """One class: the tar of its training files, and its validation files."""
    wnid, oddities = class_wnids(settings)[label], _oddities(settings)
    class_tar = io.BytesIO()
    with _open_tar(class_tar) as tar:
        for index in range(settings.train_images):
            encoded = _encode(*_picture(settings, TRAIN, label, index), oddities.get((label, index)))
            _add(tar, f"{wnid}_{index + 1}.JPEG", encoded)
    val_files = [_encode(*_picture(settings, VAL, label, index)) for index in range(settings.val_images)]
    return class_tar.getvalue(), val_files


def _picture(settings: SampleSettings, split: int, label: int, index: int) -> tuple[Image.Image, np.random.Generator]:
    """The picture, and the generator that drew it, for what is still to choose."""
    rng = np.random.default_rng([settings.seed, split, label, index])
    return Image.fromarray(draw(label, settings.min_side, settings.max_side, rng)), rng


def _encode(picture: Image.Image, rng: np.random.Generator, oddity: str | None = None) -> bytes:
    """JPEG of a quality such as cameras and web sites use, mostly 4:2:0; or the oddity asked for."""
    options: dict[str, Any] = {
        "format": "JPEG",
        "quality": int(rng.integers(85, 96)),
        "subsampling": "4:4:4" if rng.random() < 0.2 else "4:2:0",
    }
    if oddity == "greyscale":
        picture = picture.convert("L")
    elif oddity == "cmyk":
        picture = picture.convert("CMYK")
    elif oddity == "png":
        options = {"format": "PNG"}
    elif oddity == "exif_rotated":
        picture = picture.transpose(Image.Transpose.ROTATE_90)
        options["exif"] = Image.Exif()
        options["exif"][EXIF_ORIENTATION] = TURN_CLOCKWISE_TO_VIEW
    file = io.BytesIO()
    picture.save(file, **options)
    encoded = file.getvalue()
    return encoded[: len(encoded) // 2] if oddity == "truncated" else encoded


def _oddities(settings: SampleSettings) -> dict[tuple[int, int], str]:
    """Which training pictures, by (label, index), are which oddity."""
    rng = np.random.default_rng([settings.seed, WHOLE_SET, 1])
    chosen = rng.choice(settings.classes * settings.train_images, len(ODDITIES), replace=False)
    return {divmod(int(n), settings.train_images): kind for n, kind in zip(chosen, ODDITIES, strict=True)}


def _val_labels(settings: SampleSettings) -> list[int]:
    """Label of every validation image, in file order."""
    rng = np.random.default_rng([settings.seed, WHOLE_SET, 2])
    labels: list[int] = rng.permutation(np.repeat(np.arange(settings.classes), settings.val_images)).tolist()
    return labels


def _ilsvrc_id(label: int, classes: int) -> int:
    """1 to classes. As in the real devkit the order is not that of the sorted wnids: here it is off by one."""
    return (label + 1) % classes + 1


def _devkit(settings: SampleSettings, val_labels: list[int]) -> bytes:
    """The devkit as .tar.gz."""
    ground_truth = "".join(f"{_ilsvrc_id(label, settings.classes)}\n" for label in val_labels)
    file = io.BytesIO()
    with _open_tar(file) as tar:
        _add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", ground_truth.encode())
        _add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", _meta_mat(settings))
    return gzip.compress(file.getvalue(), mtime=0)


def _meta_mat(settings: SampleSettings) -> bytes:
    """`meta.mat`: struct array `synsets`, the classes by ILSVRC2012_ID, then one inner node above them all."""
    wnids = class_wnids(settings)
    ids = [_ilsvrc_id(label, settings.classes) for label in range(settings.classes)]
    rows: list[dict[str, Any]] = [
        {
            "ILSVRC2012_ID": ids[label],
            "WNID": wnids[label],
            "words": class_words(label),
            "gloss": f"an invented thing: a {class_words(label).split(',')[0]}",
            "num_children": 0,
            "children": np.zeros((1, 0), np.uint16),
            "wordnet_height": 0,
            "num_train_images": settings.train_images,
        }
        for label in np.argsort(ids)
    ]
    rows.append(
        {
            "ILSVRC2012_ID": settings.classes + 1,
            "WNID": INNER_WNID,
            "words": "invented thing",
            "gloss": "a thing with a shape and a pattern",
            "num_children": settings.classes,
            "children": np.array([sorted(ids)], np.uint16),
            "wordnet_height": 1,
            "num_train_images": 0,
        }
    )
    synsets = np.empty((len(rows), 1), dtype=[(name, object) for name in rows[0]])
    for row, values in enumerate(rows):
        synsets[row, 0] = tuple(values.values())
    file = io.BytesIO()
    matlab.savemat(file, {"synsets": synsets})
    header = b"MATLAB 5.0 MAT-file".ljust(116)  # in place of one with the time of writing
    return header + file.getvalue()[len(header) :]


def _open_tar(file: Path | io.BytesIO) -> tarfile.TarFile:
    if isinstance(file, Path):
        return tarfile.open(file, "w", format=tarfile.USTAR_FORMAT)
    return tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Adds a file of mode 0644, owner 0 and time 0."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
