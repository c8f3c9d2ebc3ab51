"""Trains the network of 2012 from a shard set and says what training waited for.

    python tools/train.py data/sample-256/train --val data/sample-256/val --run-name first
    torchrun --nproc-per-node 2 -- tools/train.py data/sample-256/train --val data/sample-256/val --run-name first

Writes runs/NAME/: config.json, metrics.jsonl, checkpoints/, stall.json, report.html. SIGTERM saves a checkpoint after
the step in hand and exits with 0; --resume goes on from the last one, with the numbers of a run that was never stopped,
on as many ranks as it now has. With two ranks each has a tower, with 4, 8, ... there are as many pairs; ranks that
torchrun started again after a failure resume by themselves. Exits with 1 when the loss is no longer a number, when a
rank hangs, or when the last checkpoint could not be saved; with 2 on wrong input.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, get_args

import psutil
import torch

from model import checkpoint, recipe
from model.alexnet import AlexNet
from model.checkpoint import TrainState
from model.device_clock import DeviceTimes
from model.evaluation import Scores, evaluate
from model.optim import Momentum2012
from model.parallel.exchange import TowerExchange, step_bytes
from model.parallel.half_batches import whole_batches
from model.parallel.mesh import RankLayout
from model.parallel.ranks import Ranks, cores_here, no_mark, ranks_here, restarts, start
from model.parallel.watchdog import Watchdog
from model.runs import RunFolder
from model.shapes import NetSpec, layer_table
from model.trainer import PRECISIONS, Diverged, Hooks, LoopSettings, StepTimes, Trainer
from pipeline import rgb_pca
from pipeline.diagnosis.tuning import load_tuned
from pipeline.loader.augment import Lighting
from pipeline.loader.loader import TrainLoader, view_loader
from pipeline.loader.order import Order, local_batch, steps_per_epoch
from pipeline.loader.settings import Device, LoaderSettings, OnBadSample, check_device, default_threads
from pipeline.profiling.clocks import StepClocks
from pipeline.rgb_pca import Eigenbasis
from pipeline.shards.reader import ShardSet, open_shards
from tools.shared.cli import Progress, run
from tools.shared.stall_report import Trained, report

KEPT = 3  # checkpoints: the last one, and two to go back to; the best one besides

Result = TypeVar("Result")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("shards", type=Path, metavar="SHARDS", help="a train shard set with its eigenbasis.json")
    add("--val", type=Path, metavar="SHARDS", help="a shard set to validate on after every epoch")
    add("--recipe", choices=recipe.RECIPES, default=recipe.SOURCE2012.name, help="default: %(default)s")
    add("--run-name", default="alexnet", metavar="NAME", help="folder under --runs; default: %(default)s")
    add("--runs", type=Path, default=Path("runs"), metavar="DIR", help="default: %(default)s")
    add("--resume", action="store_true", help="go on from the run's last checkpoint; start where there is none")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, metavar="N", help="stretch the recipe's schedule over N epochs")
    length.add_argument("--steps", type=int, metavar="N", help="stop after N optimizer_steps of the full schedule")
    add("--batch", type=int, metavar="N", help="default: the recipe's, 128")
    add("--seed", type=int, default=2012, help="of weights, dropout, order and crops; default: %(default)s")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--precision", choices=PRECISIONS, default=PRECISIONS[0], help="default: %(default)s")
    add("--width", type=float, default=1.0, metavar="W", help="scales the maps, for small machines; default: 1")
    add("--lr-scale", type=float, default=1.0, metavar="X", help="scales all learning rates; default: 1")
    add("--threads", type=int, metavar="N", help="of a rank's feed; default: one more than its cores, at most 8")
    add("--order", choices=get_args(Order), default="global", help="windowed: few shards at a time, for slow storage")
    add("--on-bad-sample", choices=get_args(OnBadSample), default="stop", help="skip: train on another; default: stop")
    add("--layout", choices=get_args(RankLayout), default="towers", help="of several ranks; default: a tower on each")
    add("--save-every", type=int, metavar="STEPS", help="checkpoints within an epoch; default: at its end only")
    add("--hang-seconds", type=float, default=300.0, metavar="S", help="a rank this late ends the job; default: 300")
    add("--tuned", type=Path, metavar="FILE", help="the feed's settings that bench_loader --tune FILE found")
    add("--stall-seconds", type=float, default=4.0, metavar="S", help="for each rate of the stall report; 0: no report")
    add("--log-every", type=int, default=20, metavar="STEPS", help="default: %(default)s")
    return parser.parse_args()


@dataclass(frozen=True)
class Job:
    """Everything a run needs, resolved and checked."""

    shards: ShardSet
    val: ShardSet | None
    basis: Eigenbasis
    recipe: recipe.Recipe
    spec: NetSpec
    feed: LoaderSettings
    loop: LoopSettings
    folder: RunFolder
    stall_s: float
    hang_s: float
    ranks: Ranks

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        return self.ranks.device

    def local_feed(self, epoch: int = 0, step: int = 0) -> TrainLoader:
        """The feed of the rows that this rank decodes."""
        place = self.ranks.place
        return TrainLoader(self.shards, self.basis, self.feed, epoch, step, place.rank, place.world)

    def config(self) -> dict[str, Any]:
        """For config.json: what decides the numbers, and where they were made."""
        return {
            "must_match": {
                "recipe": asdict(self.recipe),
                "spec": asdict(self.spec),
                "batch": self.feed.batch,
                "order": [self.feed.order, self.feed.window_shards],
                "seed": self.loop.seed,
                "epochs": self.loop.epochs,
                "precision": self.loop.precision,
                "train_manifest_sha256": self.shards.manifest_sha256,
                "eigenvalues": self.basis.eigenvalues.tolist(),
            },
            "feed": asdict(self.feed),
            "train": str(self.shards.folder),
            "val": str(self.val.folder) if self.val else None,
            "python": platform.python_version(),
            "ranks": asdict(self.ranks.place),
            "launch": launch(),
            "versions": {name: version(name) for name in ("torch", "nvidia-dali-cuda120", "numpy")},
            "git_commit": git_commit(),
        }


def git_commit() -> str | None:
    """The commit of the source, None where it is no git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def launch() -> str | None:
    """What started the ranks: torchrun's process, the same when it starts them again. None without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    agent = psutil.Process(os.getppid())
    return f"{platform.node()} {agent.pid} {agent.create_time()}"


def resolve(args: argparse.Namespace, device: Device, ranks: Ranks) -> Job:
    """Opens and checks everything that the arguments name."""
    check_device(device)
    rules = replace(recipe.recipe(args.recipe), learning_rate_scale=args.lr_scale)
    if rules.plateau is not None and args.val is None:
        raise ValueError(f"recipe {rules.name} lowers its rates by the validation error; add --val SHARDS")
    with Progress("hashing tars", None, "B", quiet=not ranks.first) as progress:
        shards = open_shards(args.shards, progress)
        val = open_shards(args.val, progress) if args.val else None
    if val is not None and val.manifest.classes != shards.manifest.classes:
        raise ValueError(f"{val.folder}: other classes than {shards.folder}; shard both from one source")
    epochs = rules.epochs if args.epochs is None else args.epochs
    feed = LoaderSettings(
        batch=rules.batch if args.batch is None else args.batch,
        seed=args.seed,
        device=device,
        lighting=Lighting(rules.lighting, rules.lighting_noise),
        lighting_until=first_epoch_without_noise(rules, epochs),
        mean=rules.mean,
        positions=rules.crop_positions,
        order=args.order,
        on_bad_sample=args.on_bad_sample,
        **{"threads": feed_threads()}
        | (load_tuned(args.tuned) if args.tuned else {})
        | ({"threads": args.threads} if args.threads is not None else {}),
    )
    local_batch(feed.batch, ranks.place.world)
    steps = steps_per_epoch(len(shards), feed.batch)
    loop = LoopSettings(epochs, steps, args.seed, args.log_every, args.precision, args.steps, args.save_every)
    if not 0 < args.hang_seconds < math.inf:
        raise ValueError(f"--hang-seconds {args.hang_seconds:g}, expected a positive number")
    basis = rgb_pca.load(args.shards / "eigenbasis.json", shards)
    spec = NetSpec(len(shards.manifest.classes), args.width)
    folder = RunFolder(args.runs / args.run_name)
    return Job(shards, val, basis, rules, spec, feed, loop, folder, args.stall_seconds, args.hang_seconds, ranks)


def feed_threads() -> int:
    """The feed's own default, of this rank's share of the machine's cores."""
    return default_threads() if ranks_here() == 1 else min(8, cores_here() + 1)


