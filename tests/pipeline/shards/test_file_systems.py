"""File systems without locks, folder flushes or settable times: a set is made, with a warning for each."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path

import pytest

from pipeline import files
from tests.pipeline.shards.test_quarantine_limit import make, source_of


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOSYS, errno.EPERM, errno.EINVAL, errno.ENOLCK])
def test_a_set_is_made_without_locks_flushes_and_times(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            refuse()

    monkeypatch.setattr(files, "_warned", set())
    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "utime", refuse)
    assert make(source_of(tmp_path / "in", bad=0), tmp_path / "out", 0).manifest.samples == 12
    warnings = capsys.readouterr().err
    assert [warnings.count(f"cannot {what}") for what in ("lock", "flush", "set")] == [1, 1, 1]


def test_other_errors_name_their_path(tmp_path: Path):
    with pytest.raises(OSError, match=f"cannot flush folders.*{tmp_path.name}"):
        files.warn_if_unsupported(OSError(errno.EIO, "Input/output error"), tmp_path, "flush folders", "")
