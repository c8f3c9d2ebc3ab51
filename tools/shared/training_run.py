"""One training run, from the meeting of its ranks to its stall report: all of tools/train.py except the arguments."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, TypeVar

import torch

from model import checkpoint
from model.alexnet import AlexNet
from model.checkpoint import TrainState
from model.device_clock import DeviceTimes
from model.evaluation import Scores, evaluate
from model.optim import Momentum2012
from model.parallel.exchange import TowerExchange, step_bytes
from model.parallel.half_batches import whole_batches
from model.parallel.ranks import Ranks, no_mark, restarts, start
from model.parallel.watchdog import Watchdog
from model.recipe import learning_rates
from model.trainer import Diverged, Hooks, StepTimes, Trainer
from pipeline.loader.loader import view_loader
from pipeline.loader.settings import Device
from pipeline.profiling.clocks import StepClocks
from pipeline.shards.reader import ShardSet
from tools.shared.cli import Progress
from tools.shared.job import Job, resolve
from tools.shared.provenance import launch
from tools.shared.run_description import describe, format_bytes
from tools.shared.stall_report import Trained, report

KEPT_CHECKPOINTS = 3  # the last one and two earlier ones; the best one is kept besides
SHORTEST_HANG_S = 30.0  # for torch.distributed's own timeout: its ranks may take this long to meet

Result = TypeVar("Result")


def train_from_arguments(args: argparse.Namespace) -> int:
    """Runs tools/train.py with its parsed arguments on this rank and returns the exit code."""
    device: Device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    # Twice as long as the watchdog's limit: the watchdog ends a hanging job first, and its message names the rank.
    ranks = start(args.layout, device, timeout_s=2 * max(args.hang_seconds, SHORTEST_HANG_S))
    job = first_rank_first(ranks, lambda: resolve(args, device, ranks))
    # Ranks that torchrun restarts after a failure resume by themselves, if the same torchrun started the run.
    resume = args.resume or (restarts() > 0 and job.folder.launch() == launch())
    first_rank_first(ranks, lambda: job.folder.begin(job.config(), resume) if ranks.first else None)
    code = train_and_report(job)
    ranks.leave()
    return code


def first_rank_first(ranks: Ranks, action: Callable[[], Result]) -> Result:
    """Calls `action` on the first rank, and on the others once it has succeeded there.

    If it fails on the first rank, that rank raises the error and all others exit with 2 in silence: one mistake of the
    user gives one message.
    """
    if not ranks.first:
        if ranks.any(False):
            sys.exit(2)
        return action()
    try:
        result = action()
    except (ValueError, OSError):
        ranks.any(True)
        raise
    ranks.any(False)
    return result


def train_and_report(job: Job) -> int:
    """Trains from the run's last checkpoint on, measures the stall report, and returns the exit code."""
    run = TrainingRun(job)
    state, checkpoints = run.trainer.state, job.folder.checkpoints
    try:
        finished = run.train()
    except Diverged as error:
        if job.ranks.first:
            print(f"train.py: {error}; checkpoints are in {checkpoints}", file=sys.stderr)
        return 1
    if not finished:
        run.say(f"stopped after optimizer step {state.optimizer_steps:,}; add --resume to the same command to continue")
        return 0 if run.saved else 1
    rank_waits_s = job.ranks.spans.take()
    if job.stall_s:
        trained = Trained(job.shards, job.basis, job.loader, run.trainer, job.folder.path, job.stall_s)
        report(trained, run.clocks, rank_waits_s)
    if best := checkpoint.best(checkpoints):
        run.say(f"best checkpoint: {best}")
    run.say(f"run folder: {job.folder.path}")
    return 0 if run.saved else 1


