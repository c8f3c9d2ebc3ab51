"""What goes wrong on several ranks: one is killed, preempted or hangs, the loss is no number, the disk is full."""

from __future__ import annotations

import resource
import shutil
import signal
from pathlib import Path

import pytest

from model import checkpoint
from model.alexnet import AlexNet
from model.checkpoint import TrainState
from model.optim import Momentum2012
from model.parallel.watchdog import Position, verdict
from model.recipe import SOURCE2012, learning_rates
from model.runs import RunFolder
from model.shapes import NetSpec
from tests.support.rank_tools import ended, losses, start_one, start_ranks, start_torchrun, wait_for_step, workers

STEPS = 11  # 5 an epoch


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def args(shard_root: Path, root: Path) -> list[object]:
    return [shard_root / "train", "--val", shard_root / "val", "--runs", root, "--steps", STEPS]


@pytest.fixture(scope="module")
def whole(args: list[object], root: Path) -> Path:
    """A run on two ranks that nothing happened to."""
    out = ended(start_torchrun(2, *args, "--run-name", "whole"))
    assert "rank 0 sends" in out and "as calculated" in out
    return root / "whole"


def same_end(run: Path, whole: Path) -> None:
    """The losses of all steps and the bytes of the last checkpoint."""
    assert losses(run) == losses(whole)
    assert len(losses(run)) == STEPS
    last, expected = (checkpoint.latest(path / "checkpoints") for path in (run, whole))
    assert last is not None and expected is not None
    for name in (checkpoint.WEIGHTS, checkpoint.VELOCITIES, checkpoint.STATE):
        assert (last / name).read_bytes() == (expected / name).read_bytes()


def test_a_killed_rank_is_started_again_and_changes_nothing(args: list[object], root: Path, whole: Path):
    """torchrun --max-restarts goes on from the last checkpoint, without --resume, to the same losses and bytes."""
    process = start_torchrun(2, *args, "--run-name", "killed", "--save-every", 3, restarts=1)
    wait_for_step(root / "killed", 7, process)
    workers(process)[1].kill()
    assert "resumed    after update" in ended(process)
    same_end(root / "killed", whole)


def test_a_restart_does_not_touch_a_run_of_another_start(args: list[object], root: Path, whole: Path):
    """A forgotten --resume is refused on a restart, too."""
    again = {"TORCHELASTIC_RUN_ID": "another", "TORCHELASTIC_RESTART_COUNT": "1"}
    assert "this run is there already" in ended(start_one(*args, "--run-name", "whole", **again), code=2)


