"""The command line that all tools share: quick --help, options that torchrun leaves alone, checks of numbers."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from torch.distributed.run import get_args_parser

from model import transfer
from model.parallel.mesh import RankLayout
from model.recipe import LRN_FORMS, PRECISIONS
from pipeline.loader.order import Order
from pipeline.loader.settings import Library, OnBadSample
from tests.support.tool_runs import ENVIRONMENT, ROOT, printed, tool
from tools import bench_startup, evaluate, train
from tools.shared import cli

HEAVY = {"torch", "nvidia", "numba", "scipy", "numpy", "PIL", "distributed"}  # libraries that take long to import
LIGHT_TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py") if path.stem != "__init__")


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


@pytest.mark.parametrize("name", LIGHT_TOOLS)
def test_help_imports_no_heavy_library(name: str):
    """`python tools/NAME.py --help` in a fresh process."""
    script = f"tools/{name}.py"
    code = f"""
import runpy, sys
sys.argv = [{script!r}, "--help"]
try:
    runpy.run_path({script!r}, run_name="__main__")
finally:
    print("MODULES", *sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    shown, _, modules = out.stdout.partition("MODULES ")
    assert out.returncode == 0 and shown.startswith("usage: "), out.stderr
    allowed = {"numpy"} if name == "bench_loader" else set()  # 0.1 s, for types and a threshold of the report
    assert not {module.partition(".")[0] for module in modules.split()} & HEAVY - allowed


def test_bench_startup_measures_every_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Its table and its JSON have each tool once; the measurement itself is replaced."""
    asked: list[str] = []
    monkeypatch.setattr(bench_startup, "help_seconds", lambda path: asked.append(path.stem) or 0.25)
    monkeypatch.setattr(sys, "argv", ["bench_startup.py", "--runs", "2", "--json", str(tmp_path / "b.json")])
    assert bench_startup.main() == 0
    tools = sorted({path.stem for path in (ROOT / "tools").glob("*.py")} - {"__init__"})
    assert sorted(asked) == sorted([*tools, *tools])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == tools
    assert json.loads((tmp_path / "b.json").read_text()) == {"runs": 2, "help_s": dict.fromkeys(tools, 0.25)}


def test_the_choices_of_options_are_those_of_the_library():
    """They are written out in the parser, because the modules that define them import torch."""
    assert train.PRECISIONS == PRECISIONS
    assert train.LRN_FORMS == LRN_FORMS
    assert get_args(Order) == train.ORDERS
    assert get_args(OnBadSample) == train.ON_BAD_SAMPLE
    assert get_args(Library) == train.LOADERS == evaluate.LOADERS
    assert get_args(RankLayout) == train.LAYOUTS
    assert transfer.LAYER_SETS == train.LAYER_SETS


def test_torchrun_takes_no_option_of_train_for_its_own():
    """So `torchrun --nproc-per-node 2 tools/train.py SHARDS ...` needs no `--`: torchrun's parser accepts abbreviations
    of its options anywhere, and an option that abbreviates two of them is an error."""
    ours, theirs = options_of(train.arguments()) - {"-h", "--help"}, options_of(get_args_parser())
    assert [(mine, other) for mine in ours for other in theirs if other.startswith(mine)] == []
    args = ["data/train", *(part for option in sorted(ours) for part in (option, "1"))]
    parsed = get_args_parser().parse_args(["--nproc-per-node", "2", "tools/train.py", *args])
    assert (parsed.training_script, parsed.training_script_args) == ("tools/train.py", args)


def test_abbreviated_options_are_rejected():
    assert tool("train", "data", "--run", "first").returncode == 2


@pytest.mark.parametrize("value", [0, -1, 0.5, float("nan"), float("inf")])
def test_a_number_below_its_limit_is_named_as_it_was_typed(value: float):
    cli.require_at_least(1, save_every=None, epochs=1)
    with pytest.raises(ValueError, match=rf"^--save-every {value:g}: expected at least 1$"):
        cli.require_at_least(1, save_every=value)


def test_a_number_that_must_be_positive():
    cli.require_positive(width=0.1, hang_seconds=None)
    with pytest.raises(ValueError, match=r"^--hang-seconds 0: expected a number above 0$"):
        cli.require_positive(hang_seconds=0.0)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("a: b\n c"), 2, "tool.py: a: b c\n"),
        (FileNotFoundError(2, "No such file", "x"), 2, "tool.py: x: No such file\n"),
        (KeyboardInterrupt(), 130, "tool.py: interrupted; run the same command again to continue\n"),
    ],
)
def test_errors_of_the_user_become_one_line(
    error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail() -> int:
        raise error

    monkeypatch.setattr(sys, "argv", ["/somewhere/tool.py"])
    monkeypatch.delenv("TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as ended:
        cli.run(fail)
    assert (ended.value.code, capsys.readouterr().err) == (code, line)


def test_progress_prints_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]):
    """Throughput counts only what this run has done; a quiet one prints nothing."""
    with cli.Progress("training", 100, done=40) as progress:
        progress(10)
        progress.note = "loss 1.0"
    with cli.Progress("training", 100, quiet=True) as quiet:
        quiet(10)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("training: 50 of 100 img, ") and line.endswith(", loss 1.0") and " s left" in line


def test_json_appears_whole_in_a_new_folder(tmp_path: Path):
    cli.write_json(None, {})
    cli.write_json(tmp_path / "new" / "a.json", {"au": 0.5})
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"au": 0.5}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]


def test_as_many_workers_as_are_asked_for():
    parser = cli.parser_of("")
    cli.add_workers(parser)
    with pytest.raises(ValueError, match=r"^--workers 0: expected at least 1$"):
        cli.chosen_workers(parser.parse_args(["--workers", "0"]), "json").__enter__()
    with cli.chosen_workers(parser.parse_args(["--workers", "1"]), "json") as workers:
        assert workers.count == 1
    assert "usage: " in printed(tool("run_all", "--help"))
