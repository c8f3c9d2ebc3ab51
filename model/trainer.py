"""One training step, the loop around it, and evaluation.

The loop takes batches as they come and knows nothing of where they come from. A batch has `images` (N, 3, 224, 224),
`labels` (N,), `epoch` and `step`; it must be the one of the state's epoch and step, so that a resumed run cannot slip.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.alexnet import AlexNet, DropoutDraws
from model.checkpoint import TrainState
from model.optim import Momentum2012, set_rates
from model.recipe import rates

PRECISIONS = ("float32", "bfloat16")


class Batch(Protocol):
    """What the loop needs of a batch."""

    @property
    def images(self) -> Tensor:
        """(N, 3, 224, 224); for evaluation (N, views, 3, 224, 224)."""
        ...

    @property
    def labels(self) -> Tensor:
        """(N,) int64."""
        ...

    @property
    def epoch(self) -> int:
        """The epoch that the batch belongs to."""
        ...

    @property
    def step(self) -> int:
        """Its place in the epoch."""
        ...


@dataclass(frozen=True)
class LoopSettings:
    """How long to train and how often to speak."""

    epochs: int
    steps_per_epoch: int
    seed: int  # of the dropout masks
    log_every: int = 20  # steps; reading the loss makes the host wait for the device
    precision: str = "float32"  # P: single precision
    max_updates: int | None = None  # stop here, on the schedule of `epochs`

    def __post_init__(self) -> None:
        for name in ("epochs", "steps_per_epoch", "log_every", "max_updates"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value}, expected at least 1")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r}, expected one of {', '.join(PRECISIONS)}")

    @property
    def updates(self) -> int:
        """Updates of the whole run."""
        whole = self.epochs * self.steps_per_epoch
        return whole if self.max_updates is None else min(whole, self.max_updates)


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one step on the host.

    Attributes:
        wait_s: in next(), for the batch.
        step_s: in the step itself.
        loop_s: since the step before ended, or since the loop began or went on after an epoch's end.
    """

    wait_s: float
    step_s: float
    loop_s: float


@dataclass(frozen=True)
class Hooks:
    """What the loop asks and tells its caller.

    Attributes:
        on_step: the number of images of a step and its times.
        on_log: a line for metrics.jsonl.
        validate: at the end of an epoch, given its number; returns the validation error, None where nobody validates.
        save: at the end of an epoch, after validation: the state to keep.
        stopped: asked after every step; True ends the loop.
    """

    on_step: Callable[[int, StepTimes], None]
    on_log: Callable[[dict[str, Any]], None]
    validate: Callable[[int], float | None]
    save: Callable[[TrainState], None]
    stopped: Callable[[], bool]


class Diverged(Exception):
    """The loss is no longer a finite number."""