def first_epoch_without_noise(rules: recipe.Recipe, epochs: int) -> int:
    """The first epoch of a run of `epochs` in which the recipe makes no colour noise; `epochs` where it always does."""
    return next((e for e in range(epochs) if recipe.lighting_noise(rules, e, epochs) == 0), epochs)


def main() -> int:
    """Meets the other ranks, trains, then measures what training waited for."""
    args = parse()
    device: Device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    ranks = start(args.layout, device, 2 * max(args.hang_seconds, 30.0))  # so that the watch speaks first
    job = in_turn(ranks, lambda: resolve(args, device, ranks))
    resume = args.resume or (restarts() > 0 and job.folder.launch() == launch())
    in_turn(ranks, lambda: job.folder.begin(job.config(), resume) if ranks.first else None)
    code = train_and_report(job)
    ranks.leave()
    return code


def in_turn(ranks: Ranks, do: Callable[[], Result]) -> Result:
    """Has the first rank `do` something, then all others; where the first fails they end, for it has said why."""
    if not ranks.first:
        if ranks.any(False):
            sys.exit(2)
        return do()
    try:
        result = do()
    except (ValueError, OSError):
        ranks.any(True)
        raise
    ranks.any(False)
    return result


def train_and_report(job: Job) -> int:
    """The run from its last checkpoint on; returns the exit code."""
    ranks, folder = job.ranks, job.folder
    model = AlexNet(job.spec, job.recipe, ranks.place.towers, job.loop.seed).to(job.device)
    optimizer = Momentum2012(
        model.named_parameters(), job.recipe, recipe.learning_rates(job.recipe, 0, job.loop.epochs)
    )
    last = checkpoint.named(folder.checkpoints, ranks.largest(checkpoint.optimizer_steps(folder.checkpoints)))
    state = checkpoint.restore(last, model, optimizer, job.loop.seed) if last else TrainState.start()
    if ranks.first:
        folder.forget_after(state.optimizer_steps)
        describe(job, model, state)
    trainer = Trainer(model, optimizer, job.loop, state, TowerExchange(ranks, model))
    clocks = StepClocks()
    try:
        finished, saved = train(job, trainer, clocks)
    except Diverged as error:
        if ranks.first:
            print(f"train.py: {error}; checkpoints are in {folder.checkpoints}", file=sys.stderr)
        return 1
    say = print if ranks.first else ignore
    if not finished:
        say(f"stopped after update {state.optimizer_steps:,}; the same command with --resume goes on from there")
        return 0 if saved else 1
    waits_s = ranks.spans.take()
    if job.stall_s:
        report(Trained(job.shards, job.basis, job.feed, trainer, folder.path, job.stall_s), clocks, waits_s)
    if best := checkpoint.best(folder.checkpoints):
        say(f"best checkpoint: {best}")
    say(f"run folder: {folder.path}")
    return 0 if saved else 1