def test_sigterm_on_one_rank_stops_all_after_one_step_and_another_number_goes_on(
    args: list[object], root: Path, whole: Path
):
    """Every rank exits with 0, having saved the same step; one rank goes on to the same losses, as near as sums
    in another order let float32 be after some steps (tests/test_ranks.py has the strict law)."""
    processes = start_ranks(2, *args, "--run-name", "preempted")
    wait_for_step(root / "preempted", 2, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    out = [ended(process) for process in processes]
    last = losses(root / "preempted")[-1][0]
    assert 2 <= last < STEPS
    assert f"stopped after update {last}" in out[0]
    assert checkpoint.optimizer_steps(root / "preempted" / "checkpoints") == last
    ended(start_one(*args, "--run-name", "preempted", "--resume"))
    assert [step for step, _ in losses(root / "preempted")] == [step for step, _ in losses(whole)]
    assert [x for _, x in losses(root / "preempted")] == pytest.approx([x for _, x in losses(whole)], rel=1e-4)


def test_a_rank_that_hangs_is_named_with_its_step(args: list[object], root: Path):
    """Within the time that was allowed; the ranks that wait for it exit with 1."""
    processes = start_ranks(2, *args, "--run-name", "hangs", "--hang-seconds", 4)
    wait_for_step(root / "hangs", 2, processes[0])
    processes[1].send_signal(signal.SIGSTOP)
    out = ended(processes[0], code=1)
    processes[1].kill()
    processes[1].communicate()
    step = int(losses(root / "hangs")[-1][0])
    assert "nothing has moved for 4 s: rank 1 is at step" in out
    assert any(f"rank 1 is at step {at}, " in out for at in (step, step + 1)), out
    assert "gives no sign of life" in out


def test_the_verdict_names_who_is_behind():
    """Fewest places passed; a thread that does not look any more; nobody where all wait alike."""
    start = {0: Position(40, 8, "the exchange before fc6", 5), 1: Position(39, 8, "its own part of the step", 6)}
    later = {0: Position(40, 8, "the exchange before fc6", 9), 1: Position(39, 8, "its own part of the step", 9)}
    told = verdict(start, later, 30)
    assert told == (
        "nothing has moved for 30 s: rank 1 is at step 8, its own part of the step; "
        "rank 0 waits at step 8, the exchange before fc6"
    )
    assert "rank 1 is at step 8, its own part of the step, and its process gives no sign" in verdict(
        start, {**later, 1: start[1]}, 30
    )
    alike = {rank: Position(7, 1, "adding up the gradients", 3) for rank in (0, 1)}
    assert "every rank waits for another" in verdict({}, alike, 30)


def test_a_loss_that_is_no_number_stops_all_ranks_and_keeps_the_last_checkpoint(
    args: list[object], root: Path, whole: Path
):
    """The step is named, on one rank; the checkpoint before stays the last."""
    shutil.copytree(whole, root / "diverges")
    for path in checkpoint.all_in(root / "diverges" / "checkpoints")[1:]:
        shutil.rmtree(path)
    (only,) = checkpoint.all_in(root / "diverges" / "checkpoints")
    with_weight(only, float("inf"))
    out = [ended(process, 1) for process in start_ranks(2, *args, "--run-name", "diverges", "--resume")]
    assert "loss nan at update 6; lower the rates" in out[0]
    assert "at update" not in out[1]
    assert checkpoint.all_in(root / "diverges" / "checkpoints") == [only]


def with_weight(path: Path, value: float) -> None:
    """Changes one weight of tower 1 in a checkpoint."""
    from safetensors.torch import load_file, save_file

    weights = load_file(path / checkpoint.WEIGHTS)
    weights["fc7.weight"][-1, -1] = value
    save_file(weights, path / checkpoint.WEIGHTS)


# ---- disk ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_files() -> object:
    """No file may grow beyond 64 KiB: what is written fails half way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_on_a_full_disk_leaves_nothing_behind(tmp_path: Path, small_files: object):
    """OSError names the checkpoint; no temporary folder takes the room that is left."""
    model = AlexNet(NetSpec(5, 0.05))
    optimizer = Momentum2012(model.named_parameters(), SOURCE2012, learning_rates(SOURCE2012, 0, 1))
    with pytest.raises(OSError, match="step-000000000: could not be saved"):
        checkpoint.save(tmp_path / "step-000000000", model, optimizer, TrainState.start(), 9)
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_found_the_disk_full_is_written_later(tmp_path: Path):
    """Whole, and in its place."""
    folder = RunFolder(tmp_path)
    folder.log({"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15, hard))
    with pytest.raises(OSError):
        folder.log({"step": 2})
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    folder.log({"step": 3})
    assert [line["step"] for line in folder.metrics()] == [1, 2, 3]


def test_training_goes_on_when_the_disk_is_full(args: list[object], root: Path, whole: Path):
    """With a warning and the losses of a run with room; the old checkpoint stays; the end, not saved, exits with 1."""
    shutil.copytree(whole, root / "full")
    for path in checkpoint.all_in(root / "full" / "checkpoints")[1:]:
        shutil.rmtree(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))  # the process that is started has it, too
    process = start_one(*args, "--run-name", "full", "--resume")
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    out = ended(process, code=1)
    assert "warning" in out and "the last checkpoint is" in out
    assert [x for _, x in losses(root / "full")] == pytest.approx([x for _, x in losses(whole)], rel=1e-4)
    (old,) = (root / "full" / "checkpoints").iterdir()
    assert (old / checkpoint.WEIGHTS).read_bytes() == (
        whole / "checkpoints" / old.name / checkpoint.WEIGHTS
    ).read_bytes()


def test_the_best_checkpoint_is_kept_beside_the_last(tmp_path: Path):
    """Lowest validation error, the earliest of equals; it is known from the checkpoints' own records."""
    model = AlexNet(NetSpec(2, 0.01))
    optimizer = Momentum2012(model.named_parameters(), SOURCE2012, learning_rates(SOURCE2012, 0, 1))
    errors = [None, 0.5, 0.2, 0.2, 0.9, None, 0.3]
    for optimizer_steps, error in enumerate(errors):
        state = TrainState.start()
        state.optimizer_steps, state.val_error = optimizer_steps, error
        checkpoint.save(tmp_path / checkpoint.name_of(state), model, optimizer, state, 9)
        checkpoint.prune(tmp_path, 2)
    assert checkpoint.best(tmp_path) == tmp_path / "step-000000002"
    assert [path.name[-1] for path in checkpoint.all_in(tmp_path)] == ["2", "5", "6"]