class TrainingRun:
    """Trains one network on this rank: connects the trainer with the data loader, the run's folder and the screen.

    Every rank of a job makes one and calls the same methods in the same order.

    Attributes:
        trainer: the loop, with network, optimizer and state; restored from the last checkpoint if there is one.
        clocks: times of the steps, for the stall report.
        saved: whether the last attempt to save a checkpoint succeeded on every rank.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.ranks, self.folder = job, job.ranks, job.folder
        self.clocks = StepClocks()
        self.saved = False
        self._stop_requested = self._log_failed = False
        model = AlexNet(job.spec, job.recipe, self.ranks.place.towers, job.loop.seed).to(job.device)
        optimizer = Momentum2012(model.named_parameters(), job.recipe, learning_rates(job.recipe, 0, job.loop.epochs))
        state = self._restored(model, optimizer)
        if self.ranks.first:
            self.folder.forget_after(state.optimizer_steps)
            print(describe(job, state))
        self.trainer = Trainer(model, optimizer, job.loop, state, TowerExchange(self.ranks, model))

    def _restored(self, model: AlexNet, optimizer: Momentum2012) -> TrainState:
        """Fills `model` and `optimizer` from the last checkpoint, if any, and returns the state to continue from."""
        # The largest over the ranks: on a slow file system a rank might not see yet what the first one has written.
        steps = self.ranks.largest(checkpoint.optimizer_steps(self.folder.checkpoints))
        path = checkpoint.named(self.folder.checkpoints, steps)
        return checkpoint.restore(path, model, optimizer, self.job.loop.seed) if path else TrainState.start()

    def say(self, line: str) -> None:
        """Prints a line on the first rank."""
        if self.ranks.first:
            print(line)

    def train(self) -> bool:
        """Trains to the end of the run (returns True) or until SIGTERM (returns False), and saves a checkpoint.

        Raises:
            Diverged: the loss or a weight is not a finite number.
        """
        state, batch = self.trainer.state, self.job.loader.batch
        total, done = self.job.loop.optimizer_steps * batch, state.optimizer_steps * batch
        previous_handler = signal.signal(signal.SIGTERM, self._request_stop)
        self.ranks.sent.clear()
        with (
            self._watched(),
            self.job.local_loader(state.epoch, state.step) as loader,
            closing(whole_batches(loader, self.ranks)) as batches,
            Progress("training", total, done=done, quiet=not self.ranks.first) as self._progress,
        ):
            finished = self.trainer.fit(batches, self._hooks())
            self._save(state)
            if bad := loader.bad_samples:
                title = f"skipped {len(bad)} damaged image{'s' * (len(bad) > 1)}:"
                self._progress.say("\n  ".join([title, *bad]))
        signal.signal(signal.SIGTERM, previous_handler)
        return finished

    # ---- what the loop calls ----------------------------------------------------------------------------------------

    def _hooks(self) -> Hooks:
        return Hooks(
            on_step=self._on_step,
            on_log=self._on_log,
            validate=self._validate,
            save=self._save,
            stopped=self._stopped,
            on_device=self._on_device_step,
        )

    def _on_step(self, images: int, times: StepTimes) -> None:
        if self.clocks.first_wait_s is None:
            self._check_bytes()
        first_of_epoch = self.trainer.state.step == 1
        self.clocks.add(images, times.wait_s, times.step_s, times.loop_s, edge=first_of_epoch)
        self._progress(images)

    def _on_device_step(self, times: DeviceTimes) -> None:
        self.clocks.add_device(times.gap_s, times.step_s)

    def _on_log(self, line: dict[str, Any]) -> None:
        self._log(line)
        self._progress.note = f"loss {line['loss']:.3f}, top-1 {line['top1']:.1%}"

    def _validate(self, epoch: int) -> float | None:
        if self.job.val is None:
            return None
        scores = self._scores(self.job.val)
        line = {"epoch": epoch, "step": self.trainer.state.optimizer_steps}
        self._log(line | {"val_loss": scores.loss, "val_top1": scores.top1, "val_top5": scores.top5})
        found = f"loss {scores.loss:.3f}, top-1 {scores.top1:.1%}, top-5 {scores.top5:.1%}"
        self._progress.say(f"epoch {epoch + 1} of {self.job.loop.epochs}: validation: {found}")
        return 1 - scores.top1

    def _save(self, state: TrainState) -> None:
        """Saves a checkpoint. If that fails (full disk), it warns; earlier checkpoints stay and training continues."""
        self.ranks.mark("saving a checkpoint")
        folder, failed = self.folder.checkpoints, False
        path = folder / checkpoint.name_of(state)
        try:
            checkpoint.save(path, self.trainer.model, self.trainer.optimizer, state, self.job.loop.seed, self.ranks)
            if self.ranks.first:
                checkpoint.prune(folder, KEPT_CHECKPOINTS)
        except OSError as error:
            failed = True
            warn(f"{error}; the last checkpoint is {checkpoint.latest(folder)}")
        self.saved = not self.ranks.any(failed)

    def _stopped(self) -> bool:
        # SIGTERM may reach only some of the ranks. All must end after the same step, or the others would wait forever.
        return self.ranks.any(self._stop_requested)

    # ---- helpers ----------------------------------------------------------------------------------------------------

    def _request_stop(self, signum: int, frame: object) -> None:
        self._stop_requested = True

    def _log(self, line: dict[str, Any]) -> None:
        """Adds a line to metrics.jsonl. The first failure gives a warning; later calls write the missing lines."""
        if not self.ranks.first:
            return
        try:
            self.folder.log(line)
        except OSError as error:
            if not self._log_failed:
                self._log_failed = True
                warn(f"{error}; training continues")

    def _check_bytes(self) -> None:
        """Asserts, after the first step, that the ranks sent as many bytes as `step_bytes` calculates."""
        ranks, job = self.ranks, self.job
        # The images of the second batch are sent during the first step, so they have been counted twice.
        counted = {kind: count // 2 if kind == "images" else count for kind, count in ranks.sent.items()}
        calculated = step_bytes(ranks.place, job.spec, job.recipe, job.loader.batch, job.loop.precision)
        assert counted == calculated, f"rank {ranks.place.rank} sent {counted}, calculated {calculated}"
        if ranks.first and counted:
            print(f"counted    rank 0 sent {format_bytes(counted)}, as calculated", flush=True)

    def _scores(self, val: ShardSet) -> Scores:
        """Returns the scores of the centre crops of the validation set, of which each rank decodes its part."""
        place = self.ranks.place
        views = view_loader(val, self.job.basis, self.job.loader, rank=place.rank, ranks=place.world)
        with closing(whole_batches(views, self.ranks, uneven=True)) as batches:
            trainer = self.trainer
            return evaluate(trainer.model, batches, self.job.loop.precision, trainer.towers, self._stopped)

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
