"""Layouts: the same pictures in any of them give the same listing, and what is not as a layout says is named."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import scipy.io
from webdataset.tariterators import base_plus_ext

from pipeline.imagenet import parquet as parquet_layout
from pipeline.imagenet.ilsvrc import DEVKIT, TRAIN_TAR, VAL_TAR
from pipeline.imagenet.listing import Item, Listing
from pipeline.imagenet.source import LAYOUTS, ItemReader, open_source
from pipeline.imagenet.webdataset import MEMBER
from pipeline.shards.reader import ShardSet
from pipeline.synthetic.dataset import class_wnids
from pipeline.synthetic.drawing import class_words
from tests.pipeline.imagenet.test_source import plain_tar_of_tars
from tests.support.shard_fixtures import SAMPLE

WNIDS = class_wnids(SAMPLE)
WORDS = {wnid: class_words(label) for label, wnid in enumerate(WNIDS)}
ODD_ORDER = WNIDS[::-1]  # the numbers that other sets' labels have: not those of sorted wnids
Pictures = dict[str, tuple[str, bytes]]  # key -> wnid, bytes


@pytest.fixture(scope="module")
def pictures(sample: Path) -> dict[str, Pictures]:
    """Split -> what every layout below holds, in no particular order."""
    with tarfile.open(sample / VAL_TAR) as tar:
        val = {Path(member.name).stem: tar.extractfile(member).read() for member in tar}
    with tarfile.open(sample / DEVKIT) as tar:
        truth = next(tar.extractfile(m).read() for m in tar if m.name.endswith("ground_truth.txt")).split()
    ids = ilsvrc_ids(sample)
    labelled = {key: (ids[int(truth[int(key[-8:]) - 1])], data) for key, data in val.items()}
    return {"train": plain_tar_of_tars(sample / TRAIN_TAR), "val": labelled}


def ilsvrc_ids(sample: Path) -> dict[int, str]:
    """ILSVRC2012_ID -> wnid, of the devkit."""
    with tarfile.open(sample / DEVKIT) as tar:
        mat = next(tar.extractfile(m).read() for m in tar if m.name.endswith("meta.mat"))
    synsets = scipy.io.loadmat(io.BytesIO(mat), struct_as_record=False, squeeze_me=True)["synsets"]
    return {int(s.ILSVRC2012_ID): str(s.WNID) for s in synsets}


# ---- a writer per layout ------------------------------------------------------------------------------------------


def tar_of(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A tar with those members, in that order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def file_of(path: Path, data: bytes) -> Path:
    """A file with those bytes, in folders that are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def write_kaggle(root: Path, pictures: dict[str, Pictures]) -> None:
    for key, (wnid, data) in pictures["train"].items():
        file_of(root / f"ILSVRC/Data/CLS-LOC/train/{wnid}/{key}.JPEG", data)
    for key, (_, data) in pictures["val"].items():
        file_of(root / f"ILSVRC/Data/CLS-LOC/val/{key}.JPEG", data)
    file_of(root / "ILSVRC/Data/CLS-LOC/test/ILSVRC2012_test_00000001.JPEG", b"ignored")
    with (root / "LOC_val_solution.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["ImageId", "PredictionString"])
        rows.writerows([key, f"{wnid} 1 2 3 4 {wnid} 5 6 7 8 "] for key, (wnid, _) in pictures["val"].items())
    (root / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} {words}\n" for wnid, words in WORDS.items()))


def write_parquet_file(path: Path, rows: list[tuple[str | None, int | None, bytes | None]], names: list[str]) -> Path:
    """Rows of (path, label, bytes) in groups of three; `names` go into the metadata, if there are any."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": data, "path": name} for name, _, data in rows]
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table({"image": pa.array(images, image), "label": pa.array([label for _, label, _ in rows], pa.int64())})
    feature = {"names": names, "_type": "ClassLabel"}
    info = {"info": {"features": {"image": {"_type": "Image"}, "label": feature}}}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)} if names else None), path, 3)
    return path


def write_parquet(root: Path, pictures: dict[str, Pictures]) -> None:
    for split, name in (("train", "train"), ("val", "validation")):
        rows = [(f"{key}.JPEG", ODD_ORDER.index(wnid), data) for key, (wnid, data) in pictures[split].items()]
        for number, part in enumerate((rows[:11], rows[11:])):
            names = [WORDS[wnid] for wnid in ODD_ORDER]
            write_parquet_file(root / "data" / f"{name}-{number:05d}-of-00002.parquet", part, names)
    write_parquet_file(root / "data" / "test-00000-of-00001.parquet", [(None, -1, b"ignored")], [])


def write_webdataset(root: Path, pictures: dict[str, Pictures]) -> None:
    for split in ("train", "val"):
        samples = list(pictures[split].items())
        for number, part in enumerate((samples[:11], samples[11:])):
            members = [
                (f"./{split}/{key}.{kind}", content)
                for key, (wnid, data) in part
                for kind, content in (
                    ("cls", f"{ODD_ORDER.index(wnid)}\n".encode()),
                    ("JPEG", data),
                    ("txt", b"a text"),
                )
            ]
            tar_of(root / split / f"{number:06d}.tar", members)


def write_folders(root: Path, pictures: dict[str, Pictures]) -> None:
    for split in ("train", "val"):
        for key, (wnid, data) in pictures[split].items():
            file_of(root / split / wnid / f"{key}.JPEG", data)


WRITERS: dict[str, Callable[[Path, dict[str, Pictures]], None]] = {
    "kaggle": write_kaggle,
    "parquet": write_parquet,
    "webdataset": write_webdataset,
    "folders": write_folders,
}


@pytest.fixture(scope="module")
def roots(sample: Path, pictures: dict[str, Pictures], tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """Layout -> a folder in it, made once. Tests that change it work on a copy."""
    made = {"ilsvrc": sample}

    def root_of(layout: str) -> Path:
        if layout not in made:
            made[layout] = tmp_path_factory.mktemp(layout)
            WRITERS[layout](made[layout], pictures)
        return made[layout]

    return root_of


def content(listing: Listing, order: slice = slice(None)) -> Pictures:
    """key -> (wnid, bytes), by reading the items in `order`."""
    with ItemReader() as reader:
        return {i.key: (listing.classes[i.label].wnid, reader.read(i)) for i in list(listing.items)[order]}


def refused(root: Path, split: str = "train", layout: str | None = None) -> str:
    """What opening, listing and reading `root` is refused with."""
    with pytest.raises(ValueError) as caught:
        content(open_source(root, layout).listing(split))
    assert str(root) in str(caught.value)
    return str(caught.value)


# ---- all layouts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_pictures_and_classes(
    layout: str, split: str, roots: Callable, pictures: dict[str, Pictures]
):
    """Recognised by itself and when named, in any order of reading; classes sorted, with words where there are any."""
    root = roots(layout)
    source = open_source(root)
    assert (source.layout, source.splits()) == (layout, ["train", "val"])
    listing = source.listing(split)
    assert content(listing) == content(listing, slice(None, None, -1)) == pictures[split]
    words = WORDS if layout in ("ilsvrc", "kaggle", "parquet") else {wnid: wnid for wnid in WNIDS}
    assert [(c.wnid, c.words) for c in listing.classes] == sorted(words.items())
    assert (listing.layout, listing.split) == (layout, split)
    assert open_source(root, layout).listing(split) == listing


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_that_is_named_but_not_there_is_refused(layout: str, tmp_path: Path):
    file_of(tmp_path / "notes.txt", b"")
    assert f"layout {layout} is not here (found notes.txt); expected " in refused(tmp_path, layout=layout)
    assert refused(tmp_path / "none", layout=layout).count("no such folder; expected one with ") == 1


def test_an_unknown_layout_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="layout 'lmdb', expected one of ilsvrc, kaggle, parquet, webdataset, folders"):
        open_source(tmp_path, "lmdb")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_that_is_gone_or_changed_since_is_named(layout: str, roots: Callable, tmp_path: Path):
    root = shutil.copytree(roots(layout), tmp_path / "copy")
    *_, item = open_source(root).listing("train").items
    data = item.file.read_bytes()
    for changed in (data[: item.offset + item.size - 1] if layout != "parquet" else data[:-1], b""):
        item.file.write_bytes(changed)
        with ItemReader() as reader, pytest.raises(ValueError) as caught:
            reader.read(item)
        assert f"{item.file}: changed since it was listed (image {item.key}); run the same" in str(caught.value)
    item.file.unlink()
    with ItemReader() as reader, pytest.raises(ValueError) as caught:
        reader.read(item)
    assert f"{item.file}: gone since it was listed (image {item.key}); run the same" in str(caught.value)


# ---- webdataset ---------------------------------------------------------------------------------------------------


def listed(root: Path, split: str = "train") -> list[tuple[str, str]]:
    """(key, class) of a listing's items."""
    listing = open_source(root, "webdataset").listing(split)
    return [(item.key, listing.classes[item.label].wnid) for item in listing.items]


def test_our_own_shards_are_a_source(shard_root: Path, train_shards: ShardSet):
    """Keys, labels, classes with their words and the very bytes: as the set has them."""
    listing = open_source(shard_root).listing("train")
    assert (listing.layout, listing.classes) == ("webdataset", train_shards.manifest.classes)
    assert [item.key for item in listing.items] == [train_shards.key(i) for i in range(len(train_shards))]
    assert listing.items.label.tolist() == train_shards.index["label"].tolist()
    assert listing.items.offset.tolist() == train_shards.index["offset"].tolist()
    assert open_source(shard_root / "train").listing("train") == listing, "the folder of one split alone"


def test_a_label_may_be_a_name(tmp_path: Path):
    """Classes are then the sorted names; with a wnid in the keys, the name is its words."""
    tar_of(tmp_path / "a.tar", [("x.jpg", b"1"), ("x.cls", b"tench"), ("y.jpg", b"2"), ("y.cls", b"a crane\n")])
    assert listed(tmp_path) == [("x", "tench"), ("y", "a crane")]
    assert [c.words for c in open_source(tmp_path).listing("train").classes] == ["a crane", "tench"]
    tar_of(tmp_path / "a.tar", [("n00000002_1.jpg", b"1"), ("n00000002_1.cls", b"tench")])
    (tench,) = open_source(tmp_path).listing("train").classes
    assert (tench.wnid, tench.words) == ("n00000002", "tench")


def test_a_label_may_stand_in_json(tmp_path: Path):
    """As `label` or `cls`, a number or a name; `.cls` goes before it."""
    samples = {"a": {"label": 10}, "b": {"cls": "2"}, "c": {"label": 3, "cls": 4}, "d": {"label": 5}}
    members = [
        (f"{k}.{x}", d) for k, v in samples.items() for x, d in (("png", b"p"), ("json", json.dumps(v).encode()))
    ]
    tar_of(tmp_path / "a.tar", [*members, ("d.cls", b"7")])
    assert listed(tmp_path) == [("a", "10"), ("b", "02"), ("c", "03"), ("d", "07")]


def test_numbers_sort_as_numbers_and_mean_the_same_in_both_splits(tmp_path: Path):
    """A class that one split lacks keeps its place: label 2 is the class after 0 and 1 in both, before 10."""
    for split, labels in (("train", [10, 2, 0]), ("val", [2, 1])):
        tar_of(tmp_path / split / "a.tar", [(f"{n}.{x}", b"%d" % n) for n in labels for x in ("cls", "webp")])
    train, val = (open_source(tmp_path).listing(split) for split in ("train", "val"))
    assert train.classes == val.classes
    assert [c.wnid for c in train.classes] == ["00", "01", "02", "10"]
    assert (train.items.label.tolist(), val.items.label.tolist()) == ([3, 2, 0], [2, 1])


@pytest.mark.parametrize("labels", ["001", "012", "100"])
def test_wnids_count_only_where_they_fit_the_labels(labels: str, tmp_path: Path):
    """Two wnids under one label, one under two, or none: then it is the labels that say what a class is."""
    keys = [
        "n00000001_1",
        "n00000001_2" if labels == "012" else "n00000002_1",
        "x" if labels == "001" else "n00000003_1",
    ]
    members = [(f"{k}.{x}", n.encode()) for k, n in zip(keys, labels, strict=True) for x in ("cls", "jpg")]
    tar_of(tmp_path / "a.tar", members)
    assert [name for _, name in listed(tmp_path)] == list(labels)


def test_a_sample_is_what_shares_its_name_up_to_the_first_dot(tmp_path: Path):
    """Twin: the webdataset package. Suffixes may have any case; what has no suffix, or no name before it, is left."""
    names = ["d.x/a.CLS", "d.x/a.JPG", "d.x/a.seg.png", "._a.jpg", "README", "d.x/README", "b.cls", "b.jpeg"]
    for name in names:
        match = MEMBER.fullmatch(name)
        assert (match.groups() if match else (None, None)) == base_plus_ext(name)
    tar_of(tmp_path / "a.tar", [(name, b"1") for name in names])
    assert listed(tmp_path) == [("a", "1"), ("b", "1")]


def test_a_key_in_two_tars_gets_its_class(tmp_path: Path):
    for number in range(2):
        tar_of(tmp_path / f"{number}.tar", [("a.jpg", b"p"), ("a.cls", b"%d" % number)])
    assert [key for key, _ in listed(tmp_path)] == ["0_a", "1_a"]


SAMPLE_MEMBERS = [("a.jpg", b"p"), ("a.cls", b"1")]


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["imagenet1k-train-0000.tar", "imagenet1k-validation-0000.tar"], {"train": 1, "val": 1}),
        (["x_VAL_0.tar", "x_val_1.tar"], {"val": 2}),
        (["x-train-0.tar", "x-test-0.tar"], {"train": 1}),
        (["imagenettrain0.tar", "imagenetval0.tar"], {"train": 1, "val": 1}),
        (["0.tar", "1.tar"], {"train": 2}),
        (["train/0.tar", "train/1.tar", "val/0.tar", "other-val.tar"], {"train": 2, "val": 1}),
    ],
)
def test_tars_tell_their_split(tmp_path: Path, names: list[str], splits: dict[str, int]):
    """By folder, else by a word in the name; where no name has one, all are for training."""
    for number, name in enumerate(names):
        tar_of(tmp_path / name, [(f"{number}.jpg", b"p"), (f"{number}.cls", b"1")])
    source = open_source(tmp_path)
    assert (source.layout, source.splits()) == ("webdataset", list(splits))
    assert {split: len(source.listing(split).items) for split in splits} == splits


