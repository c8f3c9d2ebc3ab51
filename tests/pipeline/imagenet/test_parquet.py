"""Layout `parquet`: classes from metadata and names, reads by row group, and errors that name file and row."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.imagenet import parquet
from pipeline.imagenet.item_reader import ItemReader
from pipeline.imagenet.listing import Item
from pipeline.imagenet.source import FIND_COLUMNS, ColumnNames, open_source
from tests.pipeline.imagenet.layout_files import (
    FOREIGN_ORDER,
    WORDS,
    Images,
    content,
    error_of,
    write_parquet_file,
)


def parquet_classes(root: Path, split: str = "train") -> list[tuple[str, str, str]]:
    """(key, wnid, words) of the items in the listing of `root`."""
    listing = open_source(root).listing(split)
    return [(i.key, listing.classes[i.label].wnid, listing.classes[i.label].words) for i in listing.items]


def test_rows_in_the_files_order_cost_one_read_per_row_group(
    roots: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, images: dict[str, Images]
):
    """No row group is read twice."""
    pytest.importorskip("pyarrow")
    listing = open_source(roots("parquet")).listing("train")
    read, groups = parquet._read_group, []
    monkeypatch.setattr(parquet, "_read_group", lambda p, f, g, c: [groups.append((p, g)), read(p, f, g, c)][1])
    assert content(listing) == images["train"]
    assert len(groups) == len(set(groups)) == -(-11 // 3) + -(-(len(listing.items) - 11) // 3)


def test_names_without_wnids_are_the_classes(tmp_path: Path):
    """They are sorted and the same in both splits. Two classes with one name get their label in it."""
    names = ["tench", "crane", "bonnet", "crane"]
    for split, labels in (("train", [0, 1, 3]), ("validation", [2])):
        rows = [(None, label, b"p") for label in labels]
        write_parquet_file(tmp_path / f"{split}-00000-of-00001.parquet", rows, names)
    expected = [("tench", "tench"), ("crane (1)", "crane"), ("crane (3)", "crane")]
    assert parquet_classes(tmp_path) == [(f"train-00000-of-00001_{n}", *c) for n, c in enumerate(expected)]
    assert parquet_classes(tmp_path, "val") == [("validation-00000-of-00001_0", "bonnet", "bonnet")]
    listing = open_source(tmp_path).listing("val")
    assert [c.wnid for c in listing.classes] == ["bonnet", "crane (1)", "crane (3)", "tench"]


def test_without_names_a_class_is_its_wnid_or_its_label(tmp_path: Path):
    """The wnid comes from the file names; the label is used if they have none."""
    path = tmp_path / "train-0.parquet"
    write_parquet_file(path, [("n00000002_1_n00000002.JPEG", 0, b"p"), ("x_n00000001.JPEG", 1, b"p")], [])
    assert [row[1:] for row in parquet_classes(tmp_path)] == [("n00000002", "n00000002"), ("n00000001", "n00000001")]
    write_parquet_file(path, [("a.JPEG", 10, b"p"), ("b.JPEG", 9, b"p")], [])
    assert parquet_classes(tmp_path) == [("a", "10", "10"), ("b", "09", "09")]


def test_without_pyarrow_the_message_says_what_to_install(
    roots: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
):
    """pyarrow is an optional dependency."""
    root = roots("parquet")
    for name in [n for n in sys.modules if n.partition(".")[0] == "pyarrow"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert "parquet: parquet needs pyarrow; run: pip install 'alexnet-pipeline[parquet]'" in error_of(root)


ROW = ("a.JPEG", 0, b"p")
WRONG_PARQUET: dict[str, Callable[[Path], object]] = {
    "1 files in its split, expected 2 (00001 is missing); download them all": lambda r: (
        r / "data/train-00001-of-00002.parquet"
    ).unlink(),
    "3 files in its split, expected 3 (they belong to different sets)": lambda r: write_parquet_file(
        r / "data/train-00002-of-00003.parquet", [ROW], [WORDS[wnid] for wnid in FOREIGN_ORDER]
    ),
    "train-00001-of-00002.parquet: not a whole parquet file": lambda r: (
        r / "data/train-00001-of-00002.parquet"
    ).write_bytes(b"<html>not found</html>"),
    "its class names differ from those of train-00000-of-00002.parquet": lambda r: write_parquet_file(
        r / "data/validation-00001-of-00002.parquet", [ROW], ["other"]
    ),
    "no row in it, nor in any other file of train": lambda r: [
        write_parquet_file(r / f"data/train-0000{n}-of-00002.parquet", [], [WORDS[w] for w in FOREIGN_ORDER])
        for n in "01"
    ],
}
WRONG_ROWS: dict[str, tuple[tuple[str | None, int | None, bytes | None], list[str]]] = {
    "row 1 has label -1, expected a number from 0 or a name": (("b.JPEG", -1, b"p"), []),
    "row 1 has label None, expected a number from 0 or a name": (("b.JPEG", None, b"p"), []),
    "no class 2 in the source's list of 1 classes": (("b.JPEG", 2, b"p"), ["tench"]),
}


@pytest.mark.parametrize("message", WRONG_PARQUET)
def test_a_wrong_parquet_file_is_named(message: str, roots: Callable[[str], Path], tmp_path: Path):
    """All files of a split must be there, intact and of one set."""
    root = shutil.copytree(roots("parquet"), tmp_path / "copy")
    WRONG_PARQUET[message](root)
    assert message in error_of(root)


@pytest.mark.parametrize("reason", WRONG_ROWS)
def test_a_wrong_row_is_not_an_item(reason: str, tmp_path: Path):
    """It is unusable, with a reason. If all rows are wrong, that is an error."""
    row, names = WRONG_ROWS[reason]
    path = tmp_path / "train-00000-of-00001.parquet"
    write_parquet_file(path, [ROW, row], names)
    listing = open_source(tmp_path).listing("train")
    assert ([item.key for item in listing.items], [image.key for image in listing.unusable]) == (["a"], ["b"])
    assert listing.unusable[0].reason == reason
    write_parquet_file(path, [row], names)
    assert f"{path.name}: {reason.replace('row 1', 'row 0')}" in error_of(tmp_path)


def test_a_row_without_image_bytes_is_empty(tmp_path: Path):
    """So it is quarantined when it is decoded. A file without any image bytes is an error."""
    path = write_parquet_file(tmp_path / "train-0.parquet", [ROW, ("b.JPEG", 0, None)], [])
    assert [data for _, data in content(open_source(tmp_path).listing("train")).values()] == [b"p", b""]
    write_parquet_file(path, [("b.JPEG", 0, None)], [])
    assert "train-0.parquet: no row has image bytes, only a path; use files with embedded images" in error_of(tmp_path)


def columns_of(root: Path, columns: dict[str, object], names: ColumnNames = FIND_COLUMNS) -> list[tuple[str, bytes]]:
    """(class, bytes) of the rows of a file with these columns."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table(columns), root / "train-0.parquet")
    listing = open_source(root, columns=names).listing("train")
    with ItemReader() as reader:
        return [(listing.classes[item.label].wnid, reader.read(item)) for item in listing.items]


