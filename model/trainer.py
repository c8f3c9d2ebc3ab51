"""One training step, the loop around it, and evaluation.

The loop takes batches as they come and knows nothing of where they come from. A batch has `images` (N, 3, 224, 224),
`labels` (N,), `epoch` and `step`; it must be the one of the state's epoch and step, so that a resumed run cannot slip.
Every rank runs the same loop on its rows of each batch; losses, scores and rates are those of all ranks together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.alexnet import AlexNet
from model.batch import Batch
from model.checkpoint import TrainState
from model.device_clock import DeviceTimes, device_clock
from model.dropout import DropoutDraws
from model.optim import Momentum2012, set_learning_rates
from model.parallel.exchange import TowerExchange
from model.recipe import learning_rates

PRECISIONS = ("float32", "bfloat16")
NO_EXCHANGE = TowerExchange()  # of a rank that has both towers and all rows


@dataclass(frozen=True)
class LoopSettings:
    """How long to train and how often to speak."""

    epochs: int
    steps_per_epoch: int
    seed: int  # of the dropout masks
    log_every: int = 20  # steps; reading the loss makes the host wait for the device
    precision: str = "float32"  # P: single precision
    max_optimizer_steps: int | None = None  # stop here, on the schedule of `epochs`
    save_every: int | None = None  # optimizer_steps; besides the end of every epoch

    def __post_init__(self) -> None:
        for name in ("epochs", "steps_per_epoch", "log_every", "max_optimizer_steps", "save_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value}, expected at least 1")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r}, expected one of {', '.join(PRECISIONS)}")

    @property
    def optimizer_steps(self) -> int:
        """Updates of the whole run."""
        whole = self.epochs * self.steps_per_epoch
        return whole if self.max_optimizer_steps is None else min(whole, self.max_optimizer_steps)


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
        on_step: the number of images of a step, of all ranks, and its times on this one.
        on_log: a line for metrics.jsonl.
        validate: at the end of an epoch, given its number; returns the validation error, None where nobody validates.
            May raise Interrupted: the loop then ends, and a resumed one begins with this validation.
        save: at the end of an epoch, after validation, and where the settings say so: the state to keep.
        stopped: asked after every step; True ends the loop. All ranks must get the same answer.
        on_device: a step's times on the device, once it has passed it; on the CPU there are none.
    """

    on_step: Callable[[int, StepTimes], None]
    on_log: Callable[[dict[str, Any]], None]
    validate: Callable[[int], float | None]
    save: Callable[[TrainState], None]
    stopped: Callable[[], bool]
    on_device: Callable[[DeviceTimes], None] = lambda times: None


class Diverged(Exception):
    """The loss, or a weight, is no longer a finite number."""


class Interrupted(Exception):
    """Whoever started the run wants it to stop in the middle of a validation."""


