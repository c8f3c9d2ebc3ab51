"""Training: a resumed run equals an uninterrupted one, a step equals its plain twin, divergence is reported."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model import checkpoint
from model.alexnet import AlexNet
from model.checkpoint import TrainState, latest, restore, save
from model.dropout import DropoutDraws
from model.optim import Momentum2012
from model.recipe import PAPER, SOURCE2012, Plateau, Recipe, learning_rates
from model.shapes import NetSpec
from model.trainer import Diverged, Hooks, Interrupted, LoopSettings, Trainer, train_step

SPEC = NetSpec(classes=5, width=0.05)
STEPS = 3  # an epoch
EPOCHS = 4
BATCH = 4


@dataclass(frozen=True)
class FakeBatch:
    """A batch that is a pure function of (epoch, step)."""

    images: torch.Tensor
    labels: torch.Tensor
    epoch: int
    step: int


def batches(epoch: int = 0, step: int = 0) -> Iterator[FakeBatch]:
    if step == STEPS:  # the end of an epoch is the start of the next
        epoch, step = epoch + 1, 0
    while True:
        generator = torch.Generator().manual_seed(100 * epoch + step)
        labels = torch.randint(5, (BATCH,), generator=generator)
        images = 60 * torch.randn(BATCH, 3, 224, 224, generator=generator) + 20 * labels[:, None, None, None]
        yield FakeBatch(images, labels, epoch, step)
        epoch, step = (epoch, step + 1) if step + 1 < STEPS else (epoch + 1, 0)


def make(recipe: Recipe = SOURCE2012) -> tuple[AlexNet, Momentum2012]:
    model = AlexNet(SPEC, recipe, seed=3)
    return model, Momentum2012(model.named_parameters(), recipe, learning_rates(recipe, 0, EPOCHS))


class Recorder:
    """Hooks that keep every line and checkpoint, and stop the run at a given optimizer step."""

    def __init__(self, folder: Path, stop_at: int | None = None, errors: dict[int, float] | None = None) -> None:
        self.folder, self.stop_at, self.errors = folder, stop_at, errors or {}
        self.lines: list[dict[str, Any]] = []
        self.steps = 0

    def hooks(self, trainer: Trainer) -> Hooks:
        """The hooks of a loop."""

        def on_step(images: int, times: object) -> None:
            self.steps += 1

        def write(state: TrainState) -> None:
            save(self.folder / checkpoint.name_of(state), trainer.model, trainer.optimizer, state, seed=9)

        return Hooks(
            on_step, self.lines.append, self.errors.get, write, lambda: trainer.state.optimizer_steps == self.stop_at
        )


def run(folder: Path, recorder: Recorder, recipe: Recipe = SOURCE2012, log_every: int = 1) -> Trainer:
    """Starts, or resumes from the last checkpoint in `folder`; saves at the end, as train.py does on SIGTERM."""
    model, optimizer = make(recipe)
    last = latest(folder)
    state = restore(last, model, optimizer, seed=9) if last else TrainState.start()
    trainer = Trainer(model, optimizer, LoopSettings(EPOCHS, STEPS, seed=9, log_every=log_every), state)
    trainer.fit(batches(state.epoch, state.step), recorder.hooks(trainer))
    save(folder / checkpoint.name_of(state), model, optimizer, state, seed=9)
    return trainer


def values(lines: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """The numbers of the lines, without times."""
    return [tuple(line[name] for name in ("epoch", "step", "loss", "top1", "lr")) for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[Any, ...]]]:
    """An uninterrupted run: its folder and its lines, one every two steps."""
    folder = tmp_path_factory.mktemp("whole")
    recorder = Recorder(folder)
    run(folder, recorder, log_every=2)
    return folder, values(recorder.lines)


@pytest.mark.parametrize("stop_at", range(1, EPOCHS * STEPS))
def test_stopped_at_any_step_and_resumed_equals_uninterrupted(stop_at: int, whole, tmp_path: Path):
    """Losses, learning rates and the last checkpoint's bytes are the same, with dropout and momentum."""
    first, second = Recorder(tmp_path, stop_at), Recorder(tmp_path)
    run(tmp_path, first, log_every=2)
    run(tmp_path, second, log_every=2)
    assert first.steps == stop_at
    assert second.steps == EPOCHS * STEPS - stop_at
    folder, lines = whole
    assert values(first.lines + second.lines) == lines
    for name in (checkpoint.WEIGHTS, checkpoint.VELOCITIES, checkpoint.STATE):
        assert (latest(tmp_path) / name).read_bytes() == (latest(folder) / name).read_bytes()