def test_columns_are_found_by_type_and_name(tmp_path: Path):
    """Bytes in a struct or not; labels as integers, whole floats or names; a user names ambiguous columns."""
    assert columns_of(tmp_path, {"img": [b"p"], "label": [1.0]}) == [("1", b"p")]
    assert columns_of(tmp_path, {"image": [{"bytes": b"p"}], "text": ["x"], "fine_label": ["tench"]}) == [
        ("tench", b"p")
    ]
    both = {"left": [b"l"], "right": [b"r"], "fine_label": [1], "class_name": ["a"]}
    for names, message in (
        (FIND_COLUMNS, "columns left, right may hold the images; name one: --image-column left"),
        (
            ColumnNames("right"),
            "columns fine_label, class_name may hold the labels; name one: --label-column fine_label",
        ),
        (ColumnNames("middle"), "--image-column middle is none that can hold images"),
    ):
        with pytest.raises(ValueError, match=message):
            columns_of(tmp_path, both, names)
    assert columns_of(tmp_path, both, ColumnNames("right", "class_name")) == [("a", b"r")]
    with pytest.raises(ValueError, match=r"columns image \(binary\); expected image"):
        columns_of(tmp_path, {"image": [b"p"]})


def test_a_row_group_that_cannot_be_read_is_named(tmp_path: Path):
    """The positions are in the file's footer, so damage before it shows only when that row group is read."""
    path = write_parquet_file(tmp_path / "train-0.parquet", [(f"{n}.JPEG", 0, bytes(900)) for n in range(9)], [])
    listing = open_source(tmp_path).listing("train")
    data = bytearray(path.read_bytes())
    data[4:400] = b"\xff" * 396
    path.write_bytes(data)
    with ItemReader() as reader, pytest.raises(ValueError, match="row group 0 cannot be read"):
        reader.read(listing.items[0])


def test_an_item_holds_row_number_and_file_size(tmp_path: Path):
    """`offset` is the row; `size` is that of the file, by which a change is noticed."""
    path = write_parquet_file(tmp_path / "train-0.parquet", [(f"{n}.JPEG", 0, b"p") for n in range(5)], [])
    items = list(open_source(tmp_path).listing("train").items)
    assert items == [Item(str(n), 0, path, n, path.stat().st_size) for n in range(5)]
