"""Shard sets: read back as written, by this project and by other packages; the same bytes for any number of workers
and after any interruption."""

from __future__ import annotations

import gc
import hashlib
import importlib
import importlib.util
import json
import shutil
import sys
import tarfile
import types
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import webdataset
from nvidia.dali import fn, pipeline_def

from pipeline.imagenet.item_reader import ItemReader
from pipeline.imagenet.listing import Item, Items, Listing
from pipeline.imagenet.source import open_source
from pipeline.shards import build
from pipeline.shards.build import TooManyQuarantined, make_split, plan, run_jobs
from pipeline.shards.format import HASHED_MTIME_NS, WIDS_INDEX
from pipeline.shards.job import ShardJob
from pipeline.shards.reader import ShardSet, open_shards
from pipeline.shards.settings import ResizeSettings, ShardSettings
from pipeline.shards.transcode import transcode
from pipeline.shards.work_folder import locked
from pipeline.workers import IN_PROCESS, Workers, ignore, workers_of
from tests.support.shard_fixtures import SHARD_SETTINGS, decoded


@pytest.fixture(scope="module")
def listing(sample: Path) -> Listing:
    return open_source(sample).listing("train")


@pytest.fixture
def shards(shard_root: Path, tmp_path: Path) -> Path:
    """A copy of the train set that a test may damage."""
    return Path(shutil.copytree(shard_root / "train", tmp_path / "train"))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".json" or path.stem == "manifest"
    }


# ---- content ------------------------------------------------------------------------------------------------------


def test_every_image_is_stored_or_quarantined(train_shards: ShardSet, listing: Listing):
    stored = [train_shards.key(i) for i in range(len(train_shards))]
    quarantined = [q.key for q in train_shards.manifest.quarantined]
    assert sorted(stored + quarantined) == sorted(item.key for item in listing.items)


def test_the_truncated_image_is_quarantined_and_nothing_else(train_shards: ShardSet, sample: Path):
    oddities = json.loads((sample / "sample.json").read_text())["oddities"]
    assert [q.key for q in train_shards.manifest.quarantined] == [oddities["truncated"]]
    assert "truncated" in train_shards.manifest.quarantined[0].reason


def test_a_sample_is_its_resized_image_with_its_label(train_shards: ShardSet, listing: Listing):
    """Reading by sample id gives exactly the result of transcoding the item with that key."""
    items = {item.key: item for item in listing.items}
    with ItemReader() as reader:
        for sample_id, jpeg in enumerate(train_shards.jpegs(np.arange(len(train_shards)))):
            item, row = items[train_shards.key(sample_id)], train_shards.index[sample_id]
            encoded = transcode(reader.read(item), SHARD_SETTINGS.resize)
            assert jpeg.tobytes() == encoded.jpeg
            assert (row["label"], row["width"], row["height"]) == (item.label, encoded.width, encoded.height)


def test_samples_are_written_in_mixed_order(train_shards: ShardSet):
    """Neighbouring samples rarely share a class, unlike in the source, which is sorted by class."""
    labels = train_shards.index["label"]
    assert (labels[1:] == labels[:-1]).mean() < 0.5
    assert not (np.sort(labels) == labels).all()


def test_the_plan_is_a_partition_that_depends_on_the_seed_alone(listing: Listing):
    first, again = (list(plan(listing, SHARD_SETTINGS, Path("x"))) for _ in range(2))
    other = list(plan(listing, ShardSettings(seed=8, shard_samples=20), Path("x")))
    assert first == again != other
    assert sorted(i.key for job in first for i in job.items) == sorted(i.key for i in listing.items)
    assert [len(job.items) for job in first] == [20, 20, 8]


@pytest.mark.filterwarnings("ignore:.*tar:pytest.PytestUnraisableExceptionWarning")  # webdataset leaves tars open
def test_webdataset_reads_every_sample(train_shards: ShardSet):
    """The webdataset package gives the keys, bytes and labels that the index gives, in the same order."""
    urls = [str(tar) for tar in train_shards.tars]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    gc.collect()
    assert [s["__key__"] for s in samples] == [train_shards.key(i) for i in range(len(train_shards))]
    assert [s["jpg"] for s in samples] == [j.tobytes() for j in train_shards.jpegs(np.arange(len(train_shards)))]
    assert [int(s["cls"]) for s in samples] == train_shards.index["label"].tolist()


