"""Faults on several ranks: one is killed, preempted or hangs, the loss is not finite, the disk is full."""

from __future__ import annotations

import hashlib
import json
import re
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model import checkpoint
from model.parallel.watchdog import Position, describe_hang
from tests.support.rank_tools import (
    ended,
    losses,
    run_here,
    start_one,
    start_ranks,
    start_torchrun,
    wait_for_step,
    workers,
)

STEPS = 11  # an epoch has 5


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def args(shard_root: Path, root: Path) -> list[object]:
    return [shard_root / "train", "--val", shard_root / "val", "--runs", root, "--steps", STEPS]


@pytest.fixture(scope="module")
def whole(args: list[object], root: Path) -> Path:
    """A run on two ranks without any fault."""
    out = [ended(process) for process in start_ranks(2, *args, "--run-name", "whole")]
    assert "rank 0 sends" in out[0] and "as calculated" in out[0]
    return root / "whole"


def same_end(run: Path, whole: Path) -> None:
    """Checks the losses of all steps and the bytes of the last checkpoint."""
    assert losses(run) == losses(whole)
    assert len(losses(run)) == STEPS
    last, expected = (checkpoint.latest(path / "checkpoints") for path in (run, whole))
    assert last is not None and expected is not None
    for name in (checkpoint.WEIGHTS, checkpoint.VELOCITIES, checkpoint.STATE):
        assert (last / name).read_bytes() == (expected / name).read_bytes()


def test_a_killed_rank_is_restarted_and_changes_no_number(args: list[object], root: Path, whole: Path):
    """torchrun --max-restarts resumes from the last checkpoint, without --resume, with the same losses and bytes."""
    process = start_torchrun(2, *args, "--run-name", "killed", "--save-every", 3, restarts=1)
    wait_for_step(root / "killed", 7, process)
    workers(process)[1].kill()
    assert re.search(r"^resumed +after .*\d", ended(process), re.MULTILINE)
    same_end(root / "killed", whole)


def test_a_restart_does_not_continue_a_run_that_another_torchrun_started(args: list[object], root: Path, whole: Path):
    """A forgotten --resume is an error on a restart, too."""
    again = {"TORCHELASTIC_RUN_ID": "another", "TORCHELASTIC_RESTART_COUNT": "1"}
    assert "this run exists already" in run_here(*args, "--run-name", "whole", code=2, **again)


