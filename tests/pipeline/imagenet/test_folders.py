"""Layout `folders`: order, keys and fingerprint of image files in class folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.imagenet.item_reader import ItemReader
from pipeline.imagenet.source import open_source


def folders_of(root: Path, names: dict[str, list[str]]) -> Path:
    """`root` with class folders; a file's content is its path."""
    for wnid, files in names.items():
        (root / "train" / wnid).mkdir(parents=True)
        for name in files:
            (root / "train" / wnid / name).write_bytes(f"{wnid}/{name}".encode())
    return root


def test_folders_are_listed_in_order_with_unique_keys(tmp_path: Path):
    """A name used in two classes gets its class as prefix; other names stay; files that are no images are ignored."""
    root = folders_of(tmp_path, {"n2": ["b.JPEG", "a.jpg"], "n1": ["b.JPEG", "notes.txt"]})
    listing = open_source(root).listing("train")
    assert [(i.key, i.label) for i in listing.items] == [("n1_b", 0), ("a", 1), ("n2_b", 1)]
    assert [c.wnid for c in listing.classes] == ["n1", "n2"]
    with ItemReader() as reader:
        assert [reader.read(i) for i in listing.items] == [b"n1/b.JPEG", b"n2/a.jpg", b"n2/b.JPEG"]


def test_keys_have_no_dots_or_spaces(tmp_path: Path):
    """WebDataset splits a member's name at the first dot."""
    root = folders_of(tmp_path, {"n1": ["a b.c.JPEG"]})
    assert open_source(root).listing("train").items[0].key == "a_b_c"


def test_a_name_too_long_for_a_tar_is_cut(tmp_path: Path):
    """The limit is 90 characters. The listing has the original path."""
    root = folders_of(tmp_path, {"n1": ["x" * 91 + ".JPEG", "x" * 91 + "y.JPEG"]})
    listing = open_source(root).listing("train")
    keys = [item.key for item in listing.items]
    assert [len(key) for key in keys] == [90, 90]
    assert list(listing.originals.items()) == [
        (key, f"train/n1/{'x' * 91}{end}.JPEG") for key, end in zip(keys, ("", "y"), strict=True)
    ]


def test_the_fingerprint_changes_with_the_source(tmp_path: Path):
    """Another size of one file is enough."""
    root = folders_of(tmp_path, {"n1": ["a.JPEG", "b.JPEG"]})
    before = open_source(root).listing("train").record()
    (root / "train" / "n1" / "a.JPEG").write_bytes(b"longer than it was")
    assert open_source(root).listing("train").record() != before


def test_a_file_that_grows_after_the_listing_is_noticed(tmp_path: Path):
    """Its first bytes alone would be a truncated image."""
    root = folders_of(tmp_path, {"n1": ["a.JPEG"]})
    item = open_source(root).listing("train").items[0]
    item.file.write_bytes(b"another length altogether")
    with ItemReader() as reader, pytest.raises(ValueError, match="changed since it was listed"):
        reader.read(item)
