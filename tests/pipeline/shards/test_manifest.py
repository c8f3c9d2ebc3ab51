"""The manifest: what was skipped, classes without images, original paths; sets of earlier and later versions."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.imagenet.source import open_source
from pipeline.shards.build import Outcome, make_split, repair_split
from pipeline.shards.format import FORMAT_NAME, ORIGINALS, SkippedCount
from pipeline.shards.reader import open_shards
from pipeline.shards.settings import ResizeSettings, ShardSettings
from pipeline.shards.verify import verify
from pipeline.workers import IN_PROCESS, ignore
from tests.pipeline.imagenet.case_files import tree

SETTINGS = ShardSettings(ResizeSettings(short_side=32))


def make(source: Path, out: Path, work: Any = make_split) -> Outcome:
    return work(open_source(source).listing("train"), out, SETTINGS, IN_PROCESS, 10, ignore)


def source_of(root: Path) -> Path:
    """Two images of one name, an empty class, and files that are no images."""
    return tree(root, "train/cat/1.jpg", "train/dog/1.jpg", "train/dog/2.jpg", "train/eel/notes.txt", "train/.x/3.jpg")


def test_the_manifest_says_what_is_not_in_the_set(tmp_path: Path):
    """Counts by reason, and classes without images; a second run finds the set complete."""
    manifest = make(source_of(tmp_path / "in"), tmp_path / "out").manifest
    assert manifest.skipped == (SkippedCount("hidden", 1), SkippedCount("suffix .txt", 1))
    assert manifest.classes_without_images == ("eel",)
    assert open_shards(tmp_path / "out/train").manifest == manifest
    assert make(tmp_path / "in", tmp_path / "out").shards_written == 0


def test_original_paths_are_in_a_file_of_their_own(tmp_path: Path):
    """Only of keys that are not the file's name; the manifest has the hash, and repair writes the file again."""
    manifest = make(source_of(tmp_path / "in"), tmp_path / "out").manifest
    path = tmp_path / "out/train" / ORIGINALS
    content = path.read_bytes()
    found = {entry["key"]: entry["path"] for entry in map(json.loads, content.decode().splitlines())}
    assert found == {"cat_1": "train/cat/1.jpg", "dog_1": "train/dog/1.jpg"}
    assert manifest.originals_sha256 == hashlib.sha256(content).hexdigest()
    path.write_bytes(b"{}")
    assert [str(f) for f in verify(path.parent, False, IN_PROCESS, ignore)] == [
        "originals.jsonl: its sha256 is not the manifest's"
    ]
    assert make(tmp_path / "in", tmp_path / "out", repair_split).shards_written == 0
    assert path.read_bytes() == content
    path.unlink()
    assert [fault.what for fault in verify(path.parent, False, IN_PROCESS, ignore)] == ["missing"]


def test_without_changed_keys_there_is_no_such_file(tmp_path: Path):
    manifest = make(tree(tmp_path / "in", "train/cat/a.jpg"), tmp_path / "out").manifest
    assert manifest.originals_sha256 is None
    assert not (tmp_path / "out/train" / ORIGINALS).exists()


def as_version(path: Path, version: int, *without: str) -> None:
    """Rewrites a manifest as one of another version, without some fields."""
    fields = json.loads(path.read_text())
    fields = {name: value for name, value in fields.items() if name not in ("sha256", *without)}
    fields["format"] = f"{FORMAT_NAME}{version}"
    fields["sha256"] = hashlib.sha256(json.dumps(fields).encode()).hexdigest()
    path.write_text(json.dumps(fields, indent=1) + "\n")


def test_a_set_of_version_3_is_read_and_kept(tmp_path: Path):
    """Its tars and index are those of version 4, so its eigenbasis and checkpoints stay valid."""
    source = tree(tmp_path / "in", "train/cat/a.jpg")
    manifest = make(source, tmp_path / "out").manifest
    path = tmp_path / "out/train/manifest.json"
    as_version(path, 3, "skipped", "classes_without_images", "originals_sha256")
    text = path.read_bytes()
    assert open_shards(path.parent).manifest == manifest
    assert verify(path.parent, True, IN_PROCESS, ignore) == []
    assert make(source, tmp_path / "out").shards_written == 0
    assert path.read_bytes() == text


@pytest.mark.parametrize(("version", "fix"), [(2, "make the set again into another"), (5, "update this project")])
def test_other_versions_are_refused_with_the_fix(version: int, fix: str, tmp_path: Path):
    """By opening, by verify and by repair, which must not rebuild what a later version wrote."""
    source = tree(tmp_path / "in", "train/cat/a.jpg")
    make(source, tmp_path / "out")
    path = tmp_path / "out/train/manifest.json"
    as_version(path, version)
    for use in (
        lambda: open_shards(path.parent),
        lambda: verify(path.parent, False, IN_PROCESS, ignore),
        lambda: make(source, tmp_path / "out", repair_split),
    ):
        with pytest.raises(ValueError, match=f"format version {version}, expected one of .3, 4.; {fix}"):
            use()
    assert path.is_file()


def test_a_folder_that_is_no_set_is_not_touched(tmp_path: Path):
    """OUT/train of something else."""
    tree(tmp_path / "out", "train/x/a.jpg")
    with pytest.raises(ValueError, match=r"no manifest.json in it, so not a shard set; choose another OUT"):
        make(tree(tmp_path / "in", "train/cat/a.jpg"), tmp_path / "out")
