"""Listings: columns hold the items that went in, keys are unique, and `Items.take` keeps only what it needs."""

from __future__ import annotations

import hashlib
import pickle
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pipeline.imagenet import listing
from pipeline.imagenet.keys import key_of, unique
from pipeline.imagenet.labels import WNID
from pipeline.imagenet.listing import ClassName, Item, Items, Listing

CLASS_NAMES = ["n00000001", "n00000002", "tench, Tinca"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 7, so that a few items cross chunk boundaries as a million items do."""
    monkeypatch.setattr(listing, "ITEMS_PER_CHUNK", 7)


def some_items(count: int, seed: int = 0, keys: int = 10**6) -> list[Item]:
    """Random items in several folders and files, with one of `keys` different keys each."""
    rng = random.Random(seed)
    return [
        Item(
            f"k{rng.randrange(keys)}",
            rng.randrange(len(CLASS_NAMES)),
            Path(rng.choice(["/", "", "a/b", "/dätä/\udcff"]), f"{rng.randrange(30)}.tar"),
            rng.randrange(2**40),
            rng.randrange(2**33),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("count", [0, 1, 7, 50])
def test_items_are_the_list_they_were_made_of(count: int):
    """The reference is the list: length, order, indices from both ends, any rows, and the same after pickling."""
    plain = some_items(count)
    items = Items.of(iter(plain))
    assert len(items) == count
    assert list(items) == plain
    assert [items[i] for i in range(-count, count)] == plain + plain
    rows = np.random.default_rng(1).integers(0, max(count, 1), 2 * count)
    assert list(items.take(rows)) == [plain[i] for i in rows]
    assert list(pickle.loads(pickle.dumps(items))) == plain
    with pytest.raises(IndexError):
        items[count]


def test_equal_means_the_same_items():
    """Equality ignores the numbering of folders and the width of keys; a difference in any field counts."""
    plain = some_items(20)
    items = Items.of(plain)
    wider = Items.of([*plain, Item("k" * 80, 0, Path("/other/a.tar"), 0, 0)])
    assert items == wider.take(np.arange(20)) == Items.of(plain[::-1]).take(np.arange(20)[::-1])
    assert items != wider
    assert items != plain
    for other in (
        Item("other", plain[0].label, plain[0].file, plain[0].offset, plain[0].size),
        Item(plain[0].key, plain[0].label + 1, plain[0].file, plain[0].offset, plain[0].size),
        Item(plain[0].key, plain[0].label, Path("elsewhere") / plain[0].file.name, plain[0].offset, plain[0].size),
        Item(plain[0].key, plain[0].label, plain[0].file.with_name("b"), plain[0].offset, plain[0].size),
        Item(plain[0].key, plain[0].label, plain[0].file, plain[0].offset + 1, plain[0].size),
        Item(plain[0].key, plain[0].label, plain[0].file, plain[0].offset, plain[0].size + 1),
    ):
        assert Items.of([other, *plain[1:]]) != items


def test_items_cannot_be_changed():
    """Columns are read-only, also after pickling. A slice is an error, because it is neither an item nor `Items`."""
    for items in (Items.of(some_items(3)), pickle.loads(pickle.dumps(Items.of(some_items(3))))):
        with pytest.raises(ValueError, match="read-only"):
            items.label[0] = 1
        with pytest.raises(TypeError):
            items[0:2]


def test_take_keeps_only_the_folders_that_it_needs():
    """A job with 10 items of 1,000 folders is sent to its worker without the other 990 folders."""
    items = Items.of(Item(f"k{n}", 0, Path(f"/a/long/name/of/a/folder/{n}/x.jpg"), 0, 1) for n in range(1000))
    few = items.take(np.arange(500, 510))
    assert few.parents == tuple(f"/a/long/name/of/a/folder/{n}" for n in range(500, 510))
    assert len(pickle.dumps(few)) < 3000 < len(pickle.dumps(items)) / 10


def test_the_record_is_the_digest_of_a_line_per_item():
    """The reference joins the lines and hashes them at once."""
    plain = some_items(30)
    classes = tuple(ClassName(name, name) for name in CLASS_NAMES)
    lines = "".join(f"{item.key} {item.label} {item.size}\n" for item in plain)
    assert Listing("folders", "train", classes, Items.of(plain)).record() == {
        "layout": "folders",
        "images": 30,
        "fingerprint": hashlib.sha256(lines.encode()).hexdigest(),
    }


@pytest.mark.parametrize("seed", range(5))
def test_only_repeated_keys_get_their_class_as_prefix(seed: int):
    """The reference goes through the items one by one."""
    plain = list({(i.key, i.label): i for i in some_items(25, seed, keys=20)}.values())
    counts = Counter(item.key for item in plain)
    prefixes = ["n00000001", "n00000002", "tench__Tinca"]
    expected = [i.key if counts[i.key] == 1 else f"{prefixes[i.label]}_{i.key}" for i in plain]
    assert max(counts.values()) > 1
    found = unique(Items.of(plain), CLASS_NAMES)
    assert [item.key for item in found] == expected
    assert [(i.label, i.file, i.offset, i.size) for i in found] == [(i.label, i.file, i.offset, i.size) for i in plain]


@pytest.mark.parametrize("keys", [["a", "b", "a"], ["x" * 85, "b", "x" * 85]])
def test_a_key_gets_a_digest_if_its_class_does_not_help(keys: list[str]):
    """The same name twice in a class, or a prefix that makes the key too long.

    A key does not depend on the order of the files, nor on the folder of the source.
    """
    files = ["a.jpg", "b.jpg", "c.jpg"]

    def keys_of(folder: str, order: slice) -> dict[str, str]:
        items = [Item(key, 0, Path(folder, file), 0, 1) for key, file in zip(keys, files, strict=True)][order]
        return {item.file.name: item.key for item in unique(Items.of(items), CLASS_NAMES, Path(folder))}

    found = keys_of("d", slice(None))
    assert found == keys_of("/other/e", slice(None, None, -1))
    assert found["b.jpg"] == "b"
    assert len(set(found.values())) == 3
    assert all(re.fullmatch(r"n00000001_(a|x+)_[0-9a-f]{12}", found[name]) for name in ("a.jpg", "c.jpg"))
    assert all(len(key) <= 90 for key in found.values())


def test_hard_links_have_keys_of_their_own():
    """Two items at the same bytes of the same file."""
    items = Items.of([Item("a", 0, Path("x.tar"), 512, 1)] * 3)
    assert len({item.key for item in unique(items, CLASS_NAMES)}) == 3


@pytest.mark.parametrize(
    ("name", "key", "wnid"),
    [
        ("n01440764/n01440764_10026.JPEG", "n01440764_10026", "n01440764"),
        ("ILSVRC2012_val_00000001_n01751748.JPEG", "ILSVRC2012_val_00000001_n01751748", "n01751748"),
        ("n01440764.jpg", "n01440764", "n01440764"),
        ("a b.c.png", "a_b_c", None),
        ("xn01440764_1.jpg", "xn01440764_1", None),
        ("n014407641_1.jpg", "n014407641_1", None),
    ],
)
def test_a_key_comes_from_the_file_name_and_may_hold_a_wnid(name: str, key: str, wnid: str | None):
    """A wnid is a part of the key between underscores or its ends."""
    assert key_of(name) == key
    found = WNID.search(key)
    assert (found[1] if found else None) == wnid
