"""Faults during a sharding run: the error names the cause, nothing is lost, and the next run completes the set."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline import files
from pipeline.imagenet.listing import Listing
from pipeline.imagenet.source import open_source
from pipeline.shards import build
from pipeline.shards.build import make_split
from pipeline.workers import IN_PROCESS, ignore, workers_of
from tests.support.shard_fixtures import SHARD_SETTINGS, files_of


@pytest.fixture(scope="module")
def listing(sample: Path) -> Listing:
    return open_source(sample).listing("train")


@pytest.fixture(scope="module")
def expected(listing: Listing, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an uninterrupted run."""
    out = tmp_path_factory.mktemp("undisturbed")
    make_split(listing, out, SHARD_SETTINGS, IN_PROCESS, 10, ignore)
    return files_of(out)


def completes(listing: Listing, out: Path, expected: dict[str, bytes]) -> None:
    """Asserts that the same call once more gives exactly the files of an uninterrupted run."""
    make_split(listing, out, SHARD_SETTINGS, IN_PROCESS, 10, ignore)
    assert files_of(out) == expected


@pytest.mark.parametrize("at", [".tar", ".idx", ".json", "index.npy", "manifest.json"])
def test_a_full_disk(at: str, listing: Listing, tmp_path: Path, expected, monkeypatch: pytest.MonkeyPatch):
    """The disk is full when a file `at` is flushed: the error names the file, and no final name has partial content."""
    real = os.fsync

    def full(descriptor: int) -> None:
        if at in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device") as caught:
            make_split(listing, tmp_path, SHARD_SETTINGS, IN_PROCESS, 10, ignore)
    assert at in str(caught.value.filename)
    assert [path.name for path in tmp_path.iterdir()] == ["train.unfinished"]
    assert not list((tmp_path / "train.unfinished").glob(".*.tmp"))
    completes(listing, tmp_path, expected)


def test_a_read_only_folder(listing: Listing, tmp_path: Path, expected):
    """Without write permission the error names the folder; with permission the run completes."""
    tmp_path.chmod(0o555)
    with without_root(), pytest.raises(PermissionError) as caught:
        make_split(listing, tmp_path / "out", SHARD_SETTINGS, IN_PROCESS, 10, ignore)
    assert str(tmp_path) in str(caught.value.filename)
    tmp_path.chmod(0o755)
    completes(listing, tmp_path / "out", expected)


@contextmanager
def without_root() -> Iterator[None]:
    """Root may write anywhere, so this changes the effective user for the length of the block."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    if user == 0:
        os.seteuid(0)


def test_a_source_that_changes_between_plan_and_work(sample: Path, tmp_path: Path, expected):
    """A tar is cut short after it was listed: the error names the image. With the original file the run completes."""
    source = Path(shutil.copytree(sample, tmp_path / "source"))
    listing = open_source(source).listing("train")
    tar = listing.items[0].file
    data = tar.read_bytes()
    tar.write_bytes(data[: len(data) // 3])
    with pytest.raises(ValueError, match="changed since it was listed"):
        make_split(listing, tmp_path / "out", SHARD_SETTINGS, IN_PROCESS, 10, ignore)
    tar.unlink()
    with pytest.raises(ValueError, match="gone since it was listed"):
        make_split(listing, tmp_path / "out", SHARD_SETTINGS, IN_PROCESS, 10, ignore)
    tar.write_bytes(data)
    completes(listing, tmp_path / "out", expected)


def die(job: build.ShardJob) -> build.ShardResult:
    """Like run_job, but kills its worker halfway through the second shard."""
    if job.name.endswith("1"):
        with files.published(job.folder / f"{job.name}.tar") as file:
            file.write(b"half a shard")
            file.flush()
            os.kill(os.getpid(), 9)
    return build.run_job(job)


def test_a_worker_that_dies(listing: Listing, tmp_path: Path, expected, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(build, "run_job", die)
        with pytest.raises(OSError, match="a worker died"), workers_of(2, build.__name__) as workers:
            make_split(listing, tmp_path, SHARD_SETTINGS, workers, 10, ignore)
    completes(listing, tmp_path, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
def test_killing_a_worker_of_a_dask_cluster_does_not_change_the_bytes(listing: Listing, tmp_path: Path, expected):
    """Two workers and a scheduler. One worker is killed after the first shard; its job runs again on the other."""
    distributed = pytest.importorskip("distributed")
    killed: list[int] = []
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1"
    ) as cluster:

        def kill_one(n: int) -> None:
            if not killed:
                worker = next(iter(cluster.workers.values()))
                killed.append(worker.pid)
                os.kill(worker.pid, 9)

        with workers_of(1, build.__name__, engine=cluster.scheduler_address) as workers:
            make_split(listing, tmp_path, SHARD_SETTINGS, workers, 10, kill_one)
    assert killed
    assert files_of(tmp_path) == expected
