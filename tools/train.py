"""Trains the network of 2012 from a shard set and says what training waited for.

    python tools/train.py data/sample-256/train --val data/sample-256/val --run first

Writes runs/NAME/: config.json, metrics.jsonl, checkpoints/, stall.json, report.html. SIGTERM saves a checkpoint after
the step in hand and exits with 0; --resume goes on from the last one, with the numbers of a run that was never stopped.
Exits with 1 when the loss is no longer a number, with 2 on wrong input.
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from cli import Progress, cores, run

from model import checkpoint, recipe
from model.alexnet import AlexNet, DropoutDraws, NetSpec
from model.checkpoint import TrainState
from model.optim import Momentum2012
from model.runs import STALL, RunFolder, write_atomically
from model.trainer import PRECISIONS, Diverged, Hooks, LoopSettings, Scores, StepTimes, Trainer, evaluate, train_step
from pipeline import eigenbasis, stall
from pipeline.augment import STORED, Lighting
from pipeline.doctor import Subject, observe
from pipeline.eigenbasis import Eigenbasis
from pipeline.findings import Setup, find, format_findings
from pipeline.fingerprint import machine, memory
from pipeline.graphs import Stage
from pipeline.loader import Batch, Device, FeedSettings, TrainFeed, stage_sizes, view_feed
from pipeline.order import steps_per_epoch
from pipeline.rates import measure_rates
from pipeline.report_html import page
from pipeline.shards import ShardSet, open_shards
from pipeline.tuning import load_tuned

REPLAYED = 4  # batches: enough that none stays in a processor's cache
KEPT = 3  # checkpoints: the last one, and two to go back to
STAGE_ROUNDS = 2  # of the feed's stages in turn
DOCTOR_ROUNDS = 5  # of feed, trainer and both in turn
REPORT = "report.html"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("shards", type=Path, metavar="SHARDS", help="a train shard set with its eigenbasis.json")
    add("--val", type=Path, metavar="SHARDS", help="a shard set to validate on after every epoch")
    add("--recipe", choices=recipe.RECIPES, default=recipe.SOURCE2012.name, help="default: %(default)s")
    add("--run", default="alexnet", metavar="NAME", help="folder under --runs; default: %(default)s")
    add("--runs", type=Path, default=Path("runs"), metavar="DIR", help="default: %(default)s")
    add("--resume", action="store_true", help="go on from the run's last checkpoint; start where there is none")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, metavar="N", help="stretch the recipe's schedule over N epochs")
    length.add_argument("--steps", type=int, metavar="N", help="stop after N updates of the full schedule")
    add("--batch", type=int, metavar="N", help="default: the recipe's, 128")
    add("--seed", type=int, default=2012, help="of weights, dropout, order and crops; default: %(default)s")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--precision", choices=PRECISIONS, default=PRECISIONS[0], help="default: %(default)s")
    add("--width", type=float, default=1.0, metavar="W", help="scales the maps, for small machines; default: 1")
    add("--rate-scale", type=float, default=1.0, metavar="X", help="scales all learning rates; default: 1")
    add("--threads", type=int, metavar="N", help="of the feed; default: one more than cores, at most 8")
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
    feed: FeedSettings
    loop: LoopSettings
    folder: RunFolder
    stall_s: float

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        return torch.device(self.feed.device)

    def config(self) -> dict[str, Any]:
        """For config.json: what decides the numbers, and where they were made."""
        return {
            "must_match": {
                "recipe": asdict(self.recipe),
                "spec": asdict(self.spec),
                "batch": self.feed.batch,
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


def resolve(args: argparse.Namespace) -> Job:
    """Opens and checks everything that the arguments name."""
    device: Device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    rules = replace(recipe.recipe(args.recipe), rate_scale=args.rate_scale)
    if rules.plateau is not None and args.val is None:
        raise ValueError(f"recipe {rules.name} lowers its rates by the validation error; add --val SHARDS")
    with Progress("hashing tars", None, "B") as progress:
        shards = open_shards(args.shards, progress)
        val = open_shards(args.val, progress) if args.val else None
    if val is not None and val.manifest.classes != shards.manifest.classes:
        raise ValueError(f"{val.folder}: other classes than {shards.folder}; shard both from one source")
    epochs = rules.epochs if args.epochs is None else args.epochs
    feed = FeedSettings(
        batch=rules.batch if args.batch is None else args.batch,
        seed=args.seed,
        device=device,
        lighting=Lighting(rules.lighting, rules.colour_noise),
        lighting_until=first_epoch_without_noise(rules, epochs),
        mean=rules.mean,
        positions=rules.crop_positions,
        **(load_tuned(args.tuned) if args.tuned else {})
        | ({"threads": args.threads} if args.threads is not None else {}),
    )
    steps = steps_per_epoch(len(shards), feed.batch)
    loop = LoopSettings(epochs, steps, args.seed, args.log_every, args.precision, args.steps)
    basis = eigenbasis.load(args.shards / "eigenbasis.json", shards)
    spec = NetSpec(len(shards.manifest.classes), args.width)
    return Job(shards, val, basis, rules, spec, feed, loop, RunFolder(args.runs / args.run), args.stall_seconds)


def first_epoch_without_noise(rules: recipe.Recipe, epochs: int) -> int:
    """The first epoch of a run of `epochs` in which the recipe makes no colour noise; `epochs` where it always does."""
    return next((e for e in range(epochs) if recipe.colour_noise(rules, e, epochs) == 0), epochs)


def main() -> int:
    """Trains, then measures what training waited for."""
    args = parse()
    job = resolve(args)
    job.folder.begin(job.config(), args.resume)
    model = AlexNet(job.spec, job.recipe, seed=job.loop.seed).to(job.device)
    rates = recipe.rates(job.recipe, 0, job.loop.epochs)
    optimizer = Momentum2012(model.named_parameters(), job.recipe, rates)
    last = checkpoint.latest(job.folder.checkpoints)
    state = checkpoint.restore(last, model, optimizer, job.loop.seed) if last else TrainState.start()
    job.folder.forget_after(state.updates)
    describe(job, model, state)
    clocks = stall.StepClocks()
    try:
        finished = train(job, model, optimizer, state, clocks)
    except Diverged as error:
        print(f"train.py: {error}; checkpoints are in {job.folder.checkpoints}", file=sys.stderr)
        return 1
    if not finished:
        print(f"stopped after update {state.updates:,}; the same command with --resume goes on from there")
        return 0
    report(job, model, optimizer, clocks)
    print(f"run folder: {job.folder.path}")
    return 0


def describe(job: Job, model: AlexNet, state: TrainState) -> None:
    """The run in a few lines, before it starts."""
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"recipe     {job.recipe.name}, rates x {job.recipe.rate_scale:g}, batch {job.feed.batch}, seed {job.loop.seed}"
    )
    print(
        f"network    {parameters:,} parameters, width {job.spec.width:g}, {job.spec.classes} classes, both towers here"
    )
    print(f"device     {job.feed.device}, {job.loop.precision}, feed with {job.feed.threads} threads")
    print(
        f"data       {len(job.shards):,} samples, {job.loop.steps_per_epoch} steps an epoch, {job.loop.epochs} epochs"
    )
    if state.updates:
        print(f"resumed    after update {state.updates:,}, epoch {state.epoch}")


def train(job: Job, model: AlexNet, optimizer: Momentum2012, state: TrainState, clocks: stall.StepClocks) -> bool:
    """Runs the loop; True when the run is complete, False when SIGTERM stopped it. The state is saved in both cases."""
    stopped = False

    def stop(signum: int, frame: object) -> None:
        nonlocal stopped
        stopped = True

    def save(state: TrainState) -> None:
        path = job.folder.checkpoints / checkpoint.name_of(state)
        checkpoint.save(path, model, optimizer, state, job.loop.seed)
        checkpoint.prune(job.folder.checkpoints, KEPT)

    batch, updates = job.feed.batch, job.loop.updates
    previous = signal.signal(signal.SIGTERM, stop)
    trainer = Trainer(model, optimizer, job.loop, state)
    with (
        TrainFeed(job.shards, job.basis, job.feed, state.epoch, state.step) as feed,
        Progress("training", updates * batch, done=state.updates * batch) as progress,
    ):

        def on_step(images: int, times: StepTimes) -> None:
            clocks.add(images, times.wait_s, times.step_s, times.loop_s, edge=state.step == 1)
            progress(images)

        def on_log(line: dict[str, Any]) -> None:
            job.folder.log(line)
            progress.note = f"loss {line['loss']:.3f}, top-1 {line['top1']:.1%}"

        def validate_epoch(epoch: int) -> float | None:
            if job.val is None:
                return None
            scores = validate(job, model, job.val)
            values = {"val_loss": scores.loss, "val_top1": scores.top1, "val_top5": scores.top5}
            job.folder.log({"epoch": epoch, "step": state.updates, **values})
            told = f"validation: loss {scores.loss:.3f}, top-1 {scores.top1:.1%}, top-5 {scores.top5:.1%}"
            progress.say(f"epoch {epoch + 1} of {job.loop.epochs}: {told}")
            return 1 - scores.top1

        finished = trainer.fit(feed, Hooks(on_step, on_log, validate_epoch, save, lambda: stopped))
    save(state)
    signal.signal(signal.SIGTERM, previous)
    return finished


def validate(job: Job, model: AlexNet, val: ShardSet) -> Scores:
    """Scores of the centre crop on the validation set."""
    return evaluate(model, view_feed(val, job.basis, job.feed), job.loop.precision)


def report(job: Job, model: AlexNet, optimizer: Momentum2012, clocks: stall.StepClocks) -> None:
    """Measures supply, demand and both together, explains them, prints, writes stall.json and report.html."""
    path = job.folder.path / STALL
    if not job.stall_s:
        return
    if not clocks.steps:  # the run was complete already
        print(f"this run is complete; its stall report is {path}")
        return
    print("measuring supply and demand for the stall report")
    feeds = {stage: partial(stage_sizes, job.shards, job.basis, job.feed, stage) for stage in get_args(Stage)}
    stages = measure_rates(feeds, job.stall_s / STAGE_ROUNDS, STAGE_ROUNDS)
    with TrainFeed(job.shards, job.basis, job.feed) as feed:
        kept = [next(feed) for _ in range(REPLAYED)]
        subject = subject_of(job, model, optimizer)
        observed = observe(feed, subject, kept, job.stall_s / DOCTOR_ROUNDS, job.feed.queue_depth + 1, DOCTOR_ROUNDS)
    about = {"machine": machine(), "settings": asdict(job.feed), "manifest_sha256": job.shards.manifest_sha256}
    found = find(stages, observed, setup_of(job), memory(), about, clocks=clocks)
    write_atomically(path, json.dumps(found.record(), indent=1) + "\n")
    write_atomically(path.with_name(REPORT), page(found, f"{job.folder.path.name}: {found.report.verdict}"))
    print(f"\n{format_findings(found)}\n")


def subject_of(job: Job, model: AlexNet, optimizer: Momentum2012) -> Subject[Batch]:
    """What trains, for the doctor: the loop's own step, and reading the loss as often as the loop does."""
    losses: list[torch.Tensor] = []

    def step(batch: Batch) -> None:
        losses.append(train_step(model, optimizer, batch, DropoutDraws(0, len(losses)), job.loop.precision)[0])

    def after(batch: Batch) -> None:
        if len(losses) % job.loop.log_every == 0:
            losses[-1].item()

    settle = torch.cuda.synchronize if job.device.type == "cuda" else (lambda: None)
    return Subject(lambda batch: len(batch.labels), step, settle, after)


def setup_of(job: Job) -> Setup:
    """What the feed works with."""
    pixels = job.shards.index["width"].astype(np.int64) * job.shards.index["height"]
    return Setup(job.feed.threads, job.feed.queue_depth, cores(), float(pixels.mean()) / STORED**2)


if __name__ == "__main__":
    run(main)