def train_step(
    model: AlexNet, optimizer: Momentum2012, batch: Batch, draws: DropoutDraws, precision: str = "float32"
) -> tuple[Tensor, Tensor]:
    """One update. Returns mean loss and share of right first guesses, as tensors on the device: nothing waits."""
    model.train()
    with _autocast(batch.images.device, precision):
        logits = model(batch.images, draws)
    logits = logits.float()
    loss = F.cross_entropy(logits, batch.labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    correct = (logits.detach().argmax(dim=1) == batch.labels).float().mean()
    return loss.detach(), correct


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    return nullcontext() if precision == "float32" else torch.autocast(device.type, dtype=torch.bfloat16)


class Trainer:
    """The loop: network, update rule and where they stand."""

    def __init__(self, model: AlexNet, optimizer: Momentum2012, settings: LoopSettings, state: TrainState) -> None:
        self.model, self.optimizer, self.settings, self.state = model, optimizer, settings, state
        self._pending: list[tuple[Tensor, Tensor]] = []  # results that are still on the device
        self._times: list[StepTimes] = []  # since the last line of metrics

    def fit(self, batches: Iterator[Batch], hooks: Hooks) -> bool:
        """Trains to the end of the run (True) or until `hooks.stopped` (False)."""
        state, settings = self.state, self.settings
        self._begin_epoch()
        ended_s = time.perf_counter()
        while state.updates < settings.updates:
            started_s = time.perf_counter()
            batch = next(batches)
            got_s = time.perf_counter()
            self.step(batch)
            previous_s, ended_s = ended_s, time.perf_counter()
            times = StepTimes(got_s - started_s, ended_s - got_s, ended_s - previous_s)
            hooks.on_step(len(batch.labels), times)
            self._times.append(times)
            if state.updates % settings.log_every == 0:
                hooks.on_log(self._log_line(len(batch.labels)))
            if state.step == settings.steps_per_epoch:
                self._end_epoch(hooks)
                ended_s = time.perf_counter()
            if hooks.stopped():
                break
        self.settle()
        return state.updates >= settings.updates

    def step(self, batch: Batch) -> None:
        """Takes one step and moves the state."""
        state = self.state
        assert (batch.epoch, batch.step) == (state.epoch, state.step), "the feed and the loop are at different steps"
        draws = DropoutDraws(self.settings.seed, state.updates)
        self._pending.append(train_step(self.model, self.optimizer, batch, draws, self.settings.precision))
        state.step += 1
        state.updates += 1

    def settle(self) -> None:
        """Brings results home from the device into the state. Raises Diverged where a loss is not finite."""
        self.state.losses += [loss.item() for loss, _ in self._pending]
        self.state.corrects += [correct.item() for _, correct in self._pending]
        self._pending.clear()
        for back, loss in enumerate(reversed(self.state.losses)):
            if not math.isfinite(loss):
                raise Diverged(f"loss {loss} at update {self.state.updates - back}; lower the rates (--rate-scale)")

    def _begin_epoch(self) -> None:
        state, settings = self.state, self.settings
        if state.epoch < settings.epochs:
            now = rates(self.model.recipe, state.epoch, settings.epochs, state.plateau.reductions)
            set_rates(self.optimizer, now)
            self._rate = now["fc8"].weight

    def _end_epoch(self, hooks: Hooks) -> None:
        self.settle()
        state, plateau = self.state, self.model.recipe.plateau
        error = hooks.validate(state.epoch)
        if error is not None and plateau is not None:
            state.plateau = state.plateau.step(error, plateau)
        state.epoch, state.step = state.epoch + 1, 0
        hooks.save(state)
        self._begin_epoch()

    def _log_line(self, batch: int) -> dict[str, Any]:
        """Means over the steps since the last line; times are those of this process."""
        self.settle()
        state, times = self.state, self._times
        line = {
            "epoch": state.epoch,
            "step": state.updates,
            "loss": sum(state.losses) / len(state.losses),
            "top1": sum(state.corrects) / len(state.corrects),
            "lr": self._rate,
            "images_per_s": batch * len(times) / sum(t.loop_s for t in times),
            "wait_s": sum(t.wait_s for t in times) / len(times),
            "step_s": sum(t.step_s for t in times) / len(times),
        }
        state.losses.clear()
        state.corrects.clear()
        times.clear()
        return line


@dataclass(frozen=True)
class Scores:
    """Scores over a whole set: mean negative log-probability of the right class, and fractions of right guesses."""

    loss: float
    top1: float
    top5: float
    images: int


@torch.no_grad()
def evaluate(model: AlexNet, batches: Iterable[Batch], precision: str = "float32") -> Scores:
    """Scores of `model` on batches of views (N, views, 3, 224, 224).

    The probabilities of a picture's views are averaged, and all scores come from the average (P 4.1; layer.cu:1804).
    """
    model.eval()
    sums, images = torch.zeros(3, dtype=torch.float64), 0
    for batch in batches:
        count, views = batch.images.shape[:2]
        with _autocast(batch.images.device, precision):
            logits = model(batch.images.flatten(0, 1))
        probabilities = logits.double().softmax(dim=1).view(count, views, -1).mean(dim=1)
        right = probabilities.gather(1, batch.labels[:, None])
        scores = (-right.log().sum(), hits(probabilities, right, 1).sum(), hits(probabilities, right, 5).sum())
        sums += torch.stack(scores).cpu()
        images += count
    loss, top1, top5 = (sums / images).tolist()
    return Scores(loss, top1, top5, images)


def hits(probabilities: Tensor, right: Tensor, k: int) -> Tensor:
    """Share, (N,), of a hit among the first `k` guesses: 1 or 0, or between where the right class (probability `right`,
    (N, 1)) ties with others for the last places (layer_kernels.cu:96-118)."""
    better = (probabilities > right).sum(dim=1)
    equal = (probabilities == right).sum(dim=1)
    return ((k - better) / equal).clamp(0, 1).double()


def replay_rate(
    model: AlexNet, optimizer: Momentum2012, batches: Sequence[Batch], seconds: float, precision: str = "float32"
) -> float:
    """Demand: img/s of training steps on batches that are already there, over and over for `seconds`.

    The steps are real and change the weights: measure after the last checkpoint.
    """
    device = batches[0].images.device
    train_step(model, optimizer, batches[0], DropoutDraws(0, 0), precision)  # first-use costs are not demand
    images = steps = 0
    _wait_for(device)
    started_s = time.perf_counter()
    while time.perf_counter() - started_s < seconds:
        for batch in batches:
            train_step(model, optimizer, batch, DropoutDraws(0, steps), precision)
            images, steps = images + len(batch.labels), steps + 1
        _wait_for(device)
    return images / (time.perf_counter() - started_s)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
