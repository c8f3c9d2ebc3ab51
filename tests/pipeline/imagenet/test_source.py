"""Sources: all layouts give the same listing for the same images; folders without a layout are errors."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.imagenet.item_reader import ItemReader
from pipeline.imagenet.source import LAYOUTS, open_source
from tests.pipeline.imagenet.layout_files import WNIDS, WORDS, Images, content, error_of, file_of


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_images_and_classes(
    layout: str, split: str, roots: Callable[[str], Path], images: dict[str, Images]
):
    """The layout is detected or named, items are read in any order, classes are sorted by wnid and have words if the
    layout has them."""
    root = roots(layout)
    source = open_source(root)
    assert (source.layout, source.splits()) == (layout, ["train", "val"])
    listing = source.listing(split)
    assert content(listing) == content(listing, slice(None, None, -1)) == images[split]
    words = WORDS if layout in ("ilsvrc", "kaggle", "parquet") else {wnid: wnid for wnid in WNIDS}
    assert [(c.wnid, c.words) for c in listing.classes] == sorted(words.items())
    assert (listing.layout, listing.split) == (layout, split)
    assert open_source(root, layout).listing(split) == listing


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_that_is_named_but_not_there_is_an_error(layout: str, tmp_path: Path):
    """The message says what was found and what was expected."""
    file_of(tmp_path / "notes.txt", b"")
    assert f"layout {layout} is not here (found notes.txt); expected " in error_of(tmp_path, layout=layout)
    assert error_of(tmp_path / "none", layout=layout).count("no such folder; expected one with ") == 1


def test_an_unknown_layout_is_an_error(tmp_path: Path):
    """The message lists the layouts."""
    with pytest.raises(ValueError, match="layout 'lmdb', expected one of ilsvrc, kaggle, parquet, webdataset, folders"):
        open_source(tmp_path, "lmdb")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_that_changes_after_the_listing_is_named(layout: str, roots: Callable[[str], Path], tmp_path: Path):
    """A file that is shorter, empty or gone is an error that names file and image."""
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


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no such folder"),
        (["other"], "no ImageNet layout here"),
        (["train"], "train: empty; "),
        (["train/n1"], "train: no image in it"),
    ],
)
def test_a_folder_without_images_is_an_error(tmp_path: Path, names: list[str], message: str):
    """No folder, no split, no class folder and an empty class folder have messages of their own."""
    root = tmp_path / "root"
    for name in names:
        (root / name).mkdir(parents=True)
    assert message in error_of(root)
