"""One training run: the loop with its data loader, the run's folder, the screen, and the stall report at its end."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from model import checkpoint
from model.alexnet import AlexNet
from model.checkpoint import TrainState
from model.checkpoint_copy import seen_by_all
from model.device_clock import DeviceTimes
from model.evaluation import Scores, evaluate
from model.optim import Momentum2012
from model.parallel.exchange import TowerExchange, step_bytes
from model.parallel.half_batches import swaps_crops, whole_batches
from model.parallel.ranks import no_mark
from model.parallel.watchdog import Watchdog
from model.precision import prepare
from model.recipe import PlateauState, learning_rates
from model.trainer import Diverged, Hooks, Interrupted, StepTimes, Trainer
from model.transfer import load_layers, skip_frozen_gradients
from pipeline.loader.batch import Batch
from pipeline.loader.loader import view_loader
from pipeline.profiling.clocks import StepClocks
from pipeline.profiling.run_marks import RunMarks
from pipeline.profiling.trace import StepTrace
from pipeline.shards.reader import ShardSet
from tools.shared.chance import ChanceWatch
from tools.shared.checkpoint_data import data_record
from tools.shared.cli import Progress, one_line
from tools.shared.input_watch import InputWatch
from tools.shared.job import Job
from tools.shared.loggers import loggers_of
from tools.shared.model_card import update_card
from tools.shared.run_description import describe, format_bytes
from tools.shared.stall_report import Trained, report
from tools.shared.stop_signals import StopRequested, StopSignals, resume_command
from tools.shared.tracking import Tracking, wait_share

KEPT_CHECKPOINTS = 3  # the last one and two earlier ones; the best one is kept besides


class TrainingRun:
    """Trains one network on this rank: connects the trainer with the data loader, the run's folder and the screen.

    Every rank of a job makes one and calls the same methods in the same order.

    Args:
        job: the resolved settings.
        signals: asks the run to stop.
        begin_from: checkpoint to continue from; None to start, or, on other ranks than the first, for the same one.

    Attributes:
        trainer: the loop, with network, optimizer and state.
        clocks: times of the steps, for the stall report.
        trace: the last steps on one time axis.
        saved: whether the last attempt to save a checkpoint succeeded on every rank.
        stopped_by: number of the signal that stopped the training; 0 if none did.
        ranks_apart: whether a failed stall report may have left the ranks at different places.
    """

    def __init__(self, job: Job, signals: StopSignals, begin_from: Path | None = None) -> None:
        self.job, self.ranks, self.folder = job, job.ranks, job.folder
        self.clocks = StepClocks(RunMarks())
        self.saved = self.ranks_apart = False
        self.stopped_by = 0
        self._signals, self._card_failed = signals, False
        self._saved_steps = -1  # optimizer steps of the checkpoint that this process saved last
        self._chance = ChanceWatch(job.spec.classes)
        self._data = data_record(job.shards.manifest, job.basis) if self.ranks.first else None
        model = AlexNet(job.spec, job.recipe, self.ranks.place.towers, job.loop.seed).to(job.device)
        prepare(model, job.device.type, job.loop.precision)
        model.use_lrn(job.loop.lrn)
        optimizer = Momentum2012(model.named_parameters(), job.recipe, learning_rates(job.recipe, 0, job.loop.epochs))
        state = self._restored(model, optimizer, begin_from)
        if self.ranks.place.world == 1:
            skip_frozen_gradients(model)
        if self.ranks.first:
            # Logged but not in the checkpoint: the run ended between the two, and makes this validation again.
            self.folder.forget_after(state.optimizer_steps, validation_is_due=state.val_error is None)
            print(describe(job, state))
        chosen = job.tensorboard, job.prometheus
        loggers = loggers_of(self.folder, state.optimizer_steps, *chosen) if self.ranks.first else []
        self._tracking = Tracking(loggers, warn)
        self.trainer = Trainer(model, optimizer, job.loop, state, TowerExchange(self.ranks, model))
        step_bytes = float(job.shards.index["size"].mean()) * job.loader.batch / self.ranks.place.world
        self.trace = StepTrace()
        self._watch = InputWatch(self.ranks, self.trainer.clock is not None, step_bytes, seen=self.trace.marks.append)

    def _restored(self, model: AlexNet, optimizer: Momentum2012, path: Path | None) -> TrainState:
        """Fills `model` and `optimizer` from a checkpoint, if any, and returns the state to continue from."""
        if self.job.resume_from is None:
            own = checkpoint.optimizer_steps_of(path) if path and self.ranks.first else -1
            path = checkpoint.named(self.folder.checkpoints, self.ranks.largest(own))
        if path is None:
            if self.job.init_from:
                taken = load_layers(self.job.init_from[0], model, self.job.init_from[1])
                self.say(f"transfer   {', '.join(taken)} of {self.job.init_from[0]}")
            return TrainState.start()
        with seen_by_all(path, self.ranks) as seen:
            return checkpoint.restore(seen, model, optimizer, self.job.loop.seed)

    def say(self, line: str) -> None:
        """Prints a line on the first rank."""
        if self.ranks.first:
            print(line, flush=True)

    def train(self) -> bool:
        """Trains to the end of the run (returns True) or until a signal (returns False), and saves a checkpoint.

        Raises:
            Diverged: the loss or a weight is not a finite number.
        """
        state, batch = self.trainer.state, self.job.loader.batch
        total, done = self.job.loop.optimizer_steps * batch, state.optimizer_steps * batch
        self.ranks.sent.clear()
        with (
            self._watched(),
            self.job.local_loader(state.epoch, state.step) as loader,
            closing(whole_batches(loader, self.ranks, finish=loader.finish)) as whole,
            Progress("training", total, done=done, quiet=not self.ranks.first) as self._progress,
        ):
            try:
                batches = self._tracking.with_example(whole, self.job.basis.mean, state.optimizer_steps)
                finished = self.trainer.fit(batches, self._hooks())
            except (ValueError, OSError):
                self._save_before_the_error()
                raise
            self._save(state)
            if finished:
                finished = self._validated_at_the_end(state)
            if bad := loader.bad_samples:
                title = f"skipped {len(bad)} damaged image{'s' * (len(bad) > 1)}:"
                self._progress.say("\n  ".join([title, *bad]))
        return finished

    def _save_before_the_error(self) -> None:
        """Saves the steps before the input failed. Several ranks cannot: the others are in the middle of a step."""
        state = self.trainer.state
        if self.ranks.place.world > 1 or not state.optimizer_steps:
            return
        with suppress(Diverged):
            self.trainer.settle()
            self._save(state)
            self._progress.say(f"saved after optimizer step {state.optimizer_steps:,}; then the input failed")

    def _validated_at_the_end(self, state: TrainState) -> bool:
        """Validates a run that ends within an epoch (--steps). Returns False if a signal stopped the validation."""
        if self.job.val is None or state.step == 0 or state.val_error is not None:
            return True
        try:
            state.val_error = self._validate(state.epoch)
        except Interrupted:
            return False
        self._save(state)
        return True

    def report(self) -> int:
        """Makes the stall report. A failure gives a warning: the training is complete.

        Returns:
            The number of the signal that ended the report early; 0 if none did.
        """
        job, waits_s = self.job, self.ranks.spans.take()
        trained = Trained(job.shards, job.basis, job.loader, self.trainer, job.folder.path, job.stall_s)
        try:
            with self._signals.raising():
                record = report(trained, self.clocks, waits_s, self.trace)
            if record is not None:
                self._tracking.report(self.trainer.state.optimizer_steps, record)
        except StopRequested:
            self.say(f"stopped in the stall report; the training is complete; for the report: {resume_command()}")
        except Exception as error:
            if os.environ.get("TRACEBACK"):
                raise
            if self.ranks.first:
                made = f"the stall report could not be made ({one_line(error)}); the training is complete"
                warn(f"{made}; to try again: {resume_command()}")
        else:
            return 0
        self.ranks_apart = self.ranks.place.world > 1
        return self._signals.requested

    # ---- what the loop calls ----------------------------------------------------------------------------------------

    def _hooks(self) -> Hooks:
        return Hooks(
            on_step=self._on_step,
            on_log=self._on_log,
            validate=self.clocks.paused("validation", self._validate),
            save=self.clocks.paused("checkpoints", self._save),
            stopped=self._stopped,
            on_device=self._on_device_step,
        )

    def _on_step(self, images: int, times: StepTimes) -> None:
        if self.clocks.first_wait_s is None:
            self._check_bytes()
        state, first_of_epoch = self.trainer.state, self.trainer.state.step == 1
        self.trace.step(state.optimizer_steps, times.wait_s, times.step_s, times.loop_s, first_of_epoch)
        self.clocks.add(images, times.wait_s, times.step_s, times.loop_s, edge=first_of_epoch)
        self._watch.step(times.wait_s, times.loop_s, first_of_epoch)
        self._progress(images)

    def _on_device_step(self, times: DeviceTimes) -> None:
        for clocks in (self.clocks.add_device, self.trace.device_step, self._watch.device_step):
            clocks(times.gap_s, times.step_s, times.steps)

    def _on_log(self, line: dict[str, Any]) -> None:
        state, loop = self.trainer.state, self.job.loop
        line["wait_share"] = wait_share(line, self.job.loader.batch)
        line["au_estimate"] = 1 - line["wait_share"]
        if change := self._watch.after_interval(line["step"]):
            self._progress.say(change)
        line["input_bound"] = self._watch.input_bound
        self._tracking.log(line)
        now = learning_rates(self.job.recipe, state.epoch, loop.epochs, state.plateau.reductions)
        self._tracking.learning_rates(line["step"], now)
        if (text := self._chance.warning(line["step"], line["loss"])) and self.ranks.first:
            warn(text)
        self._progress.note = f"loss {line['loss']:.3f}, top-1 {line['top1']:.1%}, waited {line['wait_share']:.0%}"

    def _validate(self, epoch: int) -> float | None:
        steps = self.trainer.state.optimizer_steps
        self._tracking.kernels(steps, self.trainer.model.get_parameter("conv1.weight"))
        if self.job.val is None:
            return None
        scores, left_out = self._scores(self.job.val)
        if not scores.images:
            raise ValueError(f"{self.job.val.folder}: no image of it can be decoded; make the shard set again")
        state, plateau = self.trainer.state, self.job.recipe.plateau
        val_set = self.job.val.manifest_sha256
        if plateau is not None and state.val_set not in (None, val_set):  # errors on two sets are not comparable
            state.plateau = replace(state.plateau, best_error=PlateauState().best_error)
        state.val_set = val_set
        line: dict[str, Any] = {"epoch": epoch, "step": state.optimizer_steps}
        line |= {"val_loss": scores.loss, "val_top1": scores.top1, "val_top5": scores.top5}
        found = f"loss {scores.loss:.3f}, top-1 {scores.top1:.1%}, top-5 {scores.top5:.1%}"
        if left_out:
            line["val_left_out"] = left_out
            found += f", without {left_out} damaged image{'s' * (left_out > 1)} of {len(self.job.val):,}"
        self._tracking.log(line)
        self._progress.say(f"epoch {epoch + 1} of {self.job.loop.epochs}: validation: {found}")
        return 1 - scores.top1

    def _save(self, state: TrainState) -> None:
        """Saves a checkpoint. If that fails (full disk), it warns; earlier checkpoints stay and training continues."""
        self.ranks.mark("saving a checkpoint")
        folder, failed = self.folder.checkpoints, False
        path, trainer = folder / checkpoint.name_of(state), self.trainer
        try:
            if self._saved_steps != state.optimizer_steps:
                seed = self.job.loop.seed
                checkpoint.save(path, trainer.model, trainer.optimizer, state, seed, self.ranks, self._data)
            elif self.ranks.first:  # only what a validation found has changed
                checkpoint.update_state(path, state)
            if self.ranks.first:
                checkpoint.prune(folder, KEPT_CHECKPOINTS)
        except (OSError, ValueError) as error:
            failed = True
            warn(f"{error}; the last checkpoint is {checkpoint.latest(folder)}")
        self.saved = not self.ranks.any(failed)
        self._saved_steps = state.optimizer_steps if self.saved else -1
        if self.saved and self.ranks.first and not self._card_failed:
            self._card_failed = not update_card(self.job, state)

    def _stopped(self) -> bool:
        # A signal may reach only some of the ranks. All must end after the same step, or the others would wait forever.
        self.stopped_by = self.ranks.largest(self._signals.requested)
        return self.stopped_by > 0

    # ---- helpers ----------------------------------------------------------------------------------------------------

    def _check_bytes(self) -> None:
        """Asserts, after the first step, that the ranks sent as many bytes as `step_bytes` calculates."""
        ranks, job = self.ranks, self.job
        # The images of the second batch are sent during the first step, so they have been counted twice.
        counted = {kind: count // 2 if kind == "images" else count for kind, count in ranks.sent.items()}
        precision, crops = job.loop.precision, swaps_crops(ranks)
        calculated = step_bytes(ranks.place, job.spec, job.recipe, job.loader.batch, precision, crops)
        assert counted == calculated, f"rank {ranks.place.rank} sent {counted}, calculated {calculated}"
        if ranks.first and counted:
            print(f"counted    rank 0 sent {format_bytes(counted)}, as calculated", flush=True)

    def _scores(self, val: ShardSet) -> tuple[Scores, int]:
        """Returns the scores of the centre crops of the validation set, of which each rank decodes its part, and the
        number of damaged images that were left out."""
        place = self.ranks.place
        left_out = list[str]()

        def views() -> Iterator[Batch]:
            for batch in view_loader(val, self.job.basis, self.job.loader, rank=place.rank, ranks=place.world):
                left_out.extend(batch.left_out)
                yield batch

        with closing(whole_batches(views(), self.ranks, uneven=True)) as batches:
            trainer = self.trainer
            scores = evaluate(trainer.model, batches, self.job.loop.precision, trainer.towers, self._stopped)
        return scores, int(self.ranks.total(torch.tensor([len(left_out)])).item())

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Runs a watchdog that ends the job if a rank hangs. A rank alone needs none."""
        if self.ranks.store is None:
            yield
            return
        place = self.ranks.place
        with Watchdog(self.ranks.store, place.rank, place.world, self.job.hang_s) as watchdog:
            self.ranks.mark = watchdog.mark
            yield
            self.ranks.mark = no_mark


def warn(message: str) -> None:
    """Prints a warning on stderr."""
    print(f"train.py: warning: {message}", file=sys.stderr)