def test_dali_reads_every_sample_with_our_idx(train_shards: ShardSet):
    """fn.readers.webdataset with our .idx gives the same bytes and ASCII labels in the same order."""
    tars = [str(tar) for tar in train_shards.tars]

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def reading():
        return tuple(
            fn.readers.webdataset(
                paths=tars,
                index_paths=[tar.replace(".tar", ".idx") for tar in tars],
                ext=["jpg", "cls"],
                missing_component_behavior="error",
            )
        )

    pipe = reading()
    pipe.build()
    expected = train_shards.jpegs(np.arange(len(train_shards)))
    for sample_id, jpeg in enumerate(expected):
        found, label = pipe.run()
        assert found.at(0).tobytes() == jpeg.tobytes()
        assert int(label.at(0).tobytes()) == train_shards.index["label"][sample_id]


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_wids_reads_every_sample_with_our_index(
    train_shards: ShardSet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """wids.ShardListDataset gives, by random access, the bytes and labels that our index gives."""
    wids = pytest.importorskip("wids")
    monkeypatch.setenv("WIDS_CACHE", str(tmp_path))
    samples = wids.ShardListDataset(str(train_shards.folder / WIDS_INDEX), transformations=[])
    assert len(samples) == len(train_shards)
    for sample_id in reversed(range(len(train_shards))):
        (jpeg,) = train_shards.jpegs(np.array([sample_id]))
        found = samples[sample_id]
        assert found[".jpg"].read() == jpeg.tobytes()
        assert int(found[".cls"].read()) == train_shards.index["label"][sample_id]


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_timm_reads_every_sample_with_our_info(train_shards: ShardSet):
    """timm's reader finds the split, its length and its tars in _info.json, and decodes the same images."""
    found = importlib.util.find_spec("timm")
    if found is None or found.submodule_search_locations is None:
        pytest.skip("timm is not installed")
    # timm requires torchvision but its readers do not: import them as a package of their own
    readers = types.ModuleType("timm_readers")
    readers.__path__ = [f"{found.submodule_search_locations[0]}/data/readers"]
    sys.modules["timm_readers"] = readers
    reader = importlib.import_module("timm_readers.reader_wds").ReaderWds(str(train_shards.folder), split="train")
    assert len(reader) == len(train_shards)
    for sample_id, (image, label) in enumerate(reader):
        np.testing.assert_array_equal(np.asarray(image), decoded(train_shards, sample_id))
        assert label == train_shards.index["label"][sample_id]
    assert sample_id == len(train_shards) - 1


def test_tar_members_carry_no_time_owner_or_spaces(train_shards: ShardSet):
    with tarfile.open(train_shards.tars[0]) as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
            assert " " not in member.name
            assert member.pax_headers == {}


# ---- reproducibility ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_the_bytes(workers: int, listing: Listing, shard_root: Path, tmp_path: Path):
    with workers_of(workers, build.__name__) as crew:
        make_split(listing, tmp_path, SHARD_SETTINGS, crew, 10, ignore)
    expected = bytes_of(shard_root / "train")
    expected.pop("mean_image.npy")
    assert bytes_of(tmp_path / "train") == expected


def test_an_interrupted_run_is_finished_to_the_same_bytes(
    listing: Listing, shard_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """After an interruption in the second shard there is no final folder. The next run makes only missing shards."""
    made = []
    real = build.run_job

    def failing(job):
        if job.name == "train-000001" and len(made) == 1:
            made.append("stopped")
            raise KeyboardInterrupt
        made.append(job.name)
        return real(job)

    monkeypatch.setattr(build, "run_job", failing)
    with pytest.raises(KeyboardInterrupt):
        make_split(listing, tmp_path, SHARD_SETTINGS, IN_PROCESS, 10, ignore)
    assert [path.name for path in tmp_path.iterdir()] == ["train.unfinished"]
    make_split(listing, tmp_path, SHARD_SETTINGS, IN_PROCESS, 10, ignore)
    assert made == ["train-000000", "stopped", "train-000001", "train-000002"]
    expected = bytes_of(shard_root / "train")
    expected.pop("mean_image.npy")
    assert bytes_of(tmp_path / "train") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_a_shard_that_fails_halfway_leaves_nothing_under_its_name(listing: Listing, tmp_path: Path):
    job = next(plan(listing, SHARD_SETTINGS, tmp_path))
    items = Items.of([*islice(job.items, 3), Item("k", 0, job.items[0].file, 0, 1)])
    with pytest.raises(ValueError, match="changed since it was listed"):
        build.run_job(ShardJob(job.folder, job.name, items, job.resize))
    assert list(tmp_path.iterdir()) == []


def test_any_executor_gives_the_same_results(listing: Listing, tmp_path: Path):
    """Jobs run on any concurrent.futures executor, here threads, and results are in plan order."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    here = run_jobs(plan(listing, SHARD_SETTINGS, tmp_path / "a"), IN_PROCESS, ignore)
    with ThreadPoolExecutor(2) as pool:
        there = run_jobs(plan(listing, SHARD_SETTINGS, tmp_path / "b"), Workers(pool, 2), ignore)
    for one, other in zip(here, there, strict=True):
        assert (one.record, one.quarantined) == (other.record, other.quarantined)
        np.testing.assert_array_equal(one.rows, other.rows)


def test_a_finished_set_is_left_alone(listing: Listing, shards: Path):
    before = {path: path.stat().st_mtime_ns for path in shards.iterdir()}
    make_split(listing, shards.parent, SHARD_SETTINGS, IN_PROCESS, 10, ignore)
    assert {path: path.stat().st_mtime_ns for path in shards.iterdir()} == before


def test_other_settings_over_a_finished_set_are_refused_with_the_difference(listing: Listing, shards: Path):
    other = ShardSettings(ResizeSettings(quality=50), SHARD_SETTINGS.seed, SHARD_SETTINGS.shard_samples)
    with pytest.raises(ValueError, match=r"made with other settings or source \(quality 90, now 50\)"):
        make_split(listing, shards.parent, other, IN_PROCESS, 10, ignore)


def test_too_many_undecodable_images_publish_nothing(listing: Listing, tmp_path: Path):
    with pytest.raises(TooManyQuarantined, match="1 of 48 images cannot be decoded, at most 0"):
        make_split(listing, tmp_path, SHARD_SETTINGS, IN_PROCESS, 0, ignore)
    assert [path.name for path in tmp_path.iterdir()] == ["train.unfinished"]
    assert make_split(listing, tmp_path, SHARD_SETTINGS, IN_PROCESS, 1, ignore).manifest.samples == 47


def test_two_runs_at_once_on_one_folder_are_refused(listing: Listing, tmp_path: Path):
    with locked(tmp_path / "train.unfinished"), pytest.raises(ValueError, match="another run is writing"):
        make_split(listing, tmp_path, SHARD_SETTINGS, IN_PROCESS, 10, ignore)


# ---- damaged sets -------------------------------------------------------------------------------------------------


def test_the_manifest_has_every_hash(train_shards: ShardSet):
    for record, tar in zip(train_shards.manifest.shards, train_shards.tars, strict=True):
        assert hashlib.sha256(tar.read_bytes()).hexdigest() == record.sha256


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-512])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train-000001.tar", flip_a_bit, "train-000001.tar: sha256 .* it was changed"),
        ("train-000001.tar", cut, r"train-000001.tar: \d+ bytes, expected \d+; it was changed"),
        ("train-000001.tar", Path.unlink, "train-000001.tar: missing"),
        ("index.npy", flip_a_bit, "index.npy: its sha256 is not the one"),
        ("index.npy", Path.unlink, "index.npy: missing"),
        ("manifest.json", Path.unlink, "no manifest.json here, so not a shard set"),
        ("manifest.json", cut, "manifest.json: not a shard set's manifest"),
    ],
)
def test_damage_is_named_on_opening(shards: Path, name: str, damage, message: str):
    damage(shards / name)
    with pytest.raises(ValueError, match=message):
        open_shards(shards)


def test_a_copy_without_times_is_hashed_once(shards: Path):
    hashed: list[int] = []
    for tar in shards.glob("*.tar"):
        tar.touch()
    open_shards(shards, hashed.append)
    assert len(hashed) == 3
    assert all(tar.stat().st_mtime_ns == HASHED_MTIME_NS for tar in shards.glob("*.tar"))
    open_shards(shards, hashed.append)
    assert len(hashed) == 3


def test_the_parent_folder_is_refused_with_a_hint(shard_root: Path):
    with pytest.raises(ValueError, match=r"did you mean .*train\?"):
        open_shards(shard_root)
