"""Layout `webdataset`: which members are samples, which classes labels mean, and errors that name the tar."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from webdataset.tariterators import base_plus_ext

from pipeline.imagenet.source import open_source
from pipeline.imagenet.tar_samples import MEMBER
from pipeline.shards.reader import ShardSet
from tests.pipeline.imagenet.layout_files import error_of, file_of, tar_of


def listed(root: Path, split: str = "train") -> list[tuple[str, str]]:
    """(key, wnid) of the items in the listing of `root`."""
    listing = open_source(root, "webdataset").listing(split)
    return [(item.key, listing.classes[item.label].wnid) for item in listing.items]


def test_our_own_shards_are_a_source(shard_root: Path, train_shards: ShardSet):
    """Keys, labels, classes and offsets are those of the shard set."""
    listing = open_source(shard_root).listing("train")
    assert (listing.layout, listing.classes) == ("webdataset", train_shards.manifest.classes)
    assert [item.key for item in listing.items] == [train_shards.key(i) for i in range(len(train_shards))]
    assert listing.items.label.tolist() == train_shards.index["label"].tolist()
    assert listing.items.offset.tolist() == train_shards.index["offset"].tolist()
    assert open_source(shard_root / "train").listing("train") == listing, "the folder of one split is a source, too"


def test_a_label_may_be_a_name(tmp_path: Path):
    """Classes are then the sorted names. With a wnid in the keys, the wnid is the class and the name its words."""
    tar_of(tmp_path / "a.tar", [("x.jpg", b"1"), ("x.cls", b"tench"), ("y.jpg", b"2"), ("y.cls", b"a crane\n")])
    assert listed(tmp_path) == [("x", "tench"), ("y", "a crane")]
    assert [c.words for c in open_source(tmp_path).listing("train").classes] == ["a crane", "tench"]
    tar_of(tmp_path / "a.tar", [("n00000002_1.jpg", b"1"), ("n00000002_1.cls", b"tench")])
    (tench,) = open_source(tmp_path).listing("train").classes
    assert (tench.wnid, tench.words) == ("n00000002", "tench")


def test_a_label_may_be_in_json(tmp_path: Path):
    """It is the value of `label` or `cls`, a number or a name. A `.cls` member has precedence."""
    samples = {"a": {"label": 10}, "b": {"cls": "2"}, "c": {"label": 3, "cls": 4}, "d": {"label": 5}}
    members = [
        (f"{k}.{x}", d) for k, v in samples.items() for x, d in (("png", b"p"), ("json", json.dumps(v).encode()))
    ]
    tar_of(tmp_path / "a.tar", [*members, ("d.cls", b"7")])
    assert listed(tmp_path) == [("a", "10"), ("b", "02"), ("c", "03"), ("d", "07")]


def test_numbers_sort_as_numbers_and_mean_the_same_in_both_splits(tmp_path: Path):
    """Both splits have the classes of both, so a label has one meaning; 2 comes before 10."""
    for split, labels in (("train", [10, 2, 0]), ("val", [2, 1])):
        tar_of(tmp_path / split / "a.tar", [(f"{n}.{x}", b"%d" % n) for n in labels for x in ("cls", "webp")])
    train, val = (open_source(tmp_path).listing(split) for split in ("train", "val"))
    assert train.classes == val.classes
    assert [c.wnid for c in train.classes] == ["00", "01", "02", "10"]
    assert (train.items.label.tolist(), val.items.label.tolist()) == ([3, 2, 0], [2, 1])


@pytest.mark.parametrize("labels", ["001", "012", "100"])
def test_wnids_are_classes_only_if_they_match_the_labels(labels: str, tmp_path: Path):
    """If a label has two wnids or none, or two labels share one, the classes are the labels."""
    keys = [
        "n00000001_1",
        "n00000001_2" if labels == "012" else "n00000002_1",
        "x" if labels == "001" else "n00000003_1",
    ]
    members = [(f"{k}.{x}", n.encode()) for k, n in zip(keys, labels, strict=True) for x in ("cls", "jpg")]
    tar_of(tmp_path / "a.tar", members)
    assert [name for _, name in listed(tmp_path)] == list(labels)


def test_a_sample_is_what_shares_its_name_up_to_the_first_dot(tmp_path: Path):
    """The reference is the webdataset package. Suffixes may have any case; other members are ignored."""
    names = ["d.x/a.CLS", "d.x/a.JPG", "d.x/a.seg.png", "._a.jpg", "README", "d.x/README", "b.cls", "b.jpeg"]
    for name in names:
        match = MEMBER.fullmatch(name)
        assert (match.groups() if match else (None, None)) == base_plus_ext(name)
    tar_of(tmp_path / "a.tar", [(name, b"1") for name in names])
    assert listed(tmp_path) == [("a", "1"), ("b", "1")]


def test_a_key_in_two_tars_gets_its_class_as_prefix(tmp_path: Path):
    """Keys are unique over all tars of a split."""
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
def test_folder_or_name_of_a_tar_gives_its_split(tmp_path: Path, names: list[str], splits: dict[str, int]):
    """Folders have precedence over names. If neither gives a split, all tars are for training."""
    for number, name in enumerate(names):
        tar_of(tmp_path / name, [(f"{number}.jpg", b"p"), (f"{number}.cls", b"1")])
    source = open_source(tmp_path)
    assert (source.layout, source.splits()) == ("webdataset", list(splits))
    assert {split: len(source.listing(split).items) for split in splits} == splits


def test_class_tars_are_not_shards(tmp_path: Path):
    """Class tars, which remain after ILSVRC's training tar is unpacked, do not hide the class folders beside them."""
    file_of(tmp_path / "train/n00000001/a.JPEG", b"image")
    tar_of(tmp_path / "train/n00000001.tar", [("a.JPEG", b"image")])
    assert open_source(tmp_path).layout == "folders"


