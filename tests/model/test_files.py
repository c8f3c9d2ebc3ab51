"""The atomic writer: the complete new content or the old one, and no temporary name left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.files import replacing, write_atomically


def test_a_file_is_created_and_replaced(tmp_path: Path):
    for text in ("one", "two"):
        write_atomically(tmp_path / "file", text)
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", text)]


@pytest.mark.parametrize("left", ["file.tmp", "folder.tmp", "folder.old"])
def test_a_folder_is_replaced_as_a_whole(tmp_path: Path, left: str):
    """Files of the old folder are gone, and so is what a killed writer left under the temporary names."""
    for content in ("one", "two"):
        if left.startswith("folder"):
            (tmp_path / f".set{Path(left).suffix}").mkdir()
            (tmp_path / f".set{Path(left).suffix}" / "rest").touch()
        else:
            (tmp_path / ".set.tmp").touch()
        with replacing(tmp_path / "set") as temporary:
            temporary.mkdir()
            (temporary / content).touch()
        assert [path.name for path in (tmp_path / "set").iterdir()] == [content]
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def write_half(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError


def test_an_error_leaves_the_old_content(tmp_path: Path):
    write_atomically(tmp_path / "file", "old")
    with pytest.raises(RuntimeError):
        write_half(tmp_path / "file")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]
