"""Writes the images of the sample dataset in every layout; reads listings back; helpers for the layout tests."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import scipy.io

from pipeline.imagenet.ilsvrc import DEVKIT, TRAIN_TAR, VAL_TAR
from pipeline.imagenet.item_reader import ItemReader
from pipeline.imagenet.listing import Listing
from pipeline.imagenet.source import open_source
from pipeline.synthetic.dataset import class_wnids
from pipeline.synthetic.drawing import class_words
from tests.support.shard_fixtures import SAMPLE

WNIDS = class_wnids(SAMPLE)
WORDS = {wnid: class_words(label) for label, wnid in enumerate(WNIDS)}
FOREIGN_ORDER = WNIDS[::-1]  # how other data sets number their labels: not in the order of sorted wnids
Images = dict[str, tuple[str, bytes]]  # key -> (wnid, bytes)

# ---- the expected content, by unpacking ---------------------------------------------------------------------------


def unpacked_train(path: Path) -> Images:
    """The images of a tar of class tars, unpacked with tarfile."""
    found = {}
    with tarfile.open(path) as outer:
        for class_tar in outer:
            file = outer.extractfile(class_tar)
            assert file is not None
            with tarfile.open(fileobj=io.BytesIO(file.read())) as inner:
                for member in inner:
                    content = inner.extractfile(member)
                    assert content is not None
                    found[Path(member.name).stem] = (Path(class_tar.name).stem, content.read())
    return found


def unpacked_val(sample: Path) -> Images:
    """The validation images, with classes by the devkit: line n is the ILSVRC2012_ID of image n."""
    with tarfile.open(sample / VAL_TAR) as tar:
        files = {Path(member.name).stem: tar.extractfile(member).read() for member in tar}
    wnid_of, ground_truth = wnid_of_ilsvrc_id(sample), val_ilsvrc_ids(sample)
    return {key: (wnid_of[ground_truth[int(key[-8:]) - 1]], data) for key, data in files.items()}


def devkit_member(sample: Path, suffix: str) -> bytes:
    """The bytes of the devkit's member whose name ends with `suffix`."""
    with tarfile.open(sample / DEVKIT) as tar:
        return next(tar.extractfile(member).read() for member in tar if member.name.endswith(suffix))


def wnid_of_ilsvrc_id(sample: Path) -> dict[int, str]:
    """ILSVRC2012_ID -> wnid, from the devkit."""
    mat = io.BytesIO(devkit_member(sample, "meta.mat"))
    synsets = scipy.io.loadmat(mat, struct_as_record=False, squeeze_me=True)["synsets"]
    return {int(s.ILSVRC2012_ID): str(s.WNID) for s in synsets}


def val_ilsvrc_ids(sample: Path) -> list[int]:
    """ILSVRC2012_ID of each validation image, from the devkit."""
    return [int(line) for line in devkit_member(sample, "ground_truth.txt").split()]


def images_of(sample: Path) -> dict[str, Images]:
    """Split -> its images."""
    return {"train": unpacked_train(sample / TRAIN_TAR), "val": unpacked_val(sample)}


# ---- a writer per layout ------------------------------------------------------------------------------------------


def tar_of(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """Writes a tar with these (name, content) members in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def file_of(path: Path, data: bytes) -> Path:
    """Writes a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def write_kaggle(root: Path, images: dict[str, Images]) -> None:
    """With the test split, which is to be ignored."""
    for key, (wnid, data) in images["train"].items():
        file_of(root / f"ILSVRC/Data/CLS-LOC/train/{wnid}/{key}.JPEG", data)
    for key, (_, data) in images["val"].items():
        file_of(root / f"ILSVRC/Data/CLS-LOC/val/{key}.JPEG", data)
    file_of(root / "ILSVRC/Data/CLS-LOC/test/ILSVRC2012_test_00000001.JPEG", b"ignored")
    with (root / "LOC_val_solution.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["ImageId", "PredictionString"])
        rows.writerows([key, f"{wnid} 1 2 3 4 {wnid} 5 6 7 8 "] for key, (wnid, _) in images["val"].items())
    (root / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} {words}\n" for wnid, words in WORDS.items()))


def write_parquet_file(path: Path, rows: list[tuple[str | None, int | None, bytes | None]], names: list[str]) -> Path:
    """Writes rows of (path, label, bytes) in row groups of three; class `names` go into the metadata."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    values = [{"bytes": data, "path": name} for name, _, data in rows]
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table({"image": pa.array(values, image), "label": pa.array([label for _, label, _ in rows], pa.int64())})
    feature = {"names": names, "_type": "ClassLabel"}
    info = {"info": {"features": {"image": {"_type": "Image"}, "label": feature}}}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)} if names else None), path, 3)
    return path


def write_parquet(root: Path, images: dict[str, Images]) -> None:
    """Two files a split; labels are positions in FOREIGN_ORDER, with class words in the metadata."""
    for split, name in (("train", "train"), ("val", "validation")):
        rows = [(f"{key}.JPEG", FOREIGN_ORDER.index(wnid), data) for key, (wnid, data) in images[split].items()]
        for number, part in enumerate((rows[:11], rows[11:])):
            names = [WORDS[wnid] for wnid in FOREIGN_ORDER]
            write_parquet_file(root / "data" / f"{name}-{number:05d}-of-00002.parquet", part, names)
    write_parquet_file(root / "data" / "test-00000-of-00001.parquet", [(None, -1, b"ignored")], [])


def write_webdataset(root: Path, images: dict[str, Images]) -> None:
    """Two tars a split; labels are positions in FOREIGN_ORDER; every sample has a field that is to be ignored."""
    for split in ("train", "val"):
        samples = list(images[split].items())
        for number, part in enumerate((samples[:11], samples[11:])):
            members = [
                (f"./{split}/{key}.{kind}", content)
                for key, (wnid, data) in part
                for kind, content in (
                    ("cls", f"{FOREIGN_ORDER.index(wnid)}\n".encode()),
                    ("JPEG", data),
                    ("txt", b"a text"),
                )
            ]
            tar_of(root / split / f"{number:06d}.tar", members)


def write_folders(root: Path, images: dict[str, Images]) -> None:
    """A file per image in class folders."""
    for split in ("train", "val"):
        for key, (wnid, data) in images[split].items():
            file_of(root / split / wnid / f"{key}.JPEG", data)


WRITERS: dict[str, Callable[[Path, dict[str, Images]], None]] = {
    "kaggle": write_kaggle,
    "parquet": write_parquet,
    "webdataset": write_webdataset,
    "folders": write_folders,
}

# ---- reading back -------------------------------------------------------------------------------------------------


def content(listing: Listing, order: slice = slice(None)) -> Images:
    """Reads the listed images, in `order`."""
    with ItemReader() as reader:
        return {i.key: (listing.classes[i.label].wnid, reader.read(i)) for i in list(listing.items)[order]}


def error_of(root: Path, split: str = "train", layout: str | None = None) -> str:
    """The message of the ValueError that opening, listing or reading `root` raises; it names a path in `root`."""
    with pytest.raises(ValueError) as caught:
        content(open_source(root, layout).listing(split))
    assert str(root) in str(caught.value)
    return str(caught.value)
