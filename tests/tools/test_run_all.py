"""tools/run_all.py: how many ranks train, which settings it reads, and how it stops."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from model import checkpoint
from tests.support.rank_tools import TINY, ended, losses, wait_for_step
from tests.support.tool_runs import ENVIRONMENT, ROOT, tool
from tools import run_all
from tools.run_all import RunAllSettings
from tools.shared import rank_choice
from tools.shared.rank_choice import choose_ranks, ranks_for
from tools.shared.tool_runner import STOPPED

# ---- the choice of ranks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "batch", "ranks", "why"),
    [
        (0, 128, 1, "no GPU is visible, so both towers train on the CPU"),
        (1, 128, 1, "1 GPU: both towers on one"),
        (2, 128, 2, "2 GPUs: a pair, one tower on each"),
        (3, 128, 2, "3 GPUs: a pair, one tower on each; 1 idle, because a pair needs two"),
        (4, 128, 4, "4 GPUs: 2 pairs on 4 of them, one tower on each"),
        (
            6,
            128,
            4,
            "6 GPUs: 2 pairs on 4 of them, one tower on each; 2 idle, because more pairs cannot share a batch of 128",
        ),
        (8, 128, 8, "8 GPUs: 4 pairs on 8 of them, one tower on each"),
        (2, 127, 1, "2 GPUs: both towers on one; 1 idle, because more pairs cannot share a batch of 127 evenly"),
    ],
)
def test_ranks_follow_the_gpus(gpus: int, batch: int, ranks: int, why: str):
    choice = choose_ranks(gpus, batch)
    assert choice.ranks == ranks
    assert why in choice.why and "\n" not in choice.why


def test_the_ranks_are_the_most_that_train_would_accept():
    """Pairs that share the batch evenly, or one rank; no larger number of ranks would be accepted."""
    for gpus in range(17):
        for batch in (1, 2, 6, 48, 96, 127, 128, 256):
            fits = [n for n in range(1, gpus + 1) if (n == 1 or n % 2 == 0) and batch % n == 0]
            assert choose_ranks(gpus, batch).ranks == max(fits, default=1)
            fits = [n for n in range(1, gpus + 1) if batch % n == 0]
            assert choose_ranks(gpus, batch, layout="data").ranks == max(fits, default=1)
            assert choose_ranks(gpus, batch, device="cpu").ranks == 1


def test_the_choice_reads_the_options_of_the_training(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rank_choice, "visible_gpus", lambda: 6)
    assert ranks_for([]).ranks == 4
    assert ranks_for(["--steps", "9", "--batch=96", "--save-every", "1"]).ranks == 6
    assert ranks_for(["--layout", "data", "--batch", "90"]).why == "6 GPUs: both towers on each of 6"
    assert ranks_for(["--device", "cpu"]).ranks == 1


# ---- settings and stages --------------------------------------------------------------------------------------------


def test_a_folder_of_another_user_gets_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # tests may run as root, which may write anywhere
    with pytest.raises(ValueError, match=r"may not write there; change its owner, or set USER_ID and GROUP_ID in .env"):
        run_all.make_writable(tmp_path / "new")


@pytest.mark.parametrize("setting", ["WORKERS=0", "WORKERS=2.5", "HANG_MINUTES=-1", "HANG_MINUTES=soon"])
def test_a_setting_that_is_no_number_is_named(setting: str):
    name, value = setting.split("=")
    with pytest.raises(ValueError, match=rf"^{re.escape(setting)}: expected a "):
        RunAllSettings.of({name: value})


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--epoch 3", r"unrecognized arguments: --epoch 3; python tools/train.py --help lists the options"),
        ("--width wide", r"argument --width: invalid float value: 'wide'; python"),
        ("--batch 0", r"--batch 0: expected at least 1$"),
        ("--epochs 3 --steps 4", r"argument --steps: not allowed with argument --epochs; python"),
        ("--precision 'float32", r"--precision 'float32: No closing quotation$"),
    ],
)
def test_a_wrong_train_option_is_found_before_any_work(
    options: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Nothing is drawn, sharded or written."""
    for name, value in {"DATA": tmp_path / "data", "RUNS": tmp_path / "runs", "TRAIN_OPTIONS": options}.items():
        monkeypatch.setenv(name, str(value))
    done = tool("run_all", "train")
    assert done.returncode == 2 and re.search(rf"^run_all.py: TRAIN_OPTIONS[:=] ?{line}", done.stderr.strip()), (
        done.stderr
    )
    assert list(tmp_path.iterdir()) == []


