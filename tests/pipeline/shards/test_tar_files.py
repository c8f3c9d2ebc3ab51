"""Tars that change while they are in use: no signal ends the process, and the message names the tar."""

from __future__ import annotations

import copy
import os
import pickle
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.shards import tar_files
from pipeline.shards.reader import ShardSet, open_shards
from pipeline.shards.tar_files import TarFiles
from tests.support.tool_runs import ENVIRONMENT

SIZE = 10_000


@pytest.fixture
def tars(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"train-{number:06d}.tar" for number in range(6)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * SIZE)
    return paths


def files_of(tars: list[Path]) -> TarFiles:
    return TarFiles(tars, [SIZE] * len(tars))


def test_parts_are_those_of_the_files(train_shards: ShardSet):
    """Read-only, in the order that was asked for; no part gives none."""
    ids = np.array([5, 0, 17, 5])
    for sample_id, jpeg in zip(ids, train_shards.jpegs(ids), strict=True):
        row = train_shards.index[sample_id]
        data = train_shards.tars[row["shard"]].read_bytes()
        assert jpeg.tobytes() == data[row["offset"] : row["offset"] + row["size"]]
        assert not jpeg.flags.writeable
    assert train_shards.jpegs(ids[:0]) == []


def test_a_tar_that_is_truncated_while_it_is_open_is_named(tars: list[Path]):
    """Parts before its end can still be read. The same memory-mapped would end the process with SIGBUS."""
    files = files_of(tars)
    assert files.read([3], [SIZE - 10], [10])[0].tolist() == [3] * 10
    os.truncate(tars[3], 5_000)
    assert files.read([3], [4_000], [1_000])[0].tolist() == [3] * 1_000
    files.advise([3], [6_000], [10])
    with pytest.raises(ValueError, match=r"train-000003.tar: 5,000 bytes, expected 10,000; it was changed while it"):
        files.read([3], [4_900], [200])


def test_a_tar_that_was_changed_or_removed_before_it_is_opened_is_named(tars: list[Path]):
    os.truncate(tars[0], SIZE + 1)
    tars[1].unlink()
    files = files_of(tars)
    files.advise([1], [0], [10])
    with pytest.raises(ValueError, match=r"train-000000.tar: 10,001 bytes, expected 10,000"):
        files.read([0], [0], [10])
    with pytest.raises(ValueError, match=r"train-000001.tar: cannot be read \(No such file or directory\)"):
        files.read([1], [0], [10])


def test_an_open_tar_that_is_replaced_or_removed_keeps_its_content(tars: list[Path], tmp_path: Path):
    files = files_of(tars)
    files.read([0, 1], [0, 0], [1, 1])
    (tmp_path / "new").write_bytes(b"new")
    (tmp_path / "new").rename(tars[0])
    tars[1].unlink()
    assert [part.tolist() for part in files.read([0, 1], [100, 200], [2, 2])] == [[0, 0], [1, 1]]


def test_few_files_may_be_open(tars: list[Path], monkeypatch: pytest.MonkeyPatch):
    """More tars than the limit: some are closed and opened again. All are closed with the object."""
    monkeypatch.setattr(tar_files, "_allowed_open_files", lambda wanted: 2)
    before = len(os.listdir("/proc/self/fd"))
    files = files_of(tars)
    for _ in range(2):
        assert [int(part[0]) for part in files.read(range(6), [7] * 6, [1] * 6)] == list(range(6))
        assert len(os.listdir("/proc/self/fd")) == before + 2
    del files
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("soft", "hard", "allowed", "raised"),
    [(1024, 4096, 1252, 1764), (4096, 4096, 1252, 4096), (64, 64, 16, 64), (1024, 1500, 375, 1500), (-1, -1, 1252, -1)],
)
def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be(
    soft: int, hard: int, allowed: int, raised: int, monkeypatch: pytest.MonkeyPatch
):
    limits = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda which, limit: limits.append(limit))
    assert tar_files._allowed_open_files(1252) == allowed
    assert limits[-1] == (raised, hard)


def test_another_process_opens_the_tars_itself(train_shards: ShardSet):
    """A shard set that is in use can be copied and pickled."""
    expected = train_shards.jpegs(np.arange(3))
    for other in (pickle.loads(pickle.dumps(train_shards)), copy.copy(train_shards)):
        assert "_files" not in other.__dict__
        assert all(np.array_equal(*pair) for pair in zip(other.jpegs(np.arange(3)), expected, strict=True))


TRUNCATES = """
import os, sys
from pipeline.loader.loader import TrainLoader
from pipeline.loader.settings import LoaderSettings
from pipeline import rgb_pca
from pipeline.shards.reader import open_shards
shards = open_shards(sys.argv[1])
with TrainLoader(shards, rgb_pca.load_for(shards), LoaderSettings(batch=8, threads=2)) as loader:
    for number, batch in enumerate(loader):
        if number == 2:
            os.truncate(shards.tars[0], 4096)
        if number == 50:
            sys.exit("no error")
"""


def test_a_loader_whose_tar_is_truncated_raises_and_no_signal_ends_it(train_shards: ShardSet, tmp_path: Path):
    folder = shutil.copytree(train_shards.folder, tmp_path / "train")
    command = [sys.executable, "-c", TRUNCATES, str(folder)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert f"ValueError: {folder}/train-000000.tar: 4,096 bytes, expected " in done.stderr.splitlines()[-1]
    with pytest.raises(ValueError, match="4096 bytes"):
        open_shards(folder)
