"""Writes the synthetic dataset in ILSVRC2012's own file formats, for use when ImageNet is not at hand.

In: `SampleSettings`. Out, in one folder:

    ILSVRC2012_img_train.tar          one tar per class, members n01234567_1.JPEG
    ILSVRC2012_img_val.tar            flat, classes shuffled
    ILSVRC2012_devkit_t12.tar.gz      meta.mat and the validation ground truth
    sample.json                       settings, counts, classes, and the training key of each irregular file

An image is a pure function of (seed, split, class, index), so the same settings give the same bytes with any number of
workers. As in ImageNet, some training files are not upright RGB JPEGs: see IRREGULAR_FILES. One of them is truncated
and cannot be decoded.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from contextlib import ExitStack
from dataclasses import asdict
from itertools import repeat
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from scipy import io as matlab

from pipeline.files import published, remove_temporary
from pipeline.imagenet.ilsvrc import DEVKIT, TRAIN_TAR, VAL_TAR
from pipeline.synthetic.drawing import class_words, draw_image
from pipeline.synthetic.settings import SampleSettings
from pipeline.workers import ProgressCallback, Workers

RECORD_NAME = "sample.json"
SAMPLE_FORMAT = 1  # version of images and files; raise it when the same settings give other bytes
SEED_TRAIN, SEED_VAL, SEED_WHOLE_SET = 0, 1, 2  # second word of every random seed
INNER_WNID = "n90000000"  # sorts before the wnids of all classes
IRREGULAR_FILES = ("greyscale", "cmyk", "png", "exif_rotated", "truncated")  # one training file of each kind
EXIF_ORIENTATION, EXIF_TURN_CLOCKWISE = 0x0112, 6


def already_made(out: Path, settings: SampleSettings) -> bool:
    """Whether `out` holds the dataset with these settings; False if it holds none of its files.

    Raises:
        ValueError: `out` holds a file of one of these names from elsewhere, such as the real ImageNet.
    """
    found = [name for name in (TRAIN_TAR, VAL_TAR, DEVKIT, RECORD_NAME) if (out / name).exists()]
    if not found:
        return False
    try:
        record = json.loads((out / RECORD_NAME).read_text())
        is_ours = (record["format"], record["settings"]) == (SAMPLE_FORMAT, asdict(settings))
        same_sizes = is_ours and all((out / name).stat().st_size == size for name, size in record["bytes"].items())
    except (OSError, ValueError, KeyError, TypeError):
        same_sizes = False
    if not same_sizes:
        raise ValueError(
            f"{out} holds {', '.join(found)}, not made with these settings; name another folder or move them away"
        )
    return True


def make_sample(out: Path, settings: SampleSettings, workers: Workers, progress: ProgressCallback) -> None:
    """Draws the dataset into the folder `out`. Does nothing if it is already there.

    Args:
        out: The folder; it is created if necessary.
        settings: What to draw.
        workers: Draw the images, one class per job.
        progress: Called with the number of images drawn since the last call.

    Raises:
        ValueError: As `already_made`.
    """
    if already_made(out, settings):
        return
    out.mkdir(parents=True, exist_ok=True)
    remove_temporary(out)
    with ExitStack() as stack:
        # An exit stack closes in reverse order, so the record is published last: a folder with it is complete.
        record_file = stack.enter_context(published(out / RECORD_NAME))
        files = {name: stack.enter_context(published(out / name)) for name in (TRAIN_TAR, VAL_TAR, DEVKIT)}
        val_labels = _val_labels(settings)
        val_files = _write_train_tar(files[TRAIN_TAR], settings, workers, progress)
        _write_val_tar(files[VAL_TAR], val_labels, val_files)
        files[DEVKIT].write(_devkit(settings, val_labels))
        record = _record(settings, {name: file.tell() for name, file in files.items()})
        record_file.write((json.dumps(record, indent=2) + "\n").encode())


def _write_train_tar(
    file: IO[bytes], settings: SampleSettings, workers: Workers, progress: ProgressCallback
) -> list[list[bytes]]:
    """Writes the training tar, and returns each class's validation files, which are drawn in the same job."""
    wnids = class_wnids(settings)
    val_files: list[list[bytes]] = []
    with _open_tar(file) as tar:
        drawn = workers.map(_draw_class, repeat(settings), range(settings.classes))
        for label, (class_tar, val_of_class) in enumerate(drawn):
            _add(tar, f"{wnids[label]}.tar", class_tar)
            val_files.append(val_of_class)
            progress(settings.train_images + settings.val_images)
    return val_files


def _write_val_tar(file: IO[bytes], val_labels: list[int], val_files: list[list[bytes]]) -> None:
    """Writes the validation tar: image n has label `val_labels[n - 1]`. Takes the files out of `val_files`."""
    with _open_tar(file) as tar:
        for number, label in enumerate(val_labels, start=1):
            _add(tar, f"ILSVRC2012_val_{number:08}.JPEG", val_files[label].pop())


def _record(settings: SampleSettings, file_bytes: dict[str, int]) -> dict[str, Any]:
    """The content of sample.json."""
    wnids = class_wnids(settings)
    irregular = _irregular_files(settings)
    return {
        "format": SAMPLE_FORMAT,
        "settings": asdict(settings),
        "counts": {"train": settings.classes * settings.train_images, "val": settings.classes * settings.val_images},
        "classes": [{"wnid": wnid, "words": class_words(label)} for label, wnid in enumerate(wnids)],
        "oddities": {kind: f"{wnids[label]}_{index + 1}" for (label, index), kind in irregular.items()},
        "bytes": file_bytes,
    }


