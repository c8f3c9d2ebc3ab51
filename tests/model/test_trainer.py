"""Training: resumed = uninterrupted, checkpoints are whole or absent, scores equal their plain twins."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from model import checkpoint
from model.alexnet import AlexNet
from model.checkpoint import TrainState, latest, load_model, restore, save
from model.dropout import DropoutDraws
from model.evaluation import evaluate, hits
from model.optim import Momentum2012
from model.recipe import PAPER, RECIPES, SOURCE2012, Plateau, Recipe, learning_rates
from model.runs import RunFolder
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
    """Hooks that keep every line and checkpoint, and stop when told."""

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
    """Starts, or goes on from the last checkpoint in `folder`; saves at the end as the tool does on SIGTERM."""
    model, optimizer = make(recipe)
    last = latest(folder)
    state = restore(last, model, optimizer, seed=9) if last else TrainState.start()
    trainer = Trainer(model, optimizer, LoopSettings(EPOCHS, STEPS, seed=9, log_every=log_every), state)
    trainer.fit(batches(state.epoch, state.step), recorder.hooks(trainer))
    save(folder / checkpoint.name_of(state), model, optimizer, state, seed=9)
    return trainer


def values(lines: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """The numbers of the lines that are not times."""
    return [tuple(line[name] for name in ("epoch", "step", "loss", "top1", "lr")) for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[Any, ...]]]:
    """A run that was never stopped: its folder and its lines, one every two steps."""
    folder = tmp_path_factory.mktemp("whole")
    recorder = Recorder(folder)
    run(folder, recorder, log_every=2)
    return folder, values(recorder.lines)


@pytest.mark.parametrize("stop_at", range(1, EPOCHS * STEPS))
def test_stopped_at_any_step_and_resumed_equals_uninterrupted(stop_at: int, whole, tmp_path: Path):
    """Losses, rates and the last checkpoint's bytes, dropout and momentum included."""
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
    """The state of its epoch's last step is saved; a resumed run validates first, and saves that state as validated."""

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


def test_killed_between_checkpoints_the_steps_since_are_taken_again(whole, tmp_path: Path):
    """From the checkpoint of any epoch's end, what follows is what followed."""
    folder, lines = whole
    for epoch in range(1, EPOCHS):
        copy = tmp_path / str(epoch)
        shutil.copytree(folder / f"step-{epoch * STEPS:09d}", copy / f"step-{epoch * STEPS:09d}")
        recorder = Recorder(copy)
        run(copy, recorder, log_every=2)
        assert values(recorder.lines) == [line for line in lines if line[1] > epoch * STEPS]


def test_the_plateau_survives_a_resume(tmp_path: Path):
    """Validation that stops improving divides the rate, and a resumed run knows how often it did."""
    rules = replace(PAPER, plateau=Plateau(divisor=10.0, most=3, patience_epochs=1))
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


def test_a_loss_that_is_no_number_stops_the_run_and_is_named(tmp_path: Path):
    def broken() -> Iterator[FakeBatch]:
        for batch in batches():
            yield replace(batch, images=batch.images * (math.nan if batch.step == 2 else 1))

    model, optimizer = make()
    trainer = Trainer(model, optimizer, LoopSettings(EPOCHS, STEPS, seed=9, log_every=1), TrainState.start())
    with pytest.raises(Diverged, match="loss nan at update 3"):
        trainer.fit(broken(), Recorder(tmp_path).hooks(trainer))
    assert latest(tmp_path) is None


def test_a_step_is_gradient_and_update_of_the_mean_cross_entropy():
    """Twin: loss and gradient by hand, then v = -rate * (gradient + decay * w)."""
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
    """Autocast changes a step by rounding, not by more."""
    batch, draws, results = next(batches()), DropoutDraws(9, 0), {}
    for precision in ("float32", "bfloat16"):
        model, optimizer = make()
        loss, _ = train_step(model, optimizer, batch, draws, precision)
        assert model.conv2.weight.dtype == torch.float32
        results[precision] = loss.item()
    assert results["bfloat16"] != results["float32"]
    assert results["bfloat16"] == pytest.approx(results["float32"], rel=0.02)


# ---- evaluation ---------------------------------------------------------------------------------------------------


def test_scores_average_the_probabilities_of_the_views():
    """Twin: softmax by view, mean over views, then everything from the mean."""
    model, _ = make()
    images, labels = torch.randn(6, 10, 3, 224, 224) * 60, torch.arange(6) % 5
    parts = [FakeBatch(images[:4], labels[:4], 0, 0), FakeBatch(images[4:], labels[4:], 0, 1)]
    scores = evaluate(model, parts)
    with torch.no_grad():
        probabilities = torch.stack([model.eval()(images[:, v]).double().softmax(1) for v in range(10)]).mean(0)
    assert scores.loss == pytest.approx(F.nll_loss(probabilities.log(), labels).item(), rel=1e-6)
    assert scores.top1 == pytest.approx((probabilities.argmax(1) == labels).double().mean().item())
    assert (scores.top5, scores.images) == (1.0, 6)  # five classes