def test_one_wrong_sample_is_not_an_item(tmp_path: Path):
    """It is unusable, with a reason, if other samples are right."""
    tar_of(tmp_path / "train/a.tar", [*SAMPLE_MEMBERS, ("b.jpg", b"p"), ("b.cls", b"-1"), ("c.cls", b"1")])
    listing = open_source(tmp_path).listing("train")
    assert [item.key for item in listing.items] == ["a"]
    assert [(i.key, i.reason.partition(";")[0]) for i in listing.unusable] == [
        ("b", "sample b has no label (.jpg, .cls)"),
        ("c", "sample c has 0 images (.cls)"),
    ]


MANIFEST_TEXT = json.dumps({"format": "alexnet-pipeline shards, version 2", "classes": [{"wnid": "n1", "words": "w"}]})

WRONG_TARS: dict[str, list[tuple[str, bytes]]] = {
    "sample a has no label (.jpg); expected": [("a.jpg", b"p")],
    "sample d/a has 0 images (.cls); expected": [("d/a.cls", b"1")],
    "sample a has 2 images (.jpg, .png, .cls); expected": [("a.jpg", b"p"), ("a.png", b"p"), ("a.cls", b"1")],
    "sample a has 2 images (.jpg, .jpg, .cls)": [("a.jpg", b"p"), ("a.jpg", b"p"), ("a.cls", b"1")],
    "sample b has no label (.jpg, .cls)": [("b.jpg", b"p"), ("b.cls", b"-1")],
    "sample c has no label (.jpg, .cls)": [("c.jpg", b"p"), ("c.cls", b"\xff\xfe")],
    "sample e has no label (.jpg, .json)": [("e.jpg", b"p"), ("e.json", b"{")],
    "sample f has no label (.jpg, .json)": [("f.jpg", b"p"), ("f.json", b'{"label": true}')],
    "no sample in it, nor in any other tar of train": [("README", b"nothing")],
}


@pytest.mark.parametrize("message", WRONG_TARS)
def test_a_wrong_sample_is_named(message: str, tmp_path: Path):
    """The message names the tar and the sample, and says what the sample lacks."""
    tar_of(tmp_path / "train/a.tar", WRONG_TARS[message])
    with pytest.raises(ValueError) as caught:
        listed(tmp_path)
    assert message in str(caught.value)
    assert "a.tar: " in str(caught.value)


def test_a_truncated_tar_is_named(tmp_path: Path):
    """The message names the tar."""
    path = tar_of(tmp_path / "train/a.tar", [*SAMPLE_MEMBERS, ("b.cls", b"1"), ("b.jpg", b"p" * 9000)])
    path.write_bytes(path.read_bytes()[:5000])
    assert "train/a.tar: not a whole tar" in error_of(tmp_path)


def test_a_tar_without_a_split_among_others_is_an_error(tmp_path: Path):
    """A set whose names give the split for some tars only is ambiguous."""
    for name in ("train-0.tar", "extra.tar"):
        tar_of(tmp_path / name, SAMPLE_MEMBERS)
    assert "extra.tar: no split in its name, unlike other tars; expected train or val in it" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MANIFEST_TEXT, "a.tar: no class 1 in the source's list of 1 classes; use matching files"),
        ("{", "manifest.json: no classes in it"),
        (MANIFEST_TEXT.replace("wnid", "name"), "manifest.json: no classes in it"),
    ],
)
def test_a_manifest_that_does_not_fit_is_an_error(text: str, message: str, tmp_path: Path):
    """A manifest of this project must list the classes of all labels."""
    tar_of(tmp_path / "train/a.tar", SAMPLE_MEMBERS)
    file_of(tmp_path / "train/manifest.json", text.encode())
    assert message in error_of(tmp_path)


def test_classes_come_from_the_manifest_of_the_split_first(tmp_path: Path):
    """Without one they come from the manifest of the other split."""
    for split, wnid in (("train", "n1"), ("val", "n2")):
        tar_of(tmp_path / split / "a.tar", [("a.jpg", b"p"), ("a.cls", b"0")])
        file_of(tmp_path / split / "manifest.json", MANIFEST_TEXT.replace("n1", wnid).encode())
    assert (listed(tmp_path, "train"), listed(tmp_path, "val")) == ([("a", "n1")], [("a", "n2")])
    (tmp_path / "val/manifest.json").unlink()
    assert listed(tmp_path, "val") == [("a", "n1")]


def test_the_manifest_of_another_tool_is_ignored(tmp_path: Path):
    """A manifest.json of another format does not name the classes."""
    tar_of(tmp_path / "train/a.tar", SAMPLE_MEMBERS)
    file_of(tmp_path / "train/manifest.json", b'{"classes": ["other"]}')
    assert listed(tmp_path) == [("a", "1")]
