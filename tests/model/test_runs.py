"""Run folders: no run is overwritten by mistake, and metrics survive crashes and full disks."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from model import run_lock
from model.recipe import SOURCE2012
from model.run_lock import RunLock, this_process
from model.runs import RunFolder


def test_a_run_folder_is_not_used_twice_by_mistake(tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    config = {"must_match": {"batch": 128, "recipe": asdict(SOURCE2012)}}
    folder.begin(config, resume=False)
    with pytest.raises(ValueError, match="this run exists already; add --resume, or choose another --run-name NAME"):
        folder.begin(config, resume=False)
    folder.begin(config, resume=True)
    with pytest.raises(ValueError, match="begun with batch 128, now 64; resume with the same"):
        folder.begin({"must_match": {**config["must_match"], "batch": 64}}, resume=True)


def test_another_choice_of_decoders_is_refused_unless_accepted_and_then_recorded(tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    engines, one = ({"hw_decoder_load": 0.65, "ranks": 2}, {"hw_decoder_load": 0.0})
    folder.begin({"must_match": {"decoding": engines}, "may_change": {"lr_scale": 1.0}}, resume=False)
    now = {"must_match": {"decoding": one}, "may_change": {"lr_scale": 1.0}}
    expected = "decoding hw_decoder_load 0.65, now 0.0; resume with the same, add --accept-decoder-change, or choose"
    with pytest.raises(ValueError, match=expected):
        folder.begin(now, resume=True)
    with pytest.raises(ValueError, match="decoding ranks 2, now 4"):
        folder.begin({"must_match": {"decoding": {**engines, "ranks": 4}}}, resume=True)
    assert folder.begin(now, resume=True, accepted=["decoding"])[0].startswith('decoding {"hw_decoder_load": 0.65')
    config = folder.config()
    (change,) = config["changes"]
    assert (change["setting"], change["was"], change["now"]) == ("decoding", engines, one)
    assert config["must_match"] == {"decoding": one} and config["may_change"] == {"lr_scale": 1.0}
    assert folder.begin(now, resume=True) == []  # the accepted one is now the run's


def test_metrics_of_steps_that_will_be_taken_again_are_dropped(tmp_path: Path):
    """A killed and resumed run then has the lines of an uninterrupted one. An incomplete last line is dropped, too."""
    folder = RunFolder(tmp_path)
    for step in (10, 20, 30):
        folder.log({"step": step, "loss": step / 10})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    folder.forget_after(20)
    assert [line["step"] for line in folder.metrics()] == [10, 20]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [10, 20]


def test_a_line_that_did_not_fit_on_the_disk_is_written_later(tmp_path: Path):
    """The file never holds part of it, and the order of lines stays."""
    folder = RunFolder(tmp_path)
    folder.log({"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15, hard))
    with pytest.raises(OSError):
        folder.log({"step": 2})
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    folder.log({"step": 3})
    assert [line["step"] for line in folder.metrics()] == [1, 2, 3]


CONFIG = {"must_match": {"batch": 128}, "may_change": {"lr_scale": 1.0}}


@pytest.mark.parametrize(
    "text",
    ['{"must_match": {"ba', "", "{}", "[]", "\0\0\0", '{"must_match": 3}', '{"must_match": {}, "may_change": 3}'],
)
def test_a_damaged_config_is_refused_with_its_name(tmp_path: Path, text: str):
    RunFolder(tmp_path).begin(CONFIG, resume=False)
    (tmp_path / "config.json").write_text(text)
    for use in (lambda: RunFolder(tmp_path).begin(CONFIG, resume=True), RunFolder(tmp_path).launch):
        with pytest.raises(
            ValueError, match=r"config.json: damaged \(.*; restore it, or choose another --run-name NAME"
        ):
            use()


@pytest.mark.parametrize("resume", [True, False])
def test_a_run_whose_config_is_lost_is_not_begun_anew(tmp_path: Path, resume: bool):
    """It would go on with other settings."""
    RunFolder(tmp_path).begin(CONFIG, resume=False)
    RunFolder(tmp_path).log({"step": 1})
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config.json: missing, but metrics.jsonl of a run is there; restore it"):
        RunFolder(tmp_path).begin(CONFIG, resume)


@pytest.mark.parametrize("line", ["hello", "3", '{"loss": 1.0}', '{"step": "4"}', '{"step": 4'])
def test_a_foreign_line_of_metrics_is_named(tmp_path: Path, line: str):
    folder = RunFolder(tmp_path)
    folder.begin(CONFIG, resume=False)
    folder.log({"step": 1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 2 is not a line of metrics; remove it"):
        folder.begin(CONFIG, resume=True)


def test_what_may_change_is_recorded(tmp_path: Path):
    """A resumed run may have another scale of the learning rates; config.json says when it changed."""
    RunFolder(tmp_path).begin(CONFIG, resume=False)
    changed = {**CONFIG, "may_change": {"lr_scale": 0.5}}
    assert RunFolder(tmp_path).begin(changed, resume=True) == ["lr_scale 1.0, now 0.5"]
    assert RunFolder(tmp_path).begin(changed, resume=True) == []
    (change,) = json.loads((tmp_path / "config.json").read_text())["changes"]
    assert (change["setting"], change["was"], change["now"]) == ("lr_scale", 1.0, 0.5)


def test_the_one_setting_that_differs_is_named(tmp_path: Path):
    RunFolder(tmp_path).begin({"must_match": {"recipe": asdict(SOURCE2012)}}, resume=False)
    other = {"must_match": {"recipe": {**asdict(SOURCE2012), "momentum": 0.5}}}
    with pytest.raises(ValueError, match=r"begun with recipe momentum 0.9, now 0.5; resume with the same"):
        RunFolder(tmp_path).begin(other, resume=True)


def test_a_validation_that_will_be_made_again_is_dropped(tmp_path: Path):
    """The line of training at the same step stays."""
    folder = RunFolder(tmp_path)
    for line in ({"step": 5, "loss": 1.0}, {"step": 5, "val_loss": 1.0}):
        folder.log(line)
    folder.forget_after(5)
    assert len(folder.metrics()) == 2
    folder.forget_after(5, validation_is_due=True)
    assert folder.metrics() == [{"step": 5, "loss": 1.0}]


# ---- the lock -------------------------------------------------------------------------------------------------------

HOLD = "import sys, time; from model.run_lock import RunLock\nwith RunLock(__import__('pathlib').Path(sys.argv[1])):"


def test_a_second_training_in_a_run_folder_is_refused(tmp_path: Path):
    """The message names the first one's process and host. A killed process leaves a lock that the next one takes."""
    path, host = tmp_path / "run" / "run.lock", this_process()["host"]
    command = [sys.executable, "-c", f"{HOLD} print('held', flush=True); time.sleep(60)", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with (
        pytest.raises(ValueError, match=rf"run: process {holder.pid} on {host} is training in .*, started 2"),
        RunLock(path),
    ):
        pass
    holder.kill()
    holder.communicate()
    assert path.is_file()
    with RunLock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert list(path.parent.iterdir()) == []


def test_a_lock_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(OSError, match=r"No space left on device: '.*run.lock'"), RunLock(tmp_path / "run.lock"):
        pass


@pytest.mark.parametrize("age_s", [0, 2 * run_lock.STALE_S])
def test_a_holder_on_another_machine_counts_as_alive_while_it_refreshes_the_lock(tmp_path: Path, age_s: float):
    path = tmp_path / "run.lock"
    path.write_text(json.dumps({"host": "elsewhere", "boot": "another", "pid": 7, "started": "2026-01-01"}))
    written_s = path.stat().st_mtime - age_s
    os.utime(path, (written_s, written_s))
    if age_s:
        with RunLock(path):
            pass
    else:
        with pytest.raises(ValueError, match="process 7 on elsewhere is training"), RunLock(path):
            pass
