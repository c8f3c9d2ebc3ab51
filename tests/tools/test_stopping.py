"""Every way to stop a training saves it, and the command that the message names continues it."""

from __future__ import annotations

import io
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
from pipeline.shards.reader import ShardSet
from tests.support.tool_runs import ENVIRONMENT, ROOT, TINY, losses, metrics, printed, start, tool
from tools.shared import stop_signals, training_run
from tools.shared.run_output import logged
from tools.shared.training_run import TrainingRun


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


def test_ctrl_c_in_a_validation_saves_the_epoch(end_to_end: Path, monkeypatch: pytest.MonkeyPatch):
    """The epoch is saved, and the validation is made, once, when the run is resumed."""
    run, scores = end_to_end / "in_validation", TrainingRun._scores
    args = [*arguments(end_to_end, run.name), "--val", end_to_end / "shards" / "val", "--stall-seconds", 0]

    def press(self: TrainingRun, val: ShardSet) -> object:
        os.kill(os.getpid(), signal.SIGINT)
        return scores(self, val)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "_scores", press)
        stopped = tool("train", *args)
    assert "stopped after optimizer step 5; continue with: " in printed(stopped, code=130)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000000005"]
    printed(tool("train", *args, "--resume"))
    assert losses(run) == losses(end_to_end / "a")
    assert [line["step"] for line in metrics(run) if "val_loss" in line] == [5, 10]


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


@pytest.mark.parametrize("number", stop_signals.SIGNALS)
def test_every_signal_is_recorded_and_the_handlers_come_back(number: signal.Signals):
    before = signal.getsignal(number)
    with stop_signals.StopSignals() as signals:
        os.kill(os.getpid(), number)
        assert signals.requested == number
    assert signal.getsignal(number) == before


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
    assert codes == {signal.SIGTERM: 0, signal.SIGUSR1: 0, signal.SIGINT: 130, signal.SIGHUP: 129}
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


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_stream_on_a_full_disk_never_raises(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Text that fills its buffer, and a flush. The log has every line."""
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, name, full)
        with logged(tmp_path / "train.log"):
            for number in range(3):
                print("x" * 10_000, number, file=getattr(sys, name), flush=True)
    assert [line[-2:] for line in (tmp_path / "train.log").read_text().splitlines()] == [" 0", " 1", " 2"]


def test_a_screen_that_cannot_show_a_character_shows_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """PYTHONIOENCODING=ascii and a run name with an accent."""
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    with logged(tmp_path / "train.log"):
        print("run folder: r\u00fcn")
        print("and more")
    assert screen.buffer.getvalue() == b"run folder: r\\xfcn\nand more\n"  # type: ignore[attr-defined]
    assert (tmp_path / "train.log").read_text(encoding="utf-8") == "run folder: r\u00fcn\nand more\n"


def test_a_working_folder_that_was_removed_is_named(tmp_path: Path):
    command = f"cd {tmp_path}; rmdir {tmp_path}; exec {sys.executable} {ROOT}/tools/train.py nowhere"
    done = subprocess.run(["sh", "-c", command], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("train.py: the working folder was removed; change"), done


@pytest.mark.parametrize("streams", ["2>/dev/full", ">/dev/full 2>&1", "2>&-"])
def test_the_exit_code_does_not_depend_on_the_screen(streams: str):
    """A mistake that cannot be shown still gives 2, and not the code of a failed print."""
    command = f"exec {sys.executable} {ROOT}/tools/train.py nowhere --batch 0 {streams}"
    assert subprocess.run(["sh", "-c", command], env=ENVIRONMENT, stdout=subprocess.DEVNULL).returncode == 2


def test_training_goes_on_without_standard_streams(end_to_end: Path):
    """Started with closed stdin, stdout and stderr: no file of the run gets their numbers."""
    run = end_to_end / "closed"
    command = [sys.executable, ROOT / "tools/train.py", *arguments(end_to_end, run.name), "--stall-seconds", 0]
    shell = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *map(str, command)]
    assert subprocess.run(shell, env=ENVIRONMENT).returncode == 0
    assert losses(run) == losses(end_to_end / "a")
    assert f"run folder: {run}" in (run / "train.log").read_text()
    assert checkpoint.faults(run / "checkpoints" / "step-000000010") == []


def test_a_signal_in_a_destructor_is_not_lost(capfd: pytest.CaptureFixture[str]):
    """Python drops an exception that a destructor raises, with a traceback on the screen. DALI has such destructors."""

    class Object:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    def report() -> None:
        with signals.raising():
            Object()
            signal.sigtimedwait([], 10)  # the exception interrupts it
        pytest.fail("the signal was lost")

    with stop_signals.StopSignals() as signals:
        hook = sys.unraisablehook
        with pytest.raises(stop_signals.StopRequested):
            report()
        assert signals.requested == signal.SIGTERM and sys.unraisablehook is hook
    assert capfd.readouterr().err == ""
