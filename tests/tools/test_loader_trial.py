"""bench_loader.py --loader package.module:function."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path

import pytest

from tests.support.tool_runs import printed, tool

FAST = ["--seconds", "0.02"]
names = count()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a module with this text into the current folder; returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        name = f"loaders_{next(names)}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return write


def test_a_loader_alone_and_with_a_demand(module, tmp_path: Path):
    """A loader that computes is too slow for the demand: exit code 1. Above the threshold it is 0."""
    slow = "def make():\n    for _ in range(50):\n        sum(range(20000))\n        yield [1, 2, 3, 4]\n"
    name = module(slow)
    out = printed(tool("bench_loader", "--loader", f"{name}:make", *FAST))
    assert "supply" in out and "limit" in out and json.loads(out.splitlines()[-1])["supply"] > 0
    done = tool("bench_loader", "--loader", f"{name}:make", "--demand", 1e9, "--json", tmp_path / "r.json", *FAST)
    assert "verdict" in printed(done, 1)
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["loader"] == f"{name}:make" and record["au"] < 0.95 and record["observed"]["epoch_ends"] > 0
    assert record["observed"]["batch"] == 4
    name = module("def make():\n    return [[1, 2, 3, 4]] * 50\n")
    easy = ["--demand", 2000, "--batch", 100, "--au-threshold", 0.01]  # background load may disturb so short windows
    out = printed(tool("bench_loader", "--loader", f"{name}:make", *easy, *FAST))
    assert "of 100 images" in out


def test_the_loader_without_dali_is_measured(end_to_end: Path):
    """The stages of the table, and the stall report."""
    shards = end_to_end / "shards" / "train"
    out = tool("bench_loader", shards, "--loader", "webdataset", "--batch", 8, "--threads", 1, "--demand", 1e6, *FAST)
    assert out.returncode == 1, out.stderr
    record = json.loads(out.stdout.splitlines()[-1])
    assert record["settings"]["library"] == "webdataset" and record["verdict"] != "compute-bound"
    assert "read + decode + augment" in out.stdout


@pytest.mark.parametrize(
    ("text", "function", "message"),
    [
        (None, "make", "there is no module loaders_none; searched from "),
        ("import of_nothing", "make", "there is no module of_nothing, which loaders_"),
        ("1 / 0", "make", "it raised ZeroDivisionError: division by zero; set TRACEBACK=1"),
        ("def other(): pass", "make", "has no make; its functions are other"),
        ("make = [[1]]", "make", "make is a list; expected a function that returns the loader"),
        ("def make(): return 7", "make", "it is a int; expected something to iterate over"),
        ("def make(): return []", "make", "it gives no batch at all"),
        ("def make(): return [7]", "make", "cannot be counted"),
        ("def make(): yield 1 / 0", "make", "it raised ZeroDivisionError: division by zero"),
        ("def make(needs): return [[1]]", "make", "it raised TypeError: make() missing 1 required"),
        ("def make(): return [[1]]", "", "expected package.module:function"),
    ],
)
def test_a_mistake_is_one_line(module, text: str | None, function: str, message: str):
    name = "loaders_none" if text is None else module(text)
    done = tool("bench_loader", "--loader", f"{name}:{function}", "--demand", 1000, *FAST)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and message in line and f"--loader {name}" in line


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--loader", "ffcv"], "--loader ffcv: unknown; expected dali, webdataset, or package.module:function"),
        ([], "SHARDS is missing"),
        (["data/train", "--loader", "a:b"], "SHARDS has no effect on --loader a:b"),
        (["--threads", "2", "--loader", "a:b"], "--threads has no effect on --loader a:b"),
        (["--batch", "0", "--loader", "a:b"], "--batch 0: expected at least 1"),
    ],
)
def test_options_that_contradict_the_loader(args: list[str], message: str):
    done = tool("bench_loader", *args)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and message in line