def class_wnids(settings: SampleSettings) -> list[str]:
    """Invented WordNet ids, sorted, so that the position is the label. Real WordNet ids never begin with n9."""
    rng = np.random.default_rng([settings.seed, SEED_WHOLE_SET, 0])
    return [f"n{90_000_001 + offset}" for offset in sorted(rng.choice(9_999_999, settings.classes, replace=False))]


def contact_sheet(settings: SampleSettings, columns: int = 8, tile: int = 112) -> Image.Image:
    """An overview image with one row per class: its words, then its first training images.

    Args:
        settings: The dataset.
        columns: Images per class.
        tile: Side of the square to which each image is cropped, in pixels.
    """
    label_width = tile * 8 // 5
    sheet = Image.new("RGB", (label_width + columns * tile, settings.classes * tile), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=tile / 7)
    for label in range(settings.classes):
        pen.text((tile / 10, (label + 0.5) * tile), class_words(label).split(",")[0], "black", font, anchor="lm")
        for index in range(min(columns, settings.train_images)):
            image, _ = _image(settings, SEED_TRAIN, label, index)
            square = ImageOps.fit(image, (tile, tile), Image.Resampling.BOX)
            sheet.paste(square, (label_width + index * tile, label * tile))
    return sheet


def _draw_class(settings: SampleSettings, label: int) -> tuple[bytes, list[bytes]]:
    """Draws one class. Returns the tar of its training files, and its validation files."""
    wnid, irregular = class_wnids(settings)[label], _irregular_files(settings)
    class_tar = io.BytesIO()
    with _open_tar(class_tar) as tar:
        for index in range(settings.train_images):
            encoded = _encode(*_image(settings, SEED_TRAIN, label, index), irregular.get((label, index)))
            _add(tar, f"{wnid}_{index + 1}.JPEG", encoded)
    val_files = [_encode(*_image(settings, SEED_VAL, label, index)) for index in range(settings.val_images)]
    return class_tar.getvalue(), val_files


def _image(settings: SampleSettings, split: int, label: int, index: int) -> tuple[Image.Image, np.random.Generator]:
    """The image, and the generator that drew it, from which `_encode` goes on to draw."""
    rng = np.random.default_rng([settings.seed, split, label, index])
    return Image.fromarray(draw_image(label, settings.min_side, settings.max_side, rng)), rng


def _encode(image: Image.Image, rng: np.random.Generator, irregular: str | None = None) -> bytes:
    """A JPEG with a quality that cameras and web sites use, mostly 4:2:0; or the `irregular` kind of file."""
    options: dict[str, Any] = {
        "format": "JPEG",
        "quality": int(rng.integers(85, 96)),
        "subsampling": "4:4:4" if rng.random() < 0.2 else "4:2:0",
    }
    if irregular == "greyscale":
        image = image.convert("L")
    elif irregular == "cmyk":
        image = image.convert("CMYK")
    elif irregular == "png":
        options = {"format": "PNG"}
    elif irregular == "exif_rotated":
        image = image.transpose(Image.Transpose.ROTATE_90)
        options["exif"] = Image.Exif()
        options["exif"][EXIF_ORIENTATION] = EXIF_TURN_CLOCKWISE
    file = io.BytesIO()
    image.save(file, **options)
    encoded = file.getvalue()
    return encoded[: len(encoded) // 2] if irregular == "truncated" else encoded


def _irregular_files(settings: SampleSettings) -> dict[tuple[int, int], str]:
    """(label, index) of a training image -> the kind of irregular file that it is."""
    rng = np.random.default_rng([settings.seed, SEED_WHOLE_SET, 1])
    chosen = rng.choice(settings.classes * settings.train_images, len(IRREGULAR_FILES), replace=False)
    return {divmod(int(n), settings.train_images): kind for n, kind in zip(chosen, IRREGULAR_FILES, strict=True)}


def _val_labels(settings: SampleSettings) -> list[int]:
    """The label of every validation image, in the order of their numbers."""
    rng = np.random.default_rng([settings.seed, SEED_WHOLE_SET, 2])
    labels: list[int] = rng.permutation(np.repeat(np.arange(settings.classes), settings.val_images)).tolist()
    return labels


def _ilsvrc_id(label: int, classes: int) -> int:
    """The ILSVRC2012_ID of a label, 1 to `classes`. As in the real devkit, its order is not that of sorted wnids."""
    return (label + 1) % classes + 1


def _devkit(settings: SampleSettings, val_labels: list[int]) -> bytes:
    """The content of the devkit's .tar.gz."""
    ground_truth = "".join(f"{_ilsvrc_id(label, settings.classes)}\n" for label in val_labels)
    file = io.BytesIO()
    with _open_tar(file) as tar:
        _add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", ground_truth.encode())
        _add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", _meta_mat(settings))
    return gzip.compress(file.getvalue(), mtime=0)


def _meta_mat(settings: SampleSettings) -> bytes:
    """The content of meta.mat: struct array `synsets` with the classes by ILSVRC2012_ID, then their common parent."""
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
    header = b"MATLAB 5.0 MAT-file".ljust(116)  # replaces a header that holds the time of writing
    return header + file.getvalue()[len(header) :]


def _open_tar(file: IO[bytes]) -> tarfile.TarFile:
    return tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Adds a member with mode 0644, owner 0 and time 0."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