def test_the_usual_train_options_are_accepted():
    for environment in ({}, {"IMAGENET": "/imagenet"}):
        run_all.check_train_options(RunAllSettings.of(environment))


def test_the_same_command_continues_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """`make train` after Ctrl-C: training is always started with --resume, which starts a run that is not there."""
    called: list[list[str]] = []

    class Recorder:
        def run(self, *args: object, ranks: int) -> int:
            called.append([str(arg) for arg in args])
            return 0

    monkeypatch.setattr(run_all, "gpus_announced", lambda: False)
    settings = RunAllSettings.of({"DATA": str(tmp_path), "RUNS": "r", "RUN": "n"})
    assert run_all.run_stage("train", settings, Recorder()) == 0  # type: ignore[arg-type]
    assert "--runs r --run-name n --resume" in " ".join(called[0])


@pytest.mark.parametrize("announced", [True, False])
def test_bench_measures_the_loader_that_training_would_use(
    announced: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """On the GPUs that were announced, as in training. The tools that it runs exist, and know their options."""
    called: list[list[str]] = []

    class Recorder:
        def run(self, *args: object) -> int:
            called.append([str(arg) for arg in args])
            return 0

    monkeypatch.setattr(run_all, "gpus_announced", lambda: announced)
    assert run_all.run_stage("bench", RunAllSettings.of({"DATA": str(tmp_path)}), Recorder()) == 0  # type: ignore[arg-type]
    assert [name for name, *_ in called] == ["bench_loader", "bench_baselines"]
    assert called[0][2:] == ["--device", "cuda"] * announced
    for name, shards, *options in called:
        assert shards == str(tmp_path / "sample-256/train")
        text = (ROOT / "tools" / f"{name}.py").read_text()
        assert all(option in text for option in options)


# ---- stopping -----------------------------------------------------------------------------------------------------

RUNNER = "import os, signal, sys; from tools.shared.tool_runner import ToolRunner; runner = ToolRunner()"


def start_runner(code: str, *args: object) -> subprocess.Popen[str]:
    """Starts Python on `code`, which may use `runner`."""
    command = [sys.executable, "-c", f"{RUNNER}; {code}", *map(str, args)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_saves(number: int, code: int, ranks: int, shard_root: Path, tmp_path: Path):
    """A signal to the one process that make or the container starts reaches the tool, and all ranks of torchrun."""
    run = ["--runs", tmp_path, "--run-name", "a", "--steps", 100, "--device", "cpu", *TINY]
    source = f"sys.exit(runner.run(*sys.argv[1:], ranks={ranks}))"
    process = start_runner(source, "train", shard_root / "train", *run)
    wait_for_step(tmp_path / "a", 2, process)
    process.send_signal(number)
    out = ended(process, code)
    last = losses(tmp_path / "a")[-1][0]
    assert f"stopped after optimizer step {last}" in out and last < 100
    assert checkpoint.optimizer_steps(tmp_path / "a/checkpoints") == last


def test_after_sigterm_no_further_tool_starts(tmp_path: Path):
    code = "os.kill(os.getpid(), signal.SIGTERM); sys.exit(runner.run('make_sample', sys.argv[1]))"
    ended(start_runner(code, tmp_path / "sample"), code=STOPPED)
    assert not (tmp_path / "sample").exists()


def test_a_tool_that_a_signal_kills_gives_the_exit_code_of_the_shell():
    """SIGKILL (for example because memory is full) makes the whole command fail."""
    kill = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    code = f"import subprocess; popen = subprocess.Popen; subprocess.Popen = lambda *_, **__: popen({kill})"
    ended(start_runner(f"{code}; sys.exit(runner.run('make_sample'))"), code=137)
