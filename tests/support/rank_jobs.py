"""What the processes of the rank tests do, and how they are started: real ranks, on gloo, one process each."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from model import checkpoint
from model.alexnet import AlexNet
from model.changes import changed
from model.checkpoint import TrainState
from model.dropout import DropoutDraws
from model.evaluation import Scores, evaluate
from model.optim import Momentum2012
from model.parallel.exchange import TowerExchange, step_bytes
from model.parallel.half_batches import whole_batches
from model.parallel.mesh import RankLayout
from model.parallel.ranks import Ranks, start
from model.precision import autocast
from model.recipe import SOURCE2012, Recipe, learning_rates
from model.shapes import NetSpec
from model.train_step import train_step
from model.trainer import Hooks, LoopSettings, Trainer

SMALL = NetSpec(classes=5, width=0.05)
# At the recipe's own learning rates a change of the last bit of one starting weight grows to 4e-4 of the loss in these
# 20 steps, also on one rank (batches of 8, and most pixels are noise). At a tenth it stays a last bit.
GENTLE = replace(SOURCE2012, learning_rate_scale=0.1)
STEPS, EPOCHS, BATCH, SEED = 5, 8, 8, 9
CROSSING = ("no-communication", "sixth-conv", "no-conv3", "non-overlapping-pooling")  # change what crosses
SLOW_S = 0.07  # delay of every batch of the slow rank: many times its step
DOUBLE_STEPS, DOUBLE_BATCH = 10, 4  # convolutions in float64 are slow
# Imported once, by the server that the ranks are forked from: imports take most of the time of a process's start.
PRELOADED = ["tests.support.rank_jobs", "tests.support.shard_fixtures", "tools.shared.stall_report"]


@dataclass(frozen=True)
class Job:
    """What the ranks of a layout do: `run(ranks, *args)`."""

    run: Callable[..., Any]
    args: tuple[Any, ...] = ()
    layout: RankLayout = "towers"


def run_ranks(folder: Path, world: int, *jobs: Job, device: str = "cpu") -> list[list[Any]]:
    """Runs jobs on `world` ranks, all jobs in the same processes.

    Returns:
        For each job, what it returned on each rank.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probes = [socket.socket() for _ in jobs]
    for probe in probes:
        probe.bind(("localhost", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    multiprocessing.set_forkserver_preload(PRELOADED)
    mp.start_processes(_rank, (world, ports, folder, jobs, device), nprocs=world, start_method="forkserver")
    by_rank = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
    return [list(results) for results in zip(*by_rank, strict=True)]


def _rank(rank: int, world: int, ports: list[int], folder: Path, jobs: tuple[Job, ...], device: str) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    results = []
    for port, job in zip(ports, jobs, strict=True):
        os.environ.update({"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)})
        ranks = start(job.layout, device, 60)
        results.append(job.run(ranks, *job.args))
        ranks.leave()
    torch.save(results, folder / f"{rank}.pt")


@dataclass(frozen=True)
class Rows:
    """Rows of a batch that is a pure function of (epoch, step)."""

    images: torch.Tensor
    labels: torch.Tensor
    epoch: int
    step: int


def global_batch(epoch: int, step: int, batch: int = BATCH) -> Rows:
    generator = torch.Generator().manual_seed(100 * epoch + step)
    labels = torch.randint(5, (batch,), generator=generator)
    images = 60 * torch.randn(batch, 3, 224, 224, generator=generator) + 20 * labels[:, None, None, None]
    return Rows(images, labels, epoch, step)


def part(batch: Rows, ranks: Ranks) -> Rows:
    """The rows that this rank decodes."""
    rank, world = ranks.place.rank, ranks.place.world
    own = slice(len(batch.labels) * rank // world, len(batch.labels) * (rank + 1) // world)
    images, labels = (rows[own].to(ranks.device) for rows in (batch.images, batch.labels))
    return replace(batch, images=images, labels=labels)


def parts(ranks: Ranks, epoch: int = 0, step: int = 0, batch: int = BATCH) -> Iterator[Rows]:
    while True:
        yield part(global_batch(epoch, step, batch), ranks)
        epoch, step = (epoch, step + 1) if step + 1 < STEPS else (epoch + 1, 0)


def make(
    ranks: Ranks,
    spec: NetSpec = SMALL,
    recipe: Recipe = SOURCE2012,
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format,
) -> tuple[AlexNet, Momentum2012, TowerExchange]:
    model = AlexNet(spec, recipe, ranks.place.towers, seed=3).to(ranks.device, dtype, memory_format=layout)
    optimizer = Momentum2012(model.named_parameters(), recipe, learning_rates(recipe, 0, EPOCHS))
    return model, optimizer, TowerExchange(ranks, model)


def first_step(
    ranks: Ranks,
    spec: NetSpec = SMALL,
    batch: int = BATCH,
    precision: str = "float32",
    recipe: Recipe = SOURCE2012,
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format,
) -> dict[str, Any]:
    """One step with dropout: images and labels of this rank's rows, logits, loss, gradients, and bytes sent."""
    model, optimizer, towers = make(ranks, spec, recipe, dtype=dtype, layout=layout)
    draws = DropoutDraws(SEED, 0, ranks.place.first_row(batch), batch)
    ranks.sent.clear()
    own = part(global_batch(0, 0, batch), ranks)
    (rows,) = whole_batches(iter([replace(own, images=own.images.to(dtype))]), ranks)
    with torch.no_grad(), autocast(ranks.device, precision):
        logits = model.train()(rows.images, draws, towers)
    sent = {"images": ranks.sent["images"]} if ranks.place.is_pair else {}
    ranks.sent.clear()
    loss, _ = train_step(model, optimizer, rows, draws, precision, towers)
    return {
        "place": ranks.place,
        "images": rows.images,
        "labels": rows.labels,
        "logits": logits if 0 in model.towers else None,
        "loss": loss.item(),
        "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
        "sent": {**sent, **ranks.sent},
        "calculated": step_bytes(ranks.place, spec, recipe, batch, precision),
    }


def run(ranks: Ranks, folder: Path, stop_at: int | None = None, again: Path | None = None) -> dict[str, Any]:
    """Trains on, or from, the last checkpoint in `folder`, up to `stop_at` or 20 optimizer steps, and saves at the end.

    Only the last rank asks for the stop. What was restored is saved once more as `again`. Returns losses and scores."""
    model, optimizer, towers = make(ranks, recipe=GENTLE)
    last = checkpoint.latest(folder)
    state = checkpoint.restore(last, model, optimizer, SEED) if last else TrainState.start()
    if again:
        checkpoint.save(again, model, optimizer, state, SEED, ranks)
    settings = LoopSettings(EPOCHS, STEPS, SEED, log_every=1, max_optimizer_steps=20)
    trainer = Trainer(model, optimizer, settings, state, towers)
    losses: list[float] = []
    scores: list[Scores] = []

    def save(state: TrainState) -> None:
        checkpoint.save(folder / checkpoint.name_of(state), model, optimizer, state, SEED, ranks)

    def validate(epoch: int) -> float:
        rows = [part(global_batch(99, step, size), ranks) for step, size in enumerate((8, 5, 1))]
        views = [replace(row, images=row.images[:, None]) for row in rows]
        scores.append(evaluate(model, whole_batches(iter(views), ranks, uneven=True), towers=towers))
        return scores[-1].loss

    def stopped() -> bool:
        return ranks.any(state.optimizer_steps == stop_at and ranks.place.rank == ranks.place.world - 1)

    batches = whole_batches(parts(ranks, state.epoch, state.step), ranks)
    trainer.fit(batches, Hooks(ignore, lambda line: losses.append(line["loss"]), validate, save, stopped))
    batches.close()
    save(state)
    return {"losses": losses, "scores": scores}


def ignore(*_: object) -> None:
    """A hook that does nothing."""


def in_double(ranks: Ranks) -> list[float]:
    """Losses at the recipe's learning rates in float64, where rounding cannot explain a difference."""
    model, optimizer, towers = make(ranks, dtype=torch.float64)
    losses = []
    for step in range(DOUBLE_STEPS):
        batch = part(global_batch(0, step, DOUBLE_BATCH), ranks)
        (rows,) = whole_batches(iter([replace(batch, images=batch.images.double())]), ranks)
        draws = DropoutDraws(SEED, step, ranks.place.first_row(DOUBLE_BATCH), DOUBLE_BATCH)
        losses.append(train_step(model, optimizer, rows, draws, towers=towers)[0].item())
    return losses


# ---- one start of the ranks for many tests ------------------------------------------------------------------------


def close_early(ranks: Ranks) -> bool:
    """Closes generators of whole batches early, 10 times. Whether every next one starts with the right images, which it
    would not if a swap had stayed pending."""
    right = True
    for _ in range(10):
        stream = whole_batches(parts(ranks), ranks)
        batch = next(stream)
        stream.close()
        right &= torch.equal(batch.images, global_batch(0, 0).images)
    return right


def on_gpu(ranks: Ranks) -> dict[str, Any]:
    """A step in float64 on GPUs, or on one GPU that two ranks share, moved to the CPU; bytes are those of float32."""
    sizes = {name: first_step(ranks)[name] for name in ("sent", "calculated")}
    step = first_step(ranks, dtype=torch.float64) | sizes
    on_cpu = {name: step[name].cpu() for name in ("images", "labels")}
    gradients = {name: gradient.cpu() for name, gradient in step["gradients"].items()}
    logits = None if step["logits"] is None else step["logits"].cpu()
    return {**step, **on_cpu, "gradients": gradients, "logits": logits, "backend": ranks.backend}


def stall_report(ranks: Ranks, shards: Path, folder: Path, slow_s: float = 0.0) -> dict[str, Any]:
    """The stall report of a small network that has trained: steps of this rank, and what rank 0 writes into `folder`.
    The disk of rank 1 takes `slow_s` longer for every batch."""
    from pipeline.loader.settings import LoaderSettings
    from pipeline.profiling.clocks import StepClocks
    from pipeline.shards.reader import ShardSet, open_shards
    from tests.support import shard_fixtures  # DALI and numba are imported only if this job runs
    from tools.shared.stall_report import STALL, Trained, report

    class Disk(ShardSet):
        def read_ahead(self, ids: Any) -> None:
            time.sleep(slow_s * ranks.place.rank)

        def jpegs(self, ids: Any) -> list[Any]:
            time.sleep(slow_s * ranks.place.rank)
            return super().jpegs(ids)

    opened = open_shards(shards)
    disk = Disk(opened.folder, opened.manifest, opened.index, opened.manifest_sha256)
    model, optimizer, towers = make(ranks)
    trainer = Trainer(model, optimizer, LoopSettings(EPOCHS, STEPS, SEED), TrainState.start(), towers)
    settings, clocks = LoaderSettings(batch=ranks.place.world, threads=1, queue_depth=1), StepClocks()
    for _ in range(2):
        clocks.add(ranks.place.world, 0.1, 0.1, 0.2)
    folder.mkdir(exist_ok=True)
    steps: list[object] = []
    model.register_forward_hook(lambda *_: steps.append(None))
    run = Trained(disk, shard_fixtures.basis_of(opened), settings, trainer, folder, 0.1, stage_rounds=1, rounds=2)
    report(run, clocks, ranks.spans.take())
    return {"steps": len(steps), "record": json.loads((folder / STALL).read_text()) if ranks.first else None}


def siblings_cpu_s(ranks: Ranks, busy_s: float = 0.2) -> float:
    """CPU seconds that rank 0 counts for the other processes of its job, while rank 1 uses some."""
    from pipeline.profiling.cpu_time import cpu_mark

    before = cpu_mark()
    ranks.any(False)
    started_s = time.process_time()
    while ranks.place.rank and time.process_time() - started_s < busy_s:
        pass
    ranks.any(False)
    return before.until(cpu_mark()).rest_of_job_s


def as_pair(ranks: Ranks, folder: Path, shards: Path) -> dict[str, Any]:
    """What a tower pair does."""
    return {
        "small": first_step(ranks),
        "full": first_step(ranks, NetSpec(), 2),
        "bfloat16": first_step(ranks, precision="bfloat16"),
        "channels last": first_step(ranks, layout=torch.channels_last),
        "double": in_double(ranks),
        "closed early": close_early(ranks),
        "stall report": stall_report(ranks, shards, folder.with_name("stall report")),
        "changed": {name: first_step(ranks, recipe=changed(SOURCE2012, [name])) for name in CROSSING},
        "siblings": siblings_cpu_s(ranks),
        "run": run(ranks, folder, stop_at=7),
    }


def as_four(ranks: Ranks, folder: Path, again: Path) -> dict[str, Any]:
    """What two tower pairs do."""
    return {"small": first_step(ranks), "run": run(ranks, folder, again=again)}


def as_data_pair(ranks: Ranks, folder: Path, shards: Path) -> dict[str, Any]:
    """What two ranks do that hold both towers each."""
    report = stall_report(ranks, shards, folder.with_name("stall report, slow rank"), SLOW_S)
    one_tower = first_step(ranks, recipe=changed(SOURCE2012, ["one-tower"]))
    last = first_step(ranks, layout=torch.channels_last)
    return {"small": first_step(ranks), "channels last": last, "stall report": report, "one tower": one_tower}
