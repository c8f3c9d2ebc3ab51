"""The README's words against what is there: its tree, its make targets, its tools and their options."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PARTS = {"cli", "stall_report"}  # of tools, and none themselves


def test_the_tree_names_every_room_and_no_other():
    listed = set(re.findall(r"^((?:pipeline|model)/\w+\.py) ", README, flags=re.MULTILINE))
    there = {str(path.relative_to(ROOT)) for room in ("pipeline", "model") for path in (ROOT / room).glob("*.py")}
    assert listed == {name for name in there if not name.endswith("__init__.py")}


def test_the_tree_names_every_tool():
    line = next(line for line in README.splitlines() if line.startswith("tools/ "))
    listed = line.removeprefix("tools/").partition(":")[0]
    assert {path.stem for path in (ROOT / "tools").glob("*.py")} - PARTS == set(re.findall(r"\w+", listed))


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"`?make ([a-z-]+)", README))
    assert {"train", "test"} <= named <= targets


def test_every_command_that_is_shown_has_its_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Each `python tools/x.py ... --option` in the README: the tool's help knows it; every tool has help."""
    commands = re.findall(r"python tools/(\w+)\.py([^\n`|]*)", README)
    assert {name for name, _ in commands} >= {"make_shards", "compute_pca", "bench_loader", "train", "evaluate"}
    for name in sorted({path.stem for path in (ROOT / "tools").glob("*.py")} - PARTS):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
        text = capsys.readouterr().out
        shown = {option for other, rest in commands if other == name for option in re.findall(r"--[a-z-]+", rest)}
        assert "usage:" in text
        assert shown <= set(re.findall(r"--[a-z-]+", text)), name


def test_every_file_that_is_linked_is_there():
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target