def test_ties_score_in_shares():
    """A right class among 3 equal ones for 2 places is a hit of 2/3; clear cases are 1 and 0."""
    probabilities = torch.tensor([[0.4, 0.2, 0.2, 0.2], [0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1]])
    right = probabilities[torch.arange(3), torch.tensor([1, 0, 0])][:, None]
    torch.testing.assert_close(hits(probabilities, right, 1), torch.tensor([0.0, 0.25, 1.0]).double())
    torch.testing.assert_close(hits(probabilities, right, 2), torch.tensor([1 / 3, 0.5, 1.0]).double())
    torch.testing.assert_close(hits(probabilities, right, 3), torch.tensor([2 / 3, 0.75, 1.0]).double())


# ---- checkpoints and run folders ----------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model, optimizer = make()
    train_step(model, optimizer, next(batches()), DropoutDraws(9, 0))
    state = TrainState(0, 1, 1, SAVED_PLATEAU, [2.5, 1 / 3], [0.25])
    save(tmp_path / "step-000000001", model, optimizer, state, seed=9)
    return tmp_path / "step-000000001"


SAVED_PLATEAU = replace(TrainState.start().plateau, best_error=0.1, reductions=1)


def test_saved_is_restored_bit_for_bit(saved: Path):
    model, optimizer = make()
    state = restore(saved, model, optimizer, seed=9)
    assert state == TrainState(0, 1, 1, SAVED_PLATEAU, [2.5, 1 / 3], [0.25])
    again, update = make()
    train_step(again, update, next(batches()), DropoutDraws(9, 0))
    for (name, found), expected in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(found, expected)
        assert torch.equal(optimizer.velocities()[name], update.velocities()[name])
    assert torch.equal(load_model(saved, RECIPES).conv1.weight, model.conv1.weight)


def test_a_checkpoint_of_another_recipe_network_or_seed_is_refused(saved: Path):
    with pytest.raises(ValueError, match=r"of another recipe \(name 'source2012', now 'paper'\)"):
        restore(saved, *make(PAPER), seed=9)
    other = AlexNet(NetSpec(classes=5, width=0.1))
    with pytest.raises(ValueError, match=r"of another spec \(width 0.05, now 0.1\)"):
        restore(
            saved, other, Momentum2012(other.named_parameters(), SOURCE2012, learning_rates(SOURCE2012, 0, 1)), seed=9
        )
    with pytest.raises(ValueError, match=r"of another seed \(9, now 10\)"):
        restore(saved, *make(), seed=10)


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.VELOCITIES, checkpoint.STATE])
def test_a_damaged_checkpoint_is_named(saved: Path, name: str):
    data = (saved / name).read_bytes()
    (saved / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=rf"{name}: (missing or )?damaged"):
        restore(saved, *make(), seed=9)


def test_a_save_that_fails_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Temporary folder first: half a checkpoint is never found."""
    monkeypatch.setattr(checkpoint, "VELOCITIES", "no/such/folder.safetensors")
    model, optimizer = make()
    with pytest.raises(Exception, match="No such file"):
        save(tmp_path / "step-000000001", model, optimizer, TrainState.start(), seed=9)
    assert latest(tmp_path) is None


def test_pruning_keeps_the_last_checkpoints(whole, tmp_path: Path):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    before = checkpoint.all_in(tmp_path)
    checkpoint.prune(tmp_path, 2)
    assert checkpoint.all_in(tmp_path) == before[-2:]
    assert len(before) == EPOCHS


def test_a_run_folder_is_not_used_twice_by_mistake(tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    config = {"must_match": {"batch": 128, "recipe": asdict(SOURCE2012)}}
    folder.begin(config, resume=False)
    with pytest.raises(ValueError, match="this run is there already; add --resume"):
        folder.begin(config, resume=False)
    folder.begin(config, resume=True)
    with pytest.raises(ValueError, match="begun with batch 128, now 64; resume with the same"):
        folder.begin({"must_match": {**config["must_match"], "batch": 64}}, resume=True)


def test_metrics_of_steps_that_will_be_taken_again_are_dropped(tmp_path: Path):
    """So the lines of a killed and resumed run are those of an uninterrupted one; half a line is dropped too."""
    folder = RunFolder(tmp_path)
    for step in (10, 20, 30):
        folder.log({"step": step, "loss": step / 10})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    folder.forget_after(20)
    assert [line["step"] for line in folder.metrics()] == [10, 20]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [10, 20]