def ignore(*_: object) -> None:
    """What the ranks that are not the first have to say."""


def describe(job: Job, model: AlexNet, state: TrainState) -> None:
    """The run in a few lines, before it starts."""
    parameters = sum(s.weights + s.biases for s in layer_table(job.spec, job.recipe))
    place = job.ranks.place
    where = "both towers here" if place.world == 1 else f"both on each of {place.world} ranks"
    if place.is_pair:
        where = "a tower on each rank of a pair"
    print(
        f"recipe     {job.recipe.name}, rates x {job.recipe.learning_rate_scale:g}, batch {job.feed.batch}, seed {job.loop.seed}"
    )
    print(f"network    {parameters:,} parameters, width {job.spec.width:g}, {job.spec.classes} classes, {where}")
    print(f"device     {job.feed.device}, {job.loop.precision}, feed with {job.feed.threads} threads")
    if place.world > 1:
        print("\n".join(describe_ranks(job)))
    print(
        f"data       {len(job.shards):,} samples, {job.loop.steps_per_epoch} steps an epoch, {job.loop.epochs} epochs"
    )
    if state.optimizer_steps:
        print(f"resumed    after update {state.optimizer_steps:,}, epoch {state.epoch}")


def describe_ranks(job: Job) -> list[str]:
    """How the ranks are laid out and the bytes that rank 0, and its peer, are going to send in a step."""
    ranks, place = job.ranks, job.ranks.place
    parts = f"{place.data_ranks} part{'s' if place.data_ranks > 1 else ''} of the batch"
    lines = [f"ranks      {place.world}, by {ranks.backend}: {parts}, {place.tower_ranks} ranks to each"]
    if ranks.shared_gpu:
        lines.append("           THEY SHARE A GPU: a run for correctness; its speed means nothing")
    for rank in range(place.tower_ranks):
        found = step_bytes(replace(place, rank=rank), job.spec, job.recipe, job.feed.batch, job.loop.precision)
        lines.append(f"{'a step' if not rank else '':<10} rank {rank} sends {format_bytes(found)}, by calculation")
    return lines


def format_bytes(sent: dict[str, int]) -> str:
    """Bytes by kind, exactly."""
    return ", ".join(f"{kind} {count:,}" for kind, count in sent.items()) + " bytes"


