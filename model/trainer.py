"""The training loop. `model.train_step` is one step of it.

The loop takes batches from any iterator. Each batch must be the one of the state's epoch and step, so that a resumed
run cannot use the wrong data. Every rank runs the same loop on its rows of each batch; losses and throughput (img/s)
are those of all ranks together. `model.evaluation` imports from this module, never the other way round: validation
reaches the loop as a hook.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.alexnet import AlexNet
from model.batch import Batch
from model.checkpoint import TrainState
from model.cuda_graph import CudaGraph, GraphedStep
from model.device_clock import DeviceTimes, device_clock
from model.dropout import DropoutDraws
from model.optim import Momentum2012, set_learning_rates
from model.parallel.exchange import NO_EXCHANGE, TowerExchange
from model.precision import autocast as autocast  # "as": also imported from here
from model.recipe import LRN_FORMS, LrnForm, learning_rates
from model.recipe import PRECISIONS as PRECISIONS
from model.train_step import train_step as train_step

LOWER = "lower the learning rates (--lr-scale)"


@dataclass(frozen=True)
class LoopSettings:
    """How long to train, and how often to log and save.

    Attributes:
        epochs: epochs of the full run; the recipe's schedule is stretched over them.
        steps_per_epoch: optimizer steps of an epoch.
        seed: seed of the dropout masks.
        log_every: optimizer steps between two lines of metrics. Reading the loss makes the host wait for the device.
        precision: one of `PRECISIONS`; the paper used single precision.
        max_optimizer_steps: stop after so many optimizer steps, on the schedule of `epochs`; None for no limit.
        save_every: optimizer steps between two checkpoints within an epoch; None for checkpoints at its end only.
        lrn: how the network computes LRN, one of `LRN_FORMS`.
        cuda_graph: whether the step is captured once and replayed (`model.cuda_graph`).

    Raises:
        ValueError: if a number is below 1, or the precision or the form of LRN is unknown.
    """

    epochs: int
    steps_per_epoch: int
    seed: int
    log_every: int = 20
    precision: str = "float32"
    max_optimizer_steps: int | None = None
    save_every: int | None = None
    lrn: LrnForm = "eager"
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "steps_per_epoch", "log_every", "max_optimizer_steps", "save_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value}, expected at least 1")
        for name, known in (("precision", PRECISIONS), ("lrn", LRN_FORMS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r}, expected one of {', '.join(known)}")

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of the whole run."""
        full = self.epochs * self.steps_per_epoch
        return full if self.max_optimizer_steps is None else min(full, self.max_optimizer_steps)


@dataclass(frozen=True)
class StepTimes:
    """Times of one step on the host, in seconds.

    Attributes:
        wait_s: time in next(), waiting for the batch.
        step_s: time in the step itself.
        loop_s: time since the previous step ended. After a pause (the start of the loop, a checkpoint, the end of an
            epoch) it counts from the end of the pause.
    """

    wait_s: float
    step_s: float
    loop_s: float