def test_stopped_in_a_validation_and_resumed_equals_uninterrupted(whole, tmp_path: Path):
    """The state after the epoch's last step is saved; a resumed run validates first, and saves it as validated."""

    class Stopped(Recorder):
        def hooks(self, trainer: Trainer) -> Hooks:
            def validate(epoch: int) -> float | None:
                if epoch == 1:
                    raise Interrupted
                return None

            return replace(super().hooks(trainer), validate=validate)

    first, second = Stopped(tmp_path), Recorder(tmp_path, errors={1: 0.25})
    trainer = run(tmp_path, first, log_every=2)
    assert (trainer.state.epoch, trainer.state.step, trainer.state.optimizer_steps) == (1, STEPS, 2 * STEPS)
    run(tmp_path, second, log_every=2)
    assert values(first.lines + second.lines) == whole[1]
    assert checkpoint.best(tmp_path) == tmp_path / f"step-{2 * STEPS:09d}"
    assert (latest(tmp_path) / checkpoint.WEIGHTS).read_bytes() == (latest(whole[0]) / checkpoint.WEIGHTS).read_bytes()


def test_killed_between_checkpoints_the_later_steps_are_taken_again(whole, tmp_path: Path):
    """From the checkpoint at the end of any epoch, the same losses follow as in the uninterrupted run."""
    folder, lines = whole
    for epoch in range(1, EPOCHS):
        copy = tmp_path / str(epoch)
        shutil.copytree(folder / f"step-{epoch * STEPS:09d}", copy / f"step-{epoch * STEPS:09d}")
        recorder = Recorder(copy)
        run(copy, recorder, log_every=2)
        assert values(recorder.lines) == [line for line in lines if line[1] > epoch * STEPS]


def test_the_plateau_survives_a_resume(tmp_path: Path):
    """An error that stops improving divides the learning rate, and a resumed run remembers the reductions."""
    rules = replace(PAPER, plateau=Plateau(divisor=10.0, max_reductions=3, patience_epochs=1))
    errors = {0: 0.5, 1: 0.6, 2: 0.7, 3: 0.4}
    recorder = Recorder(tmp_path / "whole", errors=errors)
    run(tmp_path / "whole", recorder, rules)
    assert [line["lr"] for line in recorder.lines[::STEPS]] == pytest.approx([0.01, 0.01, 0.001, 0.0001])
    first, second = (Recorder(tmp_path / "cut", stop_at, errors) for stop_at in (2 * STEPS, None))
    run(tmp_path / "cut", first, rules)
    run(tmp_path / "cut", second, rules)
    assert values(first.lines + second.lines) == values(recorder.lines)


def test_a_batch_of_another_step_is_refused(tmp_path: Path):
    model, optimizer = make()
    trainer = Trainer(model, optimizer, LoopSettings(EPOCHS, STEPS, seed=9), TrainState.start())
    with pytest.raises(AssertionError, match="different steps"):
        trainer.fit(batches(step=1), Recorder(tmp_path).hooks(trainer))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path: Path):
    def broken() -> Iterator[FakeBatch]:
        for batch in batches():
            yield replace(batch, images=batch.images * (math.nan if batch.step == 2 else 1))

    model, optimizer = make()
    trainer = Trainer(model, optimizer, LoopSettings(EPOCHS, STEPS, seed=9, log_every=1), TrainState.start())
    with pytest.raises(Diverged, match="loss nan at optimizer step 3; lower the learning rates"):
        trainer.fit(broken(), Recorder(tmp_path).hooks(trainer))
    assert latest(tmp_path) is None


def test_a_step_is_gradient_and_optimizer_step_of_the_mean_cross_entropy():
    """Twin: loss and gradient by hand, then v = -lr * (gradient + decay * w)."""
    model, optimizer = make()
    plain, _ = make()
    batch, draws = next(batches()), DropoutDraws(9, 0)
    loss, correct = train_step(model, optimizer, batch, draws)
    logits = plain(batch.images, draws)
    expected = -logits.log_softmax(1)[torch.arange(BATCH), batch.labels].mean()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    assert correct.item() == (logits.argmax(1) == batch.labels).float().mean().item()
    weight, twin = model.fc6.weight, plain.fc6.weight
    torch.testing.assert_close(weight.data, twin.data - 0.01 * (twin.grad + 0.0005 * twin.data))


def test_bfloat16_trains_float32_weights_close_to_float32():
    """Autocast changes a step only by rounding."""
    batch, draws, results = next(batches()), DropoutDraws(9, 0), {}
    for precision in ("float32", "bfloat16"):
        model, optimizer = make()
        loss, _ = train_step(model, optimizer, batch, draws, precision)
        assert model.conv2.weight.dtype == torch.float32
        results[precision] = loss.item()
    assert results["bfloat16"] != results["float32"]
    assert results["bfloat16"] == pytest.approx(results["float32"], rel=0.02)