def test_tars_of_classes_are_no_shards(tmp_path: Path):
    """What unpacking ILSVRC's training tar leaves beside the class folders does not hide them."""
    file_of(tmp_path / "train/n00000001/a.JPEG", b"picture")
    tar_of(tmp_path / "train/n00000001.tar", [("a.JPEG", b"picture")])
    assert open_source(tmp_path).layout == "folders"


MANIFEST_TEXT = json.dumps({"format": "alexnet-pipeline shards, version 2", "classes": [{"wnid": "n1", "words": "w"}]})

WRONG_TARS: dict[str, list[tuple[str, bytes]]] = {
    "sample a has no label (.jpg); expected": [("a.jpg", b"p")],
    "sample d/a has 0 pictures (.cls); expected": [("d/a.cls", b"1")],
    "sample a has 2 pictures (.jpg, .png, .cls); expected": [("a.jpg", b"p"), ("a.png", b"p"), ("a.cls", b"1")],
    "sample a has 2 pictures (.jpg, .jpg, .cls)": [("a.jpg", b"p"), ("a.jpg", b"p"), ("a.cls", b"1")],
    "sample b has no label (.jpg, .cls)": [*SAMPLE_MEMBERS, ("b.jpg", b"p"), ("b.cls", b"-1")],
    "sample c has no label (.jpg, .cls)": [("c.jpg", b"p"), ("c.cls", b"\xff\xfe")],
    "sample e has no label (.jpg, .json)": [("e.jpg", b"p"), ("e.json", b"{")],
    "sample f has no label (.jpg, .json)": [("f.jpg", b"p"), ("f.json", b'{"label": true}')],
    "no sample in it, nor in any other tar of train": [("README", b"nothing")],
    "its name makes a key of 91 characters": [("x" * 91 + ".jpg", b"p"), ("x" * 91 + ".cls", b"1")],
}


