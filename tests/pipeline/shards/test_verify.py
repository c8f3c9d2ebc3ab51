"""Verify names each planted fault; repair restores the original bytes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.imagenet.listing import Listing
from pipeline.imagenet.source import open_source
from pipeline.shards import build
from pipeline.shards.build import repair_split
from pipeline.shards.reader import ShardSet, open_shards
from pipeline.shards.settings import ResizeSettings, ShardSettings
from pipeline.shards.verify import Fault, verify
from pipeline.workers import IN_PROCESS, ignore, workers_of
from tests.support.shard_fixtures import SHARD_SETTINGS, write_set
from tests.support.shard_fixtures import sample as sample_of


@pytest.fixture(scope="module")
def listing(sample: Path) -> Listing:
    return open_source(sample).listing("train")


@pytest.fixture
def folder(shard_root: Path, tmp_path: Path) -> Path:
    """A copy of the train set that a test may damage."""
    return Path(shutil.copytree(shard_root / "train", tmp_path / "train"))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def in_image(folder: Path, shards: ShardSet) -> str:
    flip(folder / "train-000001.tar", int(shards.index["offset"][25] + 700))
    return f"train-000001.tar, bytes .*, sample {shards.key(25)}: the image's bytes changed"


def in_header(folder: Path, shards: ShardSet) -> str:
    key = shards.key(25)
    flip(folder / "train-000001.tar", int(shards.index["offset"][25] - 500))
    return f"sample {key}: the header before the image changed"


def in_label(folder: Path, shards: ShardSet) -> str:
    row = shards.index[25]
    blocks = -(-int(row["size"]) // 512) * 512
    flip(folder / "train-000001.tar", int(row["offset"]) + blocks + 512)
    return f"sample {shards.key(25)}: the label, its header or the padding changed"


def in_the_end(folder: Path, shards: ShardSet) -> str:
    flip(folder / "train-000001.tar", -1)
    return "train-000001.tar, bytes .*: bytes behind the last sample changed"


def cut(folder: Path, shards: ShardSet) -> str:
    data = (folder / "train-000001.tar").read_bytes()
    (folder / "train-000001.tar").write_bytes(data[: len(data) // 2])
    return rf"train-000001.tar, bytes \d+ to \d+: {len(data) // 2} bytes, expected {len(data)}"


def no_tar(folder: Path, shards: ShardSet) -> str:
    (folder / "train-000002.tar").unlink()
    return "train-000002.tar: missing"


def no_idx(folder: Path, shards: ShardSet) -> str:
    (folder / "train-000000.idx").unlink()
    return "train-000000.idx: missing"


def in_idx(folder: Path, shards: ShardSet) -> str:
    flip(folder / "train-000000.idx", 60)
    return "train-000000.idx: not the index of its tar"


def in_index(folder: Path, shards: ShardSet) -> str:
    flip(folder / "index.npy", -10)
    return "index.npy: .*its sha256 is not the one"


def in_manifest(folder: Path, shards: ShardSet) -> str:
    text = (folder / "manifest.json").read_text()
    words = shards.manifest.classes[1].words
    (folder / "manifest.json").write_text(text.replace(words, words.upper()))
    return "manifest.json: missing or damaged .*its own sha256"


def in_wids(folder: Path, shards: ShardSet) -> str:
    flip(folder / "wids.json", 60)
    return "wids.json: does not match the manifest"


def no_info(folder: Path, shards: ShardSet) -> str:
    (folder / "_info.json").unlink()
    return "_info.json: missing"


IN_TARS = [in_image, in_header, in_label, in_the_end, cut, no_tar]
DAMAGE = [*IN_TARS, no_idx, in_idx, in_index, in_wids, no_info, in_manifest]


def faults_of(folder: Path, deep: bool = False) -> list[Fault]:
    return verify(folder, deep, IN_PROCESS, ignore)


def test_a_set_as_it_was_written_has_no_fault(folder: Path):
    counted: list[int] = []
    assert verify(folder, True, IN_PROCESS, counted.append) == []
    assert sum(counted) == len(open_shards(folder))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_planted_fault_is_named_and_repaired(damage: Callable, folder: Path, listing: Listing):
    before = bytes_of(folder)
    message = damage(folder, open_shards(folder))
    named = [str(fault) for fault in faults_of(folder)]
    assert any(re.search(message, line) for line in named), named
    repair_split(listing, folder.parent, SHARD_SETTINGS, IN_PROCESS, 10, ignore)
    assert bytes_of(folder) == before
    assert sorted(path.name for path in folder.parent.iterdir()) == ["train"]
    assert faults_of(folder) == []


def test_only_the_damaged_sample_is_named(folder: Path):
    """One flipped bit in an image gives one fault, which names that image's bytes."""
    shards = open_shards(folder)
    in_image(folder, shards)
    (fault,) = faults_of(folder)
    row = shards.index[25]
    assert (fault.start, fault.end) == (row["offset"], row["offset"] + row["size"])
    assert fault.sample == shards.key(25)


def test_only_damaged_shards_are_rebuilt(folder: Path, listing: Listing, monkeypatch: pytest.MonkeyPatch):
    rebuilt = []
    real = build.run_job
    monkeypatch.setattr(build, "run_job", lambda job: (rebuilt.append(job.name), real(job))[1])
    in_image(folder, open_shards(folder))
    repair_split(listing, folder.parent, SHARD_SETTINGS, IN_PROCESS, 10, ignore)
    assert rebuilt == ["train-000001"]
    repair_split(listing, folder.parent, SHARD_SETTINGS, IN_PROCESS, 10, ignore)
    assert rebuilt == ["train-000001"]


def test_an_interrupted_repair_is_finished(folder: Path, listing: Listing, monkeypatch: pytest.MonkeyPatch):
    before = bytes_of(folder)
    in_image(folder, open_shards(folder))

    def dying(job: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "run_job", dying)
        with pytest.raises(KeyboardInterrupt):
            repair_split(listing, folder.parent, SHARD_SETTINGS, IN_PROCESS, 10, ignore)
    repair_split(listing, folder.parent, SHARD_SETTINGS, IN_PROCESS, 10, ignore)
    assert bytes_of(folder) == before


def test_repair_with_other_settings_is_refused_and_changes_nothing(folder: Path, listing: Listing):
    in_image(folder, open_shards(folder))
    before = bytes_of(folder)
    other = ShardSettings(ResizeSettings(quality=50), SHARD_SETTINGS.seed, SHARD_SETTINGS.shard_samples)
    with pytest.raises(
        ValueError, match=r"made with other settings or source \(quality 90, now 50\); repair it from the same"
    ):
        repair_split(listing, folder.parent, other, IN_PROCESS, 10, ignore)
    assert bytes_of(folder) == before


def test_two_workers_find_what_one_finds(folder: Path):
    in_image(folder, open_shards(folder))
    with workers_of(2, build.__name__) as workers:
        assert verify(folder, True, workers, ignore) == faults_of(folder, deep=True)


def test_deep_finds_an_undecodable_image_although_every_hash_is_right(tmp_path: Path):
    """The set was written from a truncated image: its hashes are right, but decoding fails."""
    write_set(tmp_path, [sample_of(0), sample_of(1, sample_of(1).jpeg[:3000])])
    assert faults_of(tmp_path) == []
    (fault,) = faults_of(tmp_path, deep=True)
    assert "cannot be decoded" in fault.what