def check_bytes(job: Job) -> None:
    """After the first step: counted is what was calculated. The images of the next batch are on their way by then."""
    ranks = job.ranks
    counted = {kind: count // 2 if kind == "images" else count for kind, count in ranks.sent.items()}
    calculated = step_bytes(ranks.place, job.spec, job.recipe, job.feed.batch, job.loop.precision)
    assert counted == calculated, f"rank {ranks.place.rank} sent {counted}, calculated {calculated}"
    if ranks.first and counted:
        print(f"counted    rank 0 sent {format_bytes(counted)}, as calculated", flush=True)


def train(job: Job, trainer: Trainer, clocks: StepClocks) -> tuple[bool, bool]:
    """Runs the loop. Returns whether the run is complete (SIGTERM stops it before) and whether its state is saved."""
    ranks, state = job.ranks, trainer.state
    stopping = saved = warned = False

    def stop(signum: int, frame: object) -> None:
        nonlocal stopping
        stopping = True

    def stopped() -> bool:
        return ranks.any(stopping)

    def save(state: TrainState) -> None:
        nonlocal saved
        ranks.mark("saving a checkpoint")
        saved = save_checkpoint(job, trainer)

    batch, optimizer_steps = job.feed.batch, job.loop.optimizer_steps
    previous = signal.signal(signal.SIGTERM, stop)
    ranks.sent.clear()
    with (
        watching(job),
        job.local_feed(state.epoch, state.step) as feed,
        closing(whole_batches(feed, ranks)) as batches,
        Progress(
            "training", optimizer_steps * batch, done=state.optimizer_steps * batch, quiet=not ranks.first
        ) as progress,
    ):

        def on_step(images: int, times: StepTimes) -> None:
            if clocks.first_wait_s is None:
                check_bytes(job)
            clocks.add(images, times.wait_s, times.step_s, times.loop_s, edge=state.step == 1)
            progress(images)

        def on_device(times: DeviceTimes) -> None:
            clocks.add_device(times.gap_s, times.step_s)

        def log(line: dict[str, Any]) -> None:
            nonlocal warned
            try:
                if ranks.first:
                    job.folder.log(line)
            except OSError as error:
                if not warned:
                    warned = True
                    print(f"train.py: warning: {error}; training goes on", file=sys.stderr)

        def on_log(line: dict[str, Any]) -> None:
            log(line)
            progress.note = f"loss {line['loss']:.3f}, top-1 {line['top1']:.1%}"

        def validate_epoch(epoch: int) -> float | None:
            if job.val is None:
                return None
            scores = validate(job, trainer, job.val, stopped)
            values = {"val_loss": scores.loss, "val_top1": scores.top1, "val_top5": scores.top5}
            log({"epoch": epoch, "step": state.optimizer_steps, **values})
            told = f"validation: loss {scores.loss:.3f}, top-1 {scores.top1:.1%}, top-5 {scores.top5:.1%}"
            progress.say(f"epoch {epoch + 1} of {job.loop.epochs}: {told}")
            return 1 - scores.top1

        finished = trainer.fit(batches, Hooks(on_step, on_log, validate_epoch, save, stopped, on_device))
        save(state)
        if bad := feed.bad_samples:
            progress.say("\n  ".join([f"skipped {len(bad)} damaged picture{'s' * (len(bad) > 1)}:", *bad]))
    signal.signal(signal.SIGTERM, previous)
    return finished, saved


@contextmanager
def watching(job: Job) -> Iterator[None]:
    """Has a thread look whether a rank hangs; a rank alone waits for nobody."""
    ranks = job.ranks
    if ranks.store is None:
        yield
        return
    with Watchdog(ranks.store, ranks.place.rank, ranks.place.world, job.hang_s) as watch:
        ranks.mark = watch.mark
        yield
        ranks.mark = no_mark


def save_checkpoint(job: Job, trainer: Trainer) -> bool:
    """Whether the state is saved now. Where the disk is full it is not, and says so; older checkpoints stay."""
    folder, state, failed = job.folder.checkpoints, trainer.state, False
    path = folder / checkpoint.name_of(state)
    try:
        checkpoint.save(path, trainer.model, trainer.optimizer, state, job.loop.seed, job.ranks)
        if job.ranks.first:
            checkpoint.prune(folder, KEPT)
    except OSError as error:
        failed = True
        print(f"train.py: warning: {error}; the last checkpoint is {checkpoint.latest(folder)}", file=sys.stderr)
    return not job.ranks.any(failed)


def validate(job: Job, trainer: Trainer, val: ShardSet, stopped: Callable[[], bool]) -> Scores:
    """Scores of the centre crop on the validation set, of which each rank decodes its part."""
    place = job.ranks.place
    feed = view_loader(val, job.basis, job.feed, rank=place.rank, ranks=place.world)
    with closing(whole_batches(feed, job.ranks, uneven=True)) as batches:
        return evaluate(trainer.model, batches, job.loop.precision, trainer.towers, stopped)


if __name__ == "__main__":
    run(main)