@pytest.mark.parametrize("message", WRONG_TARS)
def test_a_wrong_sample_is_named(message: str, tmp_path: Path):
    tar_of(tmp_path / "train/a.tar", WRONG_TARS[message])
    with pytest.raises(ValueError) as caught:
        listed(tmp_path)
    assert message in str(caught.value)
    assert "a.tar: " in str(caught.value) or "makes a key" in message


def test_a_tar_that_is_cut_is_named(tmp_path: Path):
    path = tar_of(tmp_path / "train/a.tar", [*SAMPLE_MEMBERS, ("b.cls", b"1"), ("b.jpg", b"p" * 9000)])
    path.write_bytes(path.read_bytes()[:5000])
    assert "train/a.tar: not a whole tar" in refused(tmp_path)


def test_a_tar_without_split_among_others_is_refused(tmp_path: Path):
    for name in ("train-0.tar", "extra.tar"):
        tar_of(tmp_path / name, SAMPLE_MEMBERS)
    assert "extra.tar: its name tells no split, others' do; expected train or val in it" in refused(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MANIFEST_TEXT, "no class 1, which a sample of train has; use matching files"),
        ("{", "no classes in it"),
        (MANIFEST_TEXT.replace("wnid", "name"), "no classes in it"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(text: str, message: str, tmp_path: Path):
    tar_of(tmp_path / "train/a.tar", SAMPLE_MEMBERS)
    file_of(tmp_path / "train/manifest.json", text.encode())
    assert f"manifest.json: {message}" in refused(tmp_path)


def test_each_split_goes_by_its_manifest_else_by_the_others(tmp_path: Path):
    for split, wnid in (("train", "n1"), ("val", "n2")):
        tar_of(tmp_path / split / "a.tar", [("a.jpg", b"p"), ("a.cls", b"0")])
        file_of(tmp_path / split / "manifest.json", MANIFEST_TEXT.replace("n1", wnid).encode())
    assert (listed(tmp_path, "train"), listed(tmp_path, "val")) == ([("a", "n1")], [("a", "n2")])
    (tmp_path / "val/manifest.json").unlink()
    assert listed(tmp_path, "val") == [("a", "n1")]


def test_somebody_elses_manifest_says_nothing(tmp_path: Path):
    tar_of(tmp_path / "train/a.tar", SAMPLE_MEMBERS)
    file_of(tmp_path / "train/manifest.json", b'{"classes": ["other"]}')
    assert listed(tmp_path) == [("a", "1")]


# ---- kaggle -------------------------------------------------------------------------------------------------------


def test_without_the_mapping_a_class_is_its_wnid_in_both_splits(roots: Callable, tmp_path: Path):
    """The classes are those of training folders and table together, so that labels agree."""
    root = shutil.copytree(roots("kaggle"), tmp_path / "copy")
    (root / "LOC_synset_mapping.txt").unlink()
    shutil.rmtree(root / "ILSVRC/Data/CLS-LOC/train" / WNIDS[0])
    edit(root / "LOC_val_solution.csv", WNIDS[1], WNIDS[2])
    train, val = (open_source(root).listing(split) for split in ("train", "val"))
    assert train.classes == val.classes
    assert [(c.wnid, c.words) for c in val.classes] == [(wnid, wnid) for wnid in sorted(WNIDS)]
    assert sorted(set(train.items.label.tolist())) == [1, 2, 3]


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


VAL_1 = "ILSVRC2012_val_00000001"
WRONG_KAGGLE: dict[str, Callable[[Path], object]] = {
    f"val/{VAL_1}.JPEG: no line of LOC_val_solution.csv names it": lambda r: edit(
        r / "LOC_val_solution.csv", VAL_1, "ILSVRC2012_val_00000002"
    ),
    f"LOC_val_solution.csv: names {VAL_1}, which is not in": lambda r: (
        r / f"ILSVRC/Data/CLS-LOC/val/{VAL_1}.JPEG"
    ).unlink(),
    "LOC_val_solution.csv: missing; the classes of val come from it": lambda r: (r / "LOC_val_solution.csv").unlink(),
    "begins with ['ImageId', 'Prediction'], expected ImageId,PredictionString": lambda r: edit(
        r / "LOC_val_solution.csv", "PredictionString", "Prediction"
    ),
    "LOC_val_solution.csv: line 2 has no class": lambda r: (r / "LOC_val_solution.csv").write_text(
        f"ImageId,PredictionString\n{VAL_1},\n"
    ),
    "train/n12345678: no class of LOC_synset_mapping.txt": lambda r: (
        r / "ILSVRC/Data/CLS-LOC/train/n12345678"
    ).mkdir(),
    "LOC_val_solution.csv: n12345678 is no class of LOC_synset_mapping.txt": lambda r: edit(
        r / "LOC_val_solution.csv", WNIDS[0], "n12345678"
    ),
}


@pytest.mark.parametrize("message", WRONG_KAGGLE)
def test_a_kaggle_file_that_does_not_fit_is_named(message: str, roots: Callable, tmp_path: Path):
    root = shutil.copytree(roots("kaggle"), tmp_path / "copy")
    WRONG_KAGGLE[message](root)
    assert message in refused(root, "val")


def test_an_empty_class_folder_is_named(roots: Callable, tmp_path: Path):
    root = shutil.copytree(roots("kaggle"), tmp_path / "copy")
    for path in (root / "ILSVRC/Data/CLS-LOC/train" / WNIDS[0]).iterdir():
        path.unlink()
    assert f"{WNIDS[0]}: a class folder with no image" in refused(root)


# ---- parquet ------------------------------------------------------------------------------------------------------


def parquet_classes(root: Path, split: str = "train") -> list[tuple[str, str, str]]:
    """(key, wnid, words) of a listing's items."""
    listing = open_source(root).listing(split)
    return [(i.key, listing.classes[i.label].wnid, listing.classes[i.label].words) for i in listing.items]


def test_rows_in_the_files_order_cost_one_read_per_row_group(
    roots: Callable, monkeypatch: pytest.MonkeyPatch, pictures: dict[str, Pictures]
):
    pytest.importorskip("pyarrow")
    listing = open_source(roots("parquet")).listing("train")
    read, groups = parquet_layout._read_group, []
    monkeypatch.setattr(parquet_layout, "_read_group", lambda p, f, g, c: [groups.append((p, g)), read(p, f, g, c)][1])
    assert content(listing) == pictures["train"]
    assert len(groups) == len(set(groups)) == -(-11 // 3) + -(-(len(listing.items) - 11) // 3)


def test_names_without_wnids_are_the_classes(tmp_path: Path):
    """Sorted, with labels to match, the same in both splits; of two that share a name each keeps its number."""
    names = ["tench", "crane", "bonnet", "crane"]
    for split, labels in (("train", [0, 1, 3]), ("validation", [2])):
        rows = [(None, label, b"p") for label in labels]
        write_parquet_file(tmp_path / f"{split}-00000-of-00001.parquet", rows, names)
    expected = [("tench", "tench"), ("crane (1)", "crane"), ("crane (3)", "crane")]
    assert parquet_classes(tmp_path) == [(f"train-00000-of-00001_{n}", *c) for n, c in enumerate(expected)]
    assert parquet_classes(tmp_path, "val") == [("validation-00000-of-00001_0", "bonnet", "bonnet")]
    listing = open_source(tmp_path).listing("val")
    assert [c.wnid for c in listing.classes] == ["bonnet", "crane (1)", "crane (3)", "tench"]


def test_without_names_a_class_is_its_wnid_else_its_number(tmp_path: Path):
    path = tmp_path / "train-0.parquet"
    write_parquet_file(path, [("n00000002_1_n00000002.JPEG", 0, b"p"), ("x_n00000001.JPEG", 1, b"p")], [])
    assert [row[1:] for row in parquet_classes(tmp_path)] == [("n00000002", "n00000002"), ("n00000001", "n00000001")]
    write_parquet_file(path, [("a.JPEG", 10, b"p"), ("b.JPEG", 9, b"p")], [])
    assert parquet_classes(tmp_path) == [("a", "10", "10"), ("b", "09", "09")]


def test_without_pyarrow_the_message_says_what_to_install(roots: Callable, monkeypatch: pytest.MonkeyPatch):
    root = roots("parquet")
    for name in [n for n in sys.modules if n.partition(".")[0] == "pyarrow"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert "parquet: parquet needs pyarrow; run: pip install 'alexnet-pipeline[parquet]'" in refused(root)


ROW = ("a.JPEG", 0, b"p")
WRONG_PARQUET: dict[str, Callable[[Path], object]] = {
    "1 files of its split, expected 2 (00001 is missing); get them all": lambda r: (
        r / "data/train-00001-of-00002.parquet"
    ).unlink(),
    "3 files of its split, expected 3 (they are of two sets)": lambda r: write_parquet_file(
        r / "data/train-00002-of-00003.parquet", [ROW], [WORDS[wnid] for wnid in ODD_ORDER]
    ),
    "train-00001-of-00002.parquet: not a whole parquet file": lambda r: (
        r / "data/train-00001-of-00002.parquet"
    ).write_bytes(b"<html>not found</html>"),
    "names its classes otherwise than train-00000-of-00002.parquet": lambda r: write_parquet_file(
        r / "data/validation-00001-of-00002.parquet", [ROW], ["other"]
    ),
    "no row in it, nor in any other file of train": lambda r: [
        write_parquet_file(r / f"data/train-0000{n}-of-00002.parquet", [], [WORDS[w] for w in ODD_ORDER]) for n in "01"
    ],
}
WRONG_ROWS: dict[str, tuple[tuple[str | None, int | None, bytes | None], list[str]]] = {
    "row 1 has label -1, expected a number from 0": (("b.JPEG", -1, b"p"), []),
    "row 1 has label None, expected a number from 0": (("b.JPEG", None, b"p"), []),
    "train has label 2, but names for 1 labels only": (("b.JPEG", 2, b"p"), ["tench"]),
    "row 1 has no bytes, only a path; embed the pictures": (("b.JPEG", 0, None), []),
}


@pytest.mark.parametrize("message", WRONG_PARQUET)
def test_a_wrong_parquet_file_is_named(message: str, roots: Callable, tmp_path: Path):
    root = shutil.copytree(roots("parquet"), tmp_path / "copy")
    WRONG_PARQUET[message](root)
    assert message in refused(root)


@pytest.mark.parametrize("message", WRONG_ROWS)
def test_a_wrong_row_is_named(message: str, tmp_path: Path):
    row, names = WRONG_ROWS[message]
    write_parquet_file(tmp_path / "train-00000-of-00001.parquet", [ROW, row], names)
    assert message in refused(tmp_path)


def test_other_columns_are_refused(tmp_path: Path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"img": [b"p"], "label": [1]}), tmp_path / "train-0.parquet")
    assert "columns img, label; expected image.bytes, image.path and label" in refused(tmp_path)


def test_a_row_group_that_cannot_be_read_is_named(tmp_path: Path):
    """The file's end says what is where, so a fault in the middle shows when it is read."""
    path = write_parquet_file(tmp_path / "train-0.parquet", [(f"{n}.JPEG", 0, bytes(900)) for n in range(9)], [])
    listing = open_source(tmp_path).listing("train")
    data = bytearray(path.read_bytes())
    data[4:400] = b"\xff" * 396
    path.write_bytes(data)
    with ItemReader() as reader, pytest.raises(ValueError, match="row group 0 cannot be read"):
        reader.read(listing.items[0])


def test_a_parquet_item_says_row_and_file_size(tmp_path: Path):
    path = write_parquet_file(tmp_path / "train-0.parquet", [(f"{n}.JPEG", 0, b"p") for n in range(5)], [])
    items = list(open_source(tmp_path).listing("train").items)
    assert items == [Item(str(n), 0, path, n, path.stat().st_size) for n in range(5)]
