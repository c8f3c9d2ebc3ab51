"""Every way to stop a training saves it, and the command that the message names continues it."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from model import checkpoint
from tests.support.tool_runs import ENVIRONMENT, ROOT, TINY, losses, printed, start, tool
from tools.shared import stop_signals, training_run


def wait_for(path: Path, text: str, process: subprocess.Popen[str]) -> None:
    """Waits until a file holds `text`."""
    while not (path.is_file() and text in path.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def arguments(root: Path, name: str) -> list[object]:
    """Those of run `a` without its validation, for a run with another name."""
    return [root / "shards" / "train", "--runs", root, "--run-name", name, "--epochs", 2, *TINY]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_ctrl_c_and_a_closed_terminal_save(number: signal.Signals, code: int, end_to_end: Path):
    """The printed command continues to the losses of a run that was never stopped."""
    run = end_to_end / number.name
    process = start("train", *arguments(end_to_end, run.name))
    wait_for(run / "metrics.jsonl", "\n", process)
    process.send_signal(number)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == code, out
    assert checkpoint.optimizer_steps(run / "checkpoints") == losses(run)[-1][0]
    command = re.search(r"continue with: python (.*)$", out, re.MULTILINE)
    assert command is not None, out
    again = [sys.executable, *shlex.split(command[1])]
    done = subprocess.run(again, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert losses(run) == losses(end_to_end / "a")
    assert not (run / "run.lock").exists()


def test_a_signal_in_the_report_keeps_the_training_and_resuming_makes_the_report(end_to_end: Path):
    run, args = end_to_end / "in_report", arguments(end_to_end, "in_report")
    process = start("train", *args, "--stall-seconds", 60)
    wait_for(run / "train.log", "measuring supply and demand", process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "stopped in the stall report; the training is complete" in out, out
    assert checkpoint.optimizer_steps(run / "checkpoints") == 10 and not (run / "stall.json").exists()
    assert "verdict" in printed(tool("train", *args, "--resume"))
    assert (run / "stall.json").is_file()


def test_a_report_that_fails_does_not_change_the_exit_code(end_to_end: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device", "stall.json")

    monkeypatch.setattr(training_run, "report", fail)
    done = tool("train", *arguments(end_to_end, "no_report"))
    assert "run folder:" in printed(done)
    assert "warning: the stall report could not be made (stall.json: No space left on device)" in done.stderr


def test_a_second_ctrl_c_ends_at_once():
    """The first one only records the wish to stop."""
    code = "import time; from tools.shared.stop_signals import StopSignals\nwith StopSignals():\n  print(1, flush=True)"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{code}\n  time.sleep(60)"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "1\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "press Ctrl-C again to end at once" in err and "ended at once" in err


def test_under_torchrun_every_stop_ends_with_0(monkeypatch: pytest.MonkeyPatch):
    """torchrun would start ranks that end with another code again. The command starts torchrun, too."""
    monkeypatch.setattr(sys, "argv", ["tools/train.py", "a b", "--resume-from", "x", "--steps", "3"])
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    codes = {number: stop_signals.exit_code(number) for number in stop_signals.SIGNALS}
    assert codes == {signal.SIGTERM: 0, signal.SIGINT: 130, signal.SIGHUP: 129}
    assert stop_signals.resume_command() == "python tools/train.py 'a b' --steps 3 --resume"
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert {stop_signals.exit_code(number) for number in stop_signals.SIGNALS} == {0}
    expected = "torchrun --nproc-per-node 2 tools/train.py 'a b' --steps 3 --resume"
    assert stop_signals.resume_command() == expected


def test_training_goes_on_when_the_screen_fails(end_to_end: Path):
    """stdout is a pipe that no one reads any more, stderr a full disk. All messages are in train.log."""
    run = end_to_end / "no_screen"
    command = [sys.executable, ROOT / "tools/train.py", *arguments(end_to_end, run.name)]
    reading, writing = os.pipe()
    with open("/dev/full", "w") as full:
        process = subprocess.Popen(list(map(str, command)), env=ENVIRONMENT, stdout=writing, stderr=full)
        os.close(writing)
        os.close(reading)
        assert process.wait(timeout=120) == 0
    assert losses(run) == losses(end_to_end / "a")
    log = (run / "train.log").read_text()
    assert "recipe     source2012" in log and "verdict" in log and f"run folder: {run}" in log


def test_training_goes_on_without_standard_streams(end_to_end: Path):
    """Started with closed stdin, stdout and stderr: no file of the run gets their numbers."""
    run = end_to_end / "closed"
    command = [sys.executable, ROOT / "tools/train.py", *arguments(end_to_end, run.name), "--stall-seconds", 0]
    shell = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *map(str, command)]
    assert subprocess.run(shell, env=ENVIRONMENT).returncode == 0
    assert losses(run) == losses(end_to_end / "a")
    assert f"run folder: {run}" in (run / "train.log").read_text()
    assert checkpoint.faults(run / "checkpoints" / "step-000000010") == []