def test_sigterm_on_one_rank_stops_all_and_another_number_of_ranks_resumes(args: list[object], root: Path, whole: Path):
    """Every rank exits with 0 after the same step, which is saved. One rank then resumes to the same losses, up to the
    rounding of float32 sums in another order (test_ranks.py has the strict law)."""
    processes = start_ranks(2, *args, "--run-name", "preempted")
    wait_for_step(root / "preempted", 2, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    out = [ended(process) for process in processes]
    last = losses(root / "preempted")[-1][0]
    assert 2 <= last < STEPS
    assert re.search(rf"^stopped after .*\b{int(last)}\b", out[0], re.MULTILINE)
    assert checkpoint.optimizer_steps(root / "preempted" / "checkpoints") == last
    run_here(*args, "--run-name", "preempted", "--resume")
    assert [step for step, _ in losses(root / "preempted")] == [step for step, _ in losses(whole)]
    assert [x for _, x in losses(root / "preempted")] == pytest.approx([x for _, x in losses(whole)], rel=1e-4)


@pytest.mark.parametrize(
    ("option", "value", "line"),
    [
        ("--seed", 7, "--seed: 2012 on rank 0 ("),
        ("--batch", 4, "--batch: 8 on rank 0 ("),
        ("--lr-scale", 0.5, "--lr-scale: 1.0 on rank 0 ("),
        ("--hw-decoder-load", 0.5, "--hw-decoder-load: None on rank 0 ("),
        ("--steps", 3, f"--steps: {STEPS} on rank 0 ("),
        ("--layout", "data", "--layout: towers on rank 0 ("),
    ],
)
def test_ranks_with_different_options_do_not_start(
    args: list[object], root: Path, option: str, value: object, line: str
):
    """The first rank names the option and both values; the other one is silent. Neither leaves a run folder."""
    processes = start_ranks(2, *args, "--run-name", "different", last=(option, value))
    out = [ended(process, code=2) for process in processes]
    assert line in out[0] and f"but {value} on rank 1 (" in out[0]
    assert "Traceback" not in out[0] and out[1] == ""
    assert not (root / "different").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_no_rank_can_use_is_one_line_of_the_first_rank(args: list[object], root: Path):
    processes = start_ranks(2, *args, "--run-name", "no_device", "--device", "cuda")
    out = [ended(process, code=2) for process in processes]
    assert out[0].count("driver needed: 580 or newer") == len(out[0].splitlines()) == 1 and out[1] == ""


def test_ranks_without_a_common_run_folder_are_told_so_and_can_resume(
    args: list[object], root: Path, whole: Path, tmp_path: Path
):
    """At the start. Resuming works: rank 0 sends its checkpoint, also if rank 1 has another one of that name."""
    options, elsewhere = ("--run-name", "apart", "--save-every", 3), ("--runs", tmp_path)
    processes = start_ranks(2, *args, *options, last=elsewhere)
    wait_for_step(root / "apart", 3, processes[0])
    processes[0].send_signal(signal.SIGTERM)
    out = [ended(process) for process in processes]
    assert "not all ranks see this run folder; only rank 0 writes to it" in out[0]
    assert "put --runs on a file system that all ranks share" in out[0] and out[1] == ""
    last = checkpoint.latest(root / "apart" / "checkpoints")
    assert last is not None and not any(tmp_path.rglob("step-*"))
    other = tmp_path / last.relative_to(root)
    other.mkdir(parents=True)
    (other / checkpoint.STATE).write_text("that of another run")
    out = [ended(process) for process in start_ranks(2, *args, *options, "--resume", last=elsewhere)]
    assert "resumed    after optimizer step" in out[0] and out[1] == ""
    same_end(root / "apart", whole)


def test_a_rank_whose_partner_dies_ends_with_one_line(args: list[object], root: Path):
    """Without torchrun no other process ends it; it shows no traceback of the communication library."""
    processes = start_ranks(2, *args, "--run-name", "dies", "--steps", 100)
    wait_for_step(root / "dies", 2, processes[0])
    processes[1].kill()
    out = ended(processes[0], code=1)
    assert "rank 0: another rank ended; its own message says why" in out and "Traceback" not in out
    processes[1].communicate()


def test_a_rank_that_hangs_is_named_with_its_step(args: list[object], root: Path):
    """After --hang-seconds the ranks that wait for it say so, and exit with 1."""
    processes = start_ranks(2, *args, "--run-name", "hangs", "--hang-seconds", 4)
    wait_for_step(root / "hangs", 2, processes[0])
    processes[1].send_signal(signal.SIGSTOP)
    out = ended(processes[0], code=1)
    processes[1].kill()
    processes[1].communicate()
    step = int(losses(root / "hangs")[-1][0])
    assert "no progress for 4 s: rank 1 is at step" in out
    assert any(f"rank 1 is at step {at} (" in out for at in (step, step + 1)), out
    assert "its process does not respond" in out


def test_the_message_names_the_rank_that_is_behind():
    """It has passed the fewest marks. Its process does not respond if its watchdog thread has stopped, too. If all have
    passed equally many, none is named."""
    start = {
        0: Position(40, 8, "exchanging activations before fc6", 5),
        1: Position(39, 8, "computing its part of the step", 6),
    }
    later = {rank: replace(position, checks=9) for rank, position in start.items()}
    assert describe_hang(start, later, 30) == (
        "no progress for 30 s: rank 1 is at step 8 (computing its part of the step); "
        "rank 0 waits for it at step 8 (exchanging activations before fc6)"
    )
    stopped = "rank 1 is at step 8 (computing its part of the step; its process does not respond)"
    assert stopped in describe_hang(start, {**later, 1: start[1]}, 30)
    equal = {rank: Position(7, 1, "summing the gradients", 3) for rank in (0, 1)}
    assert "all ranks wait for each other" in describe_hang({}, equal, 30)


def test_a_loss_that_is_not_finite_stops_all_ranks_and_keeps_the_last_checkpoint(
    args: list[object], root: Path, whole: Path
):
    """One rank names the step, and all exit with 1. No further checkpoint is saved."""
    shutil.copytree(whole, root / "diverges")
    for path in checkpoint.all_in(root / "diverges" / "checkpoints")[1:]:
        shutil.rmtree(path)
    (only,) = checkpoint.all_in(root / "diverges" / "checkpoints")
    with_weight(only, float("inf"))
    out = [ended(process, 1) for process in start_ranks(2, *args, "--run-name", "diverges", "--resume")]
    assert "loss nan at optimizer step 6; lower the learning rates" in out[0]
    assert "at optimizer step" not in out[1]
    assert checkpoint.all_in(root / "diverges" / "checkpoints") == [only]


def with_weight(path: Path, value: float) -> None:
    """Changes one weight of tower 1 in a checkpoint."""
    from safetensors.torch import load_file, save_file

    weights = load_file(path / checkpoint.WEIGHTS)
    weights["fc7.weight"][-1, -1] = value
    save_file(weights, path / checkpoint.WEIGHTS)
    record = json.loads((path / checkpoint.STATE).read_text())
    record["files"][checkpoint.WEIGHTS] = hashlib.sha256((path / checkpoint.WEIGHTS).read_bytes()).hexdigest()
    (path / checkpoint.STATE).write_text(checkpoint.sealed(record))


def test_training_continues_when_the_disk_is_full(args: list[object], root: Path, whole: Path):
    """It warns, has the same losses, keeps the old checkpoint, and exits with 1 because the last state is not saved."""
    shutil.copytree(whole, root / "full")
    for path in checkpoint.all_in(root / "full" / "checkpoints")[1:]:
        shutil.rmtree(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))  # inherited by the process
    process = start_one(*args, "--run-name", "full", "--resume")
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    out = ended(process, code=1)
    assert "warning" in out and "the last checkpoint is" in out
    assert [x for _, x in losses(root / "full")] == pytest.approx([x for _, x in losses(whole)], rel=1e-4)
    (old,) = (root / "full" / "checkpoints").iterdir()
    assert (old / checkpoint.WEIGHTS).read_bytes() == (
        whole / "checkpoints" / old.name / checkpoint.WEIGHTS
    ).read_bytes()
