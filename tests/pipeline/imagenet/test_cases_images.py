"""Images, classes, labels and keys of sources as people have them: nothing is lost silently."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from pipeline.imagenet.item_reader import ItemReader
from pipeline.imagenet.listing import KEY_LIMIT, Listing
from pipeline.imagenet.source import open_source, read_class_list
from tests.pipeline.imagenet.case_files import SHARK, TENCH, jpeg, make_shards, tar_bytes, tree
from tests.pipeline.imagenet.layout_files import error_of, file_of, tar_of


def train(root: Path) -> Listing:
    return open_source(root).listing("train")


def keys(listing: Listing) -> list[str]:
    return [item.key for item in listing.items]


def skipped(listing: Listing) -> dict[str, int]:
    return {entry.reason: entry.count for entry in listing.skipped}


def test_folders_that_are_integers_sort_as_integers(tmp_path: Path):
    """As label numbers do; a class that only val has counts, too."""
    tree(tmp_path, *(f"train/{n}/{n}.JPEG" for n in (0, 1, 2, 10)), "val/9/a.JPEG")
    assert [c.wnid for c in train(tmp_path).classes] == ["0", "1", "2", "9", "10"]


def test_a_class_list_keeps_the_labels_of_a_subset(tmp_path: Path):
    """Labels are positions in the list. Numbers in a source are lines of the list."""
    path = file_of(tmp_path / "classes.txt", f"{TENCH} tench, Tinca\n{SHARK}\nn02099601\n".encode())
    names = read_class_list(path)
    tree(tmp_path / "a", f"train/n02099601/a.JPEG", f"train/{TENCH}/b.JPEG")  # noqa: F541
    listing = open_source(tmp_path / "a", class_list=names).listing("train")
    assert listing.items.label.tolist() == [0, 2]
    assert (listing.classes[0].words, listing.classes_without_images()) == ("tench, Tinca", [SHARK])
    tar_of(tmp_path / "b/train-0.tar", [("a.jpg", jpeg()), ("a.cls", b"2")])
    assert open_source(tmp_path / "b", class_list=names).listing("train").items.label.tolist() == [2]
    tree(tmp_path / "c", "train/x/a.JPEG")
    with pytest.raises(ValueError, match=r"1 of its classes are not in the class list \(x\)"):
        open_source(tmp_path / "c", class_list=names).listing("train")
    code, out, _ = make_shards(tmp_path / "a", tmp_path / "out", "--class-list", str(path))
    assert (code, "2 images of 3 classes" in out) == (0, True)


def test_what_counts_as_an_image(tmp_path: Path):
    """By suffix, also nested and with a query; without a suffix by its first bytes. The rest is counted by reason."""
    root = tree(tmp_path, "train/x/a.jpg", "train/x/deep/b.JFIF", "train/x/c", "train/x/d.jpg?w=3", "train/x/notes.txt")
    for name in ("e.avif", "f.ppm", "g.webp", "h.mpo", "README", "._a.jpg", "Thumbs.db", "i.h5"):
        file_of(root / "train/x" / name, b"no image")
    assert keys(train(root)) == ["a", "c", "d", "e", "f", "g", "h", "b"]
    assert skipped(train(root)) == {
        "AppleDouble": 1,
        "hidden": 1,
        "no suffix and no image": 1,
        "suffix .h5": 1,
        "suffix .txt": 1,
    }


def test_links_to_nowhere_are_unusable(tmp_path: Path):
    """They are named, and over the limit they are an error; a link into itself ends."""
    root = tree(tmp_path / "src", "train/x/a.jpg")
    for n in range(11):
        (root / f"train/x/b{n}.jpg").symlink_to("/nowhere/b.jpg")
    (root / "train/x/loop").symlink_to(root / "train")
    listing = train(root)
    assert (keys(listing), len(listing.unusable)) == (["a"], 11)
    assert listing.unusable[0].reason == "a link to /nowhere/b.jpg, which does not exist"
    code, _, error = make_shards(root, tmp_path / "out")
    assert code == 1
    assert "train: 11 of 12 images do not exist or have no usable label, at most 10 are allowed" in error
    assert make_shards(root, tmp_path / "out", "--max-quarantine", "11")[0] == 0
    manifest = json.loads((tmp_path / "out/train/manifest.json").read_text())
    assert sorted(entry["key"] for entry in manifest["quarantined"]) == sorted(image.key for image in listing.unusable)


def test_any_name_gives_a_legal_distinct_key(tmp_path: Path):
    """Names that are not ASCII, equal stems and long classes; the listing has the original of each changed key."""
    long = "05500_Plantae_Tracheophyta_Magnoliopsida_Asterales_Asteraceae_Symphyotrichum_novae-angliae"
    names = ["猫/0001.jpg", "狗/0001.jpg", "x/a.jpg", "x/a.png", "x/b c.jpg", "x/b_c.jpg", f"{long}/1.jpg", "y/1.jpg"]
    root = tree(tmp_path, *(f"train/{name}" for name in names))
    listing = train(root)
    found = keys(listing)
    assert len(set(found)) == len(names)
    assert all(re.fullmatch(f"[A-Za-z0-9_-]{{1,{KEY_LIMIT}}}", key) for key in found)
    assert sorted(listing.originals.values()) == sorted(f"train/{name}" for name in names)
    (root / "train/x/0.jpg").write_bytes(jpeg())
    assert set(found) < set(keys(train(root))), "keys do not depend on other files"


def test_equal_keys_in_two_tars_are_distinct(tmp_path: Path):
    """A writer that numbers samples from 0 in each tar, also within one class."""
    for n in range(2):
        tar_of(tmp_path / f"train/{n}.tar", [("000.jpg", jpeg(n)), ("000.cls", b"0")])
    listing = train(tmp_path)
    assert len(set(keys(listing))) == 2
    assert sorted(listing.originals.values()) == ["train/0.tar: 000", "train/1.tar: 000"]


def gnu_tar(tar: Path, folder: Path, *options: str) -> None:
    """Packs a folder by GNU tar."""
    tar.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["tar", "--sort=name", *options, "-cf", tar, "-C", folder, "."], check=True)


def test_hard_and_symbolic_links_in_tars_are_resolved(tmp_path: Path):
    """A label and an image that are links to earlier members."""
    folder = tmp_path / "d"
    for name, data in (("0.jpg", jpeg()), ("0.cls", b"0"), ("1.jpg", jpeg(1))):
        file_of(folder / name, data)
    (folder / "1.cls").hardlink_to(folder / "0.cls")
    (folder / "2.cls").hardlink_to(folder / "0.cls")
    (folder / "2.jpg").symlink_to("1.jpg")
    gnu_tar(tmp_path / "src/train/0.tar", folder)
    listing = train(tmp_path / "src")
    with ItemReader() as reader:
        assert [reader.read(item) for item in listing.items] == [jpeg(), jpeg(1), jpeg(1)]
    (folder / "0.jpg").unlink()
    (folder / "0.jpg").symlink_to("/gone.jpg")
    gnu_tar(tmp_path / "src/train/0.tar", folder)
    assert "0.jpg is a link to /gone.jpg, which is not before it in the tar" in error_of(tmp_path / "src")


def test_sparse_members_are_refused_by_name(tmp_path: Path):
    """Their bytes in the tar are not those of the file."""
    with file_of(tmp_path / "d/0.jpg", jpeg()).open("r+b") as file:
        file.truncate(1 << 20)
    gnu_tar(tmp_path / "src/train/0.tar", tmp_path / "d", "--sparse")
    assert "0.jpg is stored sparse; write the tar again without --sparse" in error_of(tmp_path / "src")


def test_samples_need_not_be_neighbours(tmp_path: Path):
    """A tar of an unsorted folder: first all images, then all labels."""
    names = [f"{n}.{kind}" for kind in ("jpg", "cls") for n in range(3)]
    tar_of(tmp_path / "train/0.tar", [(name, jpeg() if name.endswith("jpg") else name[:1].encode()) for name in names])
    assert train(tmp_path).items.label.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("kind", "label", "wnid"),
    [
        ("json", {"label": 3.0}, "3"),
        ("json", {"label": [3]}, "3"),
        ("json", 3, "3"),
        ("json", {"wnid": TENCH}, TENCH),
        ("json", {"caption": "a cat", "class_id": 3}, "3"),
        ("txt", "3", "3"),
        ("txt", "a cat", None),
        ("cls", "-1", None),
        ("cls", "\0\1", None),
        ("cls", str(2**31 - 1), None),
        ("json", {"label": None}, None),
        ("json", {"label": float("nan")}, None),
        ("json", {"label": 1.5}, None),
    ],
)
def test_a_label_is_read_if_it_is_clear(kind: str, label: object, wnid: str | None, tmp_path: Path):
    """Otherwise, without any other sample, the message names the sample."""
    data = str(label).encode() if kind != "json" else json.dumps(label).encode()
    tar_of(tmp_path / "train/0.tar", [("a.jpg", jpeg()), (f"a.{kind}", data)])
    if wnid is None:
        assert f"0.tar: sample a has no label (.jpg, .{kind})" in error_of(tmp_path)
    else:
        listing = train(tmp_path)
        assert [listing.classes[item.label].wnid for item in listing.items] == [wnid]


def test_several_images_in_a_sample_are_refused(tmp_path: Path):
    """Two views of an image, for example."""
    tar_of(tmp_path / "train/0.tar", [("0.left.jpg", jpeg()), ("0.right.jpg", jpeg(1)), ("0.cls", b"0")])
    assert "sample 0 has 0 images (.left.jpg, .right.jpg, .cls)" in error_of(tmp_path)


def test_a_name_among_numbers_is_a_mistake(tmp_path: Path):
    """It is no class of its own."""
    labels = [b"%d" % (n % 3) for n in range(200)] + [b"unknown"]
    members = [
        (f"{n}.{kind}", jpeg() if kind == "jpg" else cls) for n, cls in enumerate(labels) for kind in ("jpg", "cls")
    ]
    tar_of(tmp_path / "train/0.tar", members)
    listing = train(tmp_path)
    assert (len(listing.items), len(listing.classes), len(listing.unusable)) == (200, 3, 1)


def test_class_tars_follow_the_rules_of_folders(tmp_path: Path):
    """AppleDouble files, texts and hidden folders in them are counted."""
    members = [(f"{TENCH}_1.JPEG", jpeg()), (f"._{TENCH}_1.JPEG", b"x"), ("a.txt", b"x"), (".hidden/b.JPEG", jpeg())]
    tar_of(tmp_path / "ILSVRC2012_img_train.tar", [(f"{TENCH}.tar", tar_bytes(members)), ("._x.tar", b"x")])
    listing = train(tmp_path)
    assert (keys(listing), skipped(listing)) == ([f"{TENCH}_1"], {"AppleDouble": 2, "hidden": 1, "suffix .txt": 1})
