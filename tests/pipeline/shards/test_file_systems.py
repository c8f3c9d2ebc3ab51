"""File systems without locks, folder flushes or settable times: a set is made, with a warning for each."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from pipeline import files
from pipeline.shards.verify import verify
from pipeline.workers import IN_PROCESS, ignore
from tests.pipeline.imagenet.case_files import make_shards
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


WITHOUT = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <sys/stat.h>
int flock(int fd, int op) { errno = ENOLCK; return -1; }
int utimensat(int d, const char *p, const struct timespec t[2], int f) { errno = EPERM; return -1; }
int fsync(int fd) {
  struct stat s;
  if (!fstat(fd, &s) && S_ISDIR(s.st_mode)) { errno = EINVAL; return -1; }
  return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd);
}
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_the_command_warns_once_for_all_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As on NFS, SMB or an object store by FUSE, which a preloaded library imitates. Two workers write four shards."""
    (tmp_path / "fs.c").write_text(WITHOUT)
    library = tmp_path / "fs.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "fs.c", "-ldl"], check=True)
    source = source_of(tmp_path / "in", bad=0)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    options = ("--workers", "2", "--shard-samples", "3")
    code, out, error = make_shards(source, tmp_path / "out", *options)
    assert code == 0 and "12 samples in 4 shards" in out, error
    assert [error.count(f"cannot {what}") for what in ("lock files", "flush folders", "set modification")] == [1, 1, 1]
    assert all(line.count("; ") == 1 for line in error.splitlines() if line.startswith("warning: "))
    assert verify(tmp_path / "out/train", False, IN_PROCESS, ignore) == []


def test_errors_say_what_was_being_done(tmp_path: Path):
    """With the path; an error that says it already is not changed."""
    with pytest.raises(FileNotFoundError) as caught, files.doing("list", tmp_path), files.doing("open", tmp_path / "a"):
        (tmp_path / "a").stat()
    assert (caught.value.filename, caught.value.strerror) == (
        str(tmp_path / "a"),
        "cannot open: No such file or directory",
    )


def test_other_errors_name_their_path(tmp_path: Path):
    with pytest.raises(OSError, match=f"cannot flush folders.*{tmp_path.name}"):
        files.warn_if_unsupported(OSError(errno.EIO, "Input/output error"), tmp_path, "flush folders", "")