def train_step(
    model: AlexNet,
    optimizer: Momentum2012,
    batch: Batch,
    draws: DropoutDraws,
    precision: str = "float32",
    towers: TowerExchange = NO_EXCHANGE,
) -> tuple[Tensor, Tensor]:
    """One update. Returns mean loss and share of right first guesses of this rank's rows, as tensors on the device:
    nothing waits. Where tower 0 is not held both are 0, since there are no logits."""
    model.train()
    with autocast(batch.images.device, precision):
        logits = model(batch.images, draws, towers)
    optimizer.zero_grad(set_to_none=True)
    if 0 in model.towers:
        logits = logits.float()
        loss = F.cross_entropy(logits, batch.labels)
        share = loss / towers.ranks.place.data_ranks  # of the mean over the global batch
        share.backward()  # type: ignore[no-untyped-call]
        correct = (logits.detach().argmax(dim=1) == batch.labels).float().mean()
    else:
        logits.backward(torch.zeros_like(logits))  # type: ignore[no-untyped-call]
        loss = correct = torch.zeros((), device=batch.images.device)
    towers.finish_gradients()
    with towers.ranks.spans.span("optimizer"):
        optimizer.step()
    return loss.detach(), correct


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Where `precision` is bfloat16, products are computed in it; weights stay float32."""
    return nullcontext() if precision == "float32" else torch.autocast(device.type, dtype=torch.bfloat16)


class Trainer:
    """The loop: network, update rule, where they stand, what they need of other ranks, and a GPU's clock."""

    def __init__(
        self,
        model: AlexNet,
        optimizer: Momentum2012,
        settings: LoopSettings,
        state: TrainState,
        towers: TowerExchange = NO_EXCHANGE,
    ) -> None:
        self.model, self.optimizer, self.settings, self.state = model, optimizer, settings, state
        self.towers, self.ranks = towers, towers.ranks
        self._pending: list[tuple[Tensor, Tensor]] = []  # results that are still on the device
        self.clock = device_clock(self.ranks.device)
        self._times: list[StepTimes] = []  # since the last line of metrics
        self._device_times: list[DeviceTimes] = []

    def fit(self, batches: Iterator[Batch], hooks: Hooks) -> bool:
        """Trains to the end of the run (True) or until `hooks.stopped` (False)."""
        try:
            self._fit(batches, hooks)
        except Interrupted:
            pass
        self._read_clock(hooks, last=True)
        self.settle()
        return self.state.optimizer_steps >= self.settings.optimizer_steps and not self._validation_is_due

    @property
    def _validation_is_due(self) -> bool:
        return self.state.step == self.settings.steps_per_epoch

    def _fit(self, batches: Iterator[Batch], hooks: Hooks) -> None:
        state, settings, ranks = self.state, self.settings, self.ranks
        if self._validation_is_due:  # the run was stopped in it
            self._end_epoch(hooks)
        self._begin_epoch()
        ended_s = time.perf_counter()
        while state.optimizer_steps < settings.optimizer_steps:
            started_s = time.perf_counter()
            ranks.mark("waiting for its batch", state.optimizer_steps + 1)
            batch = next(batches)
            got_s = time.perf_counter()
            self.step(batch)
            images = len(batch.labels) * ranks.place.data_ranks
            previous_s, ended_s = ended_s, time.perf_counter()
            times = StepTimes(got_s - started_s, ended_s - got_s, ended_s - previous_s)
            hooks.on_step(images, times)
            self._times.append(times)
            self._read_clock(hooks)
            if state.optimizer_steps % settings.log_every == 0:
                hooks.on_log(self._log_line(images, hooks))
            if self._validation_is_due:
                self._end_epoch(hooks)
                ended_s = time.perf_counter()
            elif settings.save_every and state.optimizer_steps % settings.save_every == 0:
                self._read_clock(hooks, last=True)
                self.settle()
                hooks.save(state)
                ended_s = time.perf_counter()
            if hooks.stopped():
                break

    def step(self, batch: Batch) -> None:
        """Takes one step and moves the state."""
        state, place = self.state, self.ranks.place
        assert (batch.epoch, batch.step) == (state.epoch, state.step), "the feed and the loop are at different steps"
        images = len(batch.labels) * place.data_ranks
        draws = DropoutDraws(self.settings.seed, state.optimizer_steps, place.first_row(images), images)
        self.ranks.mark("its own part of the step")
        if self.clock:
            self.clock.begin()
        results = train_step(self.model, self.optimizer, batch, draws, self.settings.precision, self.towers)
        if self.clock:
            self.clock.end()
        self._pending.append(results)
        state.step += 1
        state.optimizer_steps += 1
        state.val_error = None

    def settle(self) -> None:
        """Brings results home from the device, and from all ranks, into the state. Raises Diverged, on all of them,
        where a loss or a weight is not finite."""
        finite = torch.stack([parameter.isfinite().all() for parameter in self.model.parameters()]).all()
        results = [torch.stack(pair) for pair in self._pending]
        values = torch.stack([*results, finite.logical_not().float().expand(2)]).double().cpu()
        values = self.ranks.total(values)
        self._pending.clear()
        self.ranks.spans.fold()
        means = (values[:-1] / self.ranks.place.data_ranks).tolist()
        self.state.losses += [loss for loss, _ in means]
        self.state.corrects += [correct for _, correct in means]
        for back, loss in enumerate(reversed(self.state.losses)):
            if not math.isfinite(loss):
                raise Diverged(
                    f"loss {loss} at update {self.state.optimizer_steps - back}; lower the rates (--lr-scale)"
                )
        if values[-1, 0] > 0:
            raise Diverged(
                f"weights are not finite after update {self.state.optimizer_steps}; lower the rates (--lr-scale)"
            )

    def _read_clock(self, hooks: Hooks, last: bool = False) -> None:
        """Passes on what the device has passed; `last` waits for it: what follows is no gap between steps."""
        if self.clock:
            for times in self.clock.finish() if last else self.clock.passed():
                self._device_times.append(times)
                hooks.on_device(times)

    def _begin_epoch(self) -> None:
        state, settings = self.state, self.settings
        if state.epoch < settings.epochs:
            now = learning_rates(self.model.recipe, state.epoch, settings.epochs, state.plateau.reductions)
            set_learning_rates(self.optimizer, now)
            self._rate = now["fc8"].weight

    def _end_epoch(self, hooks: Hooks) -> None:
        self._read_clock(hooks, last=True)
        self.settle()
        state, plateau = self.state, self.model.recipe.plateau
        error = hooks.validate(state.epoch)
        if error is not None and plateau is not None:
            state.plateau = state.plateau.step(error, plateau)
        state.val_error = error
        state.epoch, state.step = state.epoch + 1, 0
        hooks.save(state)
        self._begin_epoch()

    def _log_line(self, batch: int, hooks: Hooks) -> dict[str, Any]:
        """Means over the steps since the last line; times are those of this process, and of its device where it has a
        clock and a gap was measured."""
        self.settle()
        self._read_clock(hooks)
        state, times = self.state, self._times
        line = {
            "epoch": state.epoch,
            "step": state.optimizer_steps,
            "loss": sum(state.losses) / len(state.losses),
            "top1": sum(state.corrects) / len(state.corrects),
            "lr": self._rate,
            "images_per_s": batch * len(times) / sum(t.loop_s for t in times),
            "wait_s": sum(t.wait_s for t in times) / len(times),
            "step_s": sum(t.step_s for t in times) / len(times),
        }
        if gaps_s := [t.gap_s for t in self._device_times if t.gap_s is not None]:
            line["device_gap_s"] = sum(gaps_s) / len(gaps_s)
        state.losses.clear()
        state.corrects.clear()
        times.clear()
        self._device_times.clear()
        return line


def wait_for(device: torch.device) -> None:
    """Returns when the device has done all it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