@dataclass(frozen=True)
class Hooks:
    """The functions through which the loop talks to its caller.

    Attributes:
        on_step: called after every step with its number of images, of all ranks, and its times on this rank.
        on_log: called with a line for metrics.jsonl.
        validate: called at the end of an epoch with its number; returns the validation error, or None if nothing was
            validated. It may raise `Interrupted`: the loop then ends, and a resumed run begins with this validation.
        save: called with the state to save: at the end of an epoch before its validation and again after it, and every
            `LoopSettings.save_every` steps.
        stopped: asked after every step; True ends the loop. All ranks must get the same answer.
        on_device: called with a step's times on the device once the device has passed the step; never on the CPU.
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
    """The run was asked to stop in the middle of a validation."""


class Trainer:
    """The training loop.

    Args:
        model: the network, or the towers of this rank.
        optimizer: of the same parameters.
        settings: length of the run, logging, saving.
        state: where training stands; the loop changes it.
        towers: communication with the other ranks.

    Attributes:
        ranks: this rank among the others.
        clock: the device's clock; None on the CPU.
    """

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
        self._graphed = GraphedStep(model, optimizer, settings.precision, CudaGraph()) if settings.cuda_graph else None
        self._pending: list[tuple[Tensor, Tensor]] = []  # results of steps, which are still on the device
        self.clock = device_clock(self.ranks.device)
        self._times: list[StepTimes] = []  # since the last line of metrics, like the next list
        self._device_times: list[DeviceTimes] = []

    def fit(self, batches: Iterator[Batch], hooks: Hooks) -> bool:
        """Trains until the run is complete or `hooks.stopped` says True.

        Returns:
            Whether the run is complete.

        Raises:
            Diverged: on all ranks, if a loss or a weight is not finite.
        """
        try:
            self._fit(batches, hooks)
        except Interrupted:  # the validation stays due, and its result is not in the state
            pass
        self._read_clock(hooks, last=True)
        self.settle()
        return self.state.optimizer_steps >= self.settings.optimizer_steps and not self._validation_is_due

    @property
    def _validation_is_due(self) -> bool:
        return self.state.step == self.settings.steps_per_epoch

    def _fit(self, batches: Iterator[Batch], hooks: Hooks) -> None:
        state, settings, ranks = self.state, self.settings, self.ranks
        if self._validation_is_due:  # the run was stopped during this validation
            self._end_epoch(hooks)
        self._begin_epoch()
        ended_s = time.perf_counter()
        while state.optimizer_steps < settings.optimizer_steps:
            started_s = time.perf_counter()
            ranks.mark("waiting for the next batch", state.optimizer_steps + 1)
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
        """Trains on one batch and advances the state."""
        state, place = self.state, self.ranks.place
        assert (batch.epoch, batch.step) == (state.epoch, state.step), "the loader and the loop are at different steps"
        images = len(batch.labels) * place.data_ranks
        draws = DropoutDraws(self.settings.seed, state.optimizer_steps, place.first_row(images), images)
        self.ranks.mark("computing its part of the step")
        if self.clock:
            self.clock.begin()
        results = self.compute(batch, draws)
        if self.clock:
            self.clock.end()
        self._pending.append(results)
        state.step += 1
        state.optimizer_steps += 1
        state.val_error = None

    def compute(self, batch: Batch, draws: DropoutDraws) -> tuple[Tensor, Tensor]:
        """One optimizer step as the loop takes it, which does not advance the state; as `train_step`."""
        if self._graphed:
            return self._graphed(batch, draws)
        return train_step(self.model, self.optimizer, batch, draws, self.settings.precision, self.towers)

    def settle(self) -> None:
        """Moves the results of pending steps from the device, and from all ranks, into the state.

        It makes the host wait for the device, so it runs only before logging, validating and saving.

        Raises:
            Diverged: on all ranks, if a loss or a weight is not finite.
        """
        finite = torch.stack([parameter.isfinite().all() for parameter in self.model.parameters()]).all()
        results = [torch.stack(pair) for pair in self._pending]
        values = torch.stack([*results, finite.logical_not().float().expand(2)]).double().cpu()
        values = self.ranks.total(values)  # over all ranks, so that all raise, or none
        self._pending.clear()
        self.ranks.spans.fold()
        means = (values[:-1] / self.ranks.place.data_ranks).tolist()
        self.state.losses += [loss for loss, _ in means]
        self.state.top1s += [correct for _, correct in means]
        for steps_back, loss in enumerate(reversed(self.state.losses)):
            if not math.isfinite(loss):
                raise Diverged(f"loss {loss} at optimizer step {self.state.optimizer_steps - steps_back}; {LOWER}")
        if values[-1, 0] > 0:
            raise Diverged(f"weights are not finite after optimizer step {self.state.optimizer_steps}; {LOWER}")

    def _read_clock(self, hooks: Hooks, last: bool = False) -> None:
        """Passes the times of finished steps to the hook. With `last` it waits for all of them; it is set before a
        pause, so that the pause does not count as a gap between steps."""
        if self.clock:
            for times in self.clock.finish() if last else self.clock.passed():
                self._device_times.append(times)
                hooks.on_device(times)

    def _begin_epoch(self) -> None:
        state, settings = self.state, self.settings
        if state.epoch < settings.epochs:
            now = learning_rates(self.model.recipe, state.epoch, settings.epochs, state.plateau.reductions)
            set_learning_rates(self.optimizer, now)
            self._learning_rate = now["fc8"].weight

    def _end_epoch(self, hooks: Hooks) -> None:
        self._read_clock(hooks, last=True)
        self.settle()
        state, plateau = self.state, self.model.recipe.plateau
        hooks.save(state)  # first: whatever fails in the validation, the epoch is not lost
        error = hooks.validate(state.epoch)
        if error is not None and plateau is not None:
            state.plateau = state.plateau.step(error, plateau)
        state.val_error = error
        state.epoch, state.step = state.epoch + 1, 0
        hooks.save(state)
        self._begin_epoch()

    def _log_line(self, global_batch: int, hooks: Hooks) -> dict[str, Any]:
        """A line of metrics: means over the steps since the last line. Times are those of this process; `device_gap_s`
        is in the line if a gap was measured on the device."""
        self.settle()
        self._read_clock(hooks)
        state, times = self.state, self._times
        line = {
            "epoch": state.epoch,
            "step": state.optimizer_steps,
            "loss": sum(state.losses) / len(state.losses),
            "top1": sum(state.top1s) / len(state.top1s),
            "lr": self._learning_rate,
            "images_per_s": global_batch * len(times) / sum(t.loop_s for t in times),
            "wait_s": sum(t.wait_s for t in times) / len(times),
            "step_s": sum(t.step_s for t in times) / len(times),
        }
        if gaps_s := [t.gap_s for t in self._device_times if t.gap_s is not None]:
            line["device_gap_s"] = sum(gaps_s) / len(gaps_s)
        state.losses.clear()
        state.top1s.clear()
        times.clear()
        self._device_times.clear()
        return line


def wait_for(device: torch.device) -> None:
    """Waits until the device has finished all queued work; on the CPU nothing is queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
