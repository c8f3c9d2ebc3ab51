"""Atomic files: a reader sees the old or the new content; errors leave nothing behind and name the file."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import files
from pipeline.files import published, remove_temporary, sha256_of, write_atomically

ROOT = Path(__file__).parents[2]


def test_written_text_and_bytes_are_read_back(tmp_path: Path):
    """Text is stored as UTF-8; a second write replaces the first; no other file is left."""
    path = tmp_path / "file"
    write_atomically(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    write_atomically(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("before", [None, b"old"])
def test_content_is_whole_or_absent(tmp_path: Path, before: bytes | None):
    """During a write, and after one that fails, the path has its earlier content or does not exist."""
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)

    def content() -> bytes | None:
        return path.read_bytes() if path.exists() else None

    def interrupted_write() -> None:
        with published(path) as file:
            file.write(b"new, but not complete")
            file.flush()
            assert content() == before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_write()
    assert content() == before
    assert list(tmp_path.iterdir()) == ([] if before is None else [path]), "the temporary file is removed"


def test_a_disk_error_names_the_file_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The operating system's error for a full disk names no file."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    path = tmp_path / "file"
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(path, b"data")
    assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []


def test_an_error_names_the_file_and_not_its_temporary_name(tmp_path: Path):
    """Neither a missing folder nor a folder in the file's place shows the temporary name."""
    (tmp_path / "folder").mkdir()
    for path, kind in ((tmp_path / "none" / "file", FileNotFoundError), (tmp_path / "folder", IsADirectoryError)):
        with pytest.raises(kind) as caught:
            write_atomically(path, b"data")
        assert caught.value.filename == str(path)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_an_error_of_the_caller_keeps_its_own_file(tmp_path: Path):
    """If the block fails to open another file, the error names that one."""
    with pytest.raises(FileNotFoundError) as caught, published(tmp_path / "file"):
        (tmp_path / "input").read_bytes()
    assert caught.value.filename == str(tmp_path / "input")


def test_temporary_files_of_a_killed_writer_are_removed_and_no_others(tmp_path: Path):
    """A killed writer leaves a temporary file; `remove_temporary` knows it by its name."""
    code = (
        "import os, signal, sys; from pathlib import Path; from pipeline.files import published\n"
        "with published(Path(sys.argv[1])) as file:\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "file"], cwd=ROOT, check=False)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".file.")
    others = [tmp_path / name for name in ("file", "file.tmp", ".hidden.tmp")]
    for other in others:
        other.write_bytes(b"")
    remove_temporary(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_sha256_is_that_of_the_content(tmp_path: Path):
    """The reference hashes the bytes in memory."""
    (tmp_path / "file").write_bytes(bytes(range(256)) * 1000)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(bytes(range(256)) * 1000).hexdigest()
