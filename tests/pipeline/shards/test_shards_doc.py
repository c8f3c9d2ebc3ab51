"""docs/shards.md: its Python runs, its commands have the options shown, and its examples have every field."""

from __future__ import annotations

import gc
import importlib
import json
import re
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from pipeline import rgb_pca
from pipeline.shards.format import FORMAT, INDEX_DTYPE, Manifest
from pipeline.shards.reader import ShardSet
from pipeline.shards.settings import (
    MAX_SHARD_SAMPLES,
    MIN_SHARD_SAMPLES,
    MIN_SHARDS,
    ResizeSettings,
    ShardSettings,
)
from pipeline.shards.transcode import library_versions

DOC = (Path(__file__).parents[3] / "docs" / "shards.md").read_text()


def blocks(language: str) -> list[str]:
    """The code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", DOC, flags=re.MULTILINE | re.DOTALL)


def first_column(header: str) -> list[str]:
    """The names in backquotes in the first column of the table with this header."""
    table = DOC.partition(f"{header} |")[2].partition("\n\n")[0]
    return re.findall(r"^\| `([^`]+)`", table, flags=re.MULTILINE)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:wids")
@pytest.mark.parametrize("code", [code for code in blocks("python") if "import timm" not in code])
def test_every_python_example_runs(code: str, shard_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All but timm's, which requires torchvision; test_shards.py runs the reader behind it."""
    if "import wids" in code:
        pytest.importorskip("wids")
    shutil.copytree(shard_root, tmp_path / "data" / "imagenet-256")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WIDS_CACHE", str(tmp_path / "cache"))
    exec(compile(code, "docs/shards.md", "exec"), {"__name__": "example"})
    gc.collect()


def test_every_command_has_its_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    commands = re.findall(r"python tools/(\w+)\.py([^\n#]*)", "".join(blocks("sh")))
    assert {name for name, _ in commands} == {"bench_resize", "compute_pca", "make_sample", "make_shards"}
    for name, rest in commands:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
        with pytest.raises(SystemExit):
            importlib.import_module(f"tools.{name}").main()
        assert set(re.findall(r"--[a-z-]+", rest)) <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))


def test_the_manifest_shown_has_every_field():
    (text,) = blocks("json")
    shown = json.loads(text)
    assert list(shown) == ["format", *(field.name for field in fields(Manifest)), "sha256"]
    assert shown["format"] == FORMAT
    numbers = ["seed", "shard_samples"]
    assert list(shown["settings"]) == [*(f.name for f in fields(ResizeSettings)), *numbers, "versions"]
    assert {f.name for f in fields(ShardSettings)} == {"resize", *numbers}
    assert list(shown["settings"]["versions"]) == list(library_versions())


def test_the_tables_name_every_field(train_shards: ShardSet):
    assert first_column("| field | type | value | meaning") == list(INDEX_DTYPE.names or ())
    basis = rgb_pca.load_for(train_shards)
    assert first_column("| field of `eigenbasis.json` | content | unit") == list(rgb_pca.record(basis))


def test_the_defaults_shown_are_the_defaults():
    """The column `default` of the options' table."""
    shown = dict(re.findall(r"^\| `--([a-z-]+)` \| `?([^|`]+?)`? \|", DOC, flags=re.MULTILINE))
    resize, shard = ResizeSettings(), ShardSettings()
    for name in ("stored", "filter", "quality", "subsampling"):
        assert shown[name] == str(getattr(resize, name))
    assert (shown["seed"], shown["shard-samples"]) == (str(shard.seed), f"at most {MAX_SHARD_SAMPLES}")
    (row,) = re.findall(r"^\| `--shard-samples`.*$", DOC, flags=re.MULTILINE)
    assert re.findall(r"[\d,]*\d", row)[1:] == ["2012", "1024", f"{MAX_SHARD_SAMPLES * MIN_SHARDS:,}", "48", "16"]
    assert (MIN_SHARDS, MIN_SHARD_SAMPLES) == (48, 16)
    assert not resize.apply_exif
    assert shown["apply-exif"] == "off"


def test_no_line_of_prose_is_too_long():
    assert [line for line in DOC.splitlines() if len(line) > 120 and not line.startswith("|")] == []
