"""The stall report of a run that has trained, on one rank or several: stall.json, report.html and the screen.

All ranks measure together, batch by batch; the first one writes. Figures are of all ranks unless a name says otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from model.batch import Batch
from model.dropout import DropoutDraws
from model.parallel.exchange import step_bytes
from model.parallel.half_batches import whole_batches
from model.parallel.ranks import Ranks, ranks_here
from model.runs import STALL, write_atomically
from model.trainer import Trainer, train_step, wait_for
from pipeline.diagnosis.accounting import LoaderThroughput
from pipeline.diagnosis.findings import Findings, build_findings, format_findings, setup_of
from pipeline.diagnosis.html import report_html
from pipeline.loader.loader import TrainLoader
from pipeline.loader.order import local_batch
from pipeline.loader.settings import LoaderSettings
from pipeline.profiling.clocks import StepClocks
from pipeline.profiling.machine import describe_machine, memory_use
from pipeline.profiling.stages import StageThroughput, measure_stages
from pipeline.profiling.throughput import Throughput, lockstep_throughput
from pipeline.profiling.windows import TrainerUnderTest, measure_supply, measure_windows
from pipeline.rgb_pca import Eigenbasis
from pipeline.shards.reader import ShardSet
from tools.shared.cli import cores

REPORT = "report.html"
REPLAYED = 4  # batches: enough that none stays in a processor's cache
WAITS = {"swap": "halves of images", "exchange": "maps and their gradients", "sums": "sums of gradients"}
KINDS = {"swap": "images", "exchange": "maps", "sums": "sums"}  # of bytes that are waited for


@dataclass(frozen=True)
class Trained:
    """A run that has trained: what fed it, what trained, where it belongs; and for how long to measure each rate."""

    shards: ShardSet
    basis: Eigenbasis
    feed: LoaderSettings
    trainer: Trainer
    folder: Path
    seconds: float
    stage_rounds: int = 2  # of the feed's stages in turn
    rounds: int = 5  # of feed, trainer and both in turn

    @property
    def ranks(self) -> Ranks:
        """This rank among those that trained."""
        return self.trainer.ranks


def report(run: Trained, clocks: StepClocks, waits_s: dict[str, float]) -> None:
    """Measures what explains the run, prints it and writes it into the run's folder. `waits_s`: seconds that this
    rank's steps waited for others in the whole run."""
    ranks, path = run.ranks, run.folder / STALL
    if not clocks.steps:  # the run was complete already
        say(ranks, f"this run is complete; its stall report is {path}")
        return
    say(ranks, "measuring supply and demand for the stall report")
    found = examine(run, clocks)
    record, screen = found.record(), format_findings(found)
    if ranks.place.world > 1:
        record |= ranks_record(run, found.stages, clocks.steps + 1, waits_s)
        screen += f"\n\n{format_ranks(record)}"
    if ranks.first:
        write_atomically(path, json.dumps(record, indent=1) + "\n")
        write_atomically(path.with_name(REPORT), report_html(found, f"{run.folder.name}: {found.report.verdict}"))
    say(ranks, f"\n{screen}\n")


def say(ranks: Ranks, text: str) -> None:
    """Of several ranks one speaks."""
    if ranks.first:
        print(text, flush=True)


def examine(run: Trained, clocks: StepClocks) -> Findings:
    """Supply, demand and both together in turn, explained."""
    ranks, place = run.ranks, run.ranks.place
    here = local_stages(run)
    stages = here.each(lambda rate: lockstep_throughput(by_rank(rate, ranks)))
    subject, swapped = subject_of(run.trainer, run.feed.batch), stages.full.img_s
    discard = run.feed.prefetched_batches + place.is_pair  # one more is ahead where halves are swapped
    with (
        TrainLoader(run.shards, run.basis, run.feed, rank=place.rank, ranks=place.world) as feed,
        closing(whole_batches(feed, ranks)) as batches,
    ):
        kept = [next(batches) for _ in range(REPLAYED)]
        if place.is_pair:
            swapped *= swap_share(run, feed, batches, subject, discard)
        observed = measure_windows(
            batches, subject, kept, run.seconds / run.rounds, discard, run.rounds, agree=ranks.largest
        )
    return build_findings(
        stages,
        observed,
        setup_of(run.shards, run.feed, cores(), place.world, place.world / ranks_here()),
        memory_use(),
        {"machine": describe_machine(), "settings": asdict(run.feed), "manifest_sha256": run.shards.manifest_sha256},
        clocks=clocks,
        swapped=swapped,
        rank_supplies=[rate.img_s for rate in by_rank(here.full, ranks)] if place.world > 1 else (),
    )


def swap_share(
    run: Trained, feed: Iterator[Batch], batches: Iterator[Batch], subject: TrainerUnderTest[Batch], discard: int
) -> float:
    """The supply of `batches`, the `feed` with halves swapped, over that of the feed alone, at most 1: in turn, since
    what the swap costs is their difference, and the machine's weather would be, too."""
    shares, seconds = list[float](), run.seconds / (2 * run.stage_rounds)
    for _ in range(run.stage_rounds):
        apart, swapped = (measure_supply(one, subject, seconds, discard, run.ranks.largest) for one in (feed, batches))
        shares.append(min(1.0, swapped / apart))
    return median(shares)


def local_stages(run: Trained) -> StageThroughput:
    """Of the feed of this rank's rows; all ranks measure at the same time, each on pictures of its own."""
    place = run.ranks.place
    seed = (run.feed.seed + place.rank) % 2**64
    here = replace(run.feed, batch=local_batch(run.feed.batch, place.world), seed=seed)
    run.ranks.any(False)  # so that all begin together
    return measure_stages(run.shards, run.basis, here, run.seconds / run.stage_rounds, run.stage_rounds)


def by_rank(rate: Throughput, ranks: Ranks) -> list[Throughput]:
    """Every rank's, in the order of ranks, on all of them."""
    return [_rate(row) for row in gathered(_row(rate), ranks)]


def _row(rate: Throughput) -> list[float]:
    *figures, rounds, p50_s, p99_s = astuple(rate)
    return [*figures, p50_s, p99_s, *rounds]


def _rate(row: Sequence[float]) -> Throughput:
    img_s, least, most, cpu_ms, cores_used, p50_s, p99_s, *rounds = row
    return Throughput(img_s, least, most, cpu_ms, cores_used, tuple(rounds), p50_s, p99_s)


def gathered(row: Sequence[float], ranks: Ranks) -> list[list[float]]:
    """Every rank's row of numbers, as many of each, in the order of ranks, on all of them."""
    table = torch.zeros(ranks.place.world, len(row), dtype=torch.float64)
    table[ranks.place.rank] = torch.tensor(row, dtype=torch.float64)
    found: list[list[float]] = ranks.total(table).tolist()
    return found


def subject_of(trainer: Trainer, batch: int) -> TrainerUnderTest[Batch]:
    """What trains, for the doctor: the loop's own step, and reading the loss as often as the loop does. `batch` is the
    global one."""
    place = trainer.ranks.place
    losses: list[torch.Tensor] = []

    def step(rows: Batch) -> None:
        draws = DropoutDraws(0, len(losses), place.first_row(batch), batch)
        precision = trainer.settings.precision
        losses.append(train_step(trainer.model, trainer.optimizer, rows, draws, precision, trainer.towers)[0])

    def after(rows: Batch) -> None:
        if len(losses) % trainer.settings.log_every == 0:
            losses[-1].item()

    return TrainerUnderTest(lambda rows: batch, step, partial(wait_for, trainer.ranks.device), after)


def ranks_record(run: Trained, rates: LoaderThroughput, steps: int, waits_s: dict[str, float]) -> dict[str, Any]:
    """For stall.json: seconds that a step of rank 0 waits for others, and that the feed pays for swapping a batch."""
    ranks, model, batch = run.ranks, run.trainer.model, run.feed.batch
    crossing = step_bytes(ranks.place, model.spec, model.recipe, batch, run.trainer.settings.precision)
    return {
        "ranks": {**asdict(ranks.place), "backend": ranks.backend, "shared_gpu": ranks.shared_gpu},
        "rank_waits_s": {what: waits_s.get(what, 0.0) / steps for what in WAITS if KINDS[what] in crossing},
        "sent_bytes": crossing,
        "swap_s": max(0.0, batch / rates.supply - batch / rates.augmented),
    }


def format_ranks(record: dict[str, Any]) -> str:
    """The same as two lines of text."""
    waits = ", ".join(f"{seconds * 1000:.1f} ms for {WAITS[what]}" for what, seconds in record["rank_waits_s"].items())
    lines = [f"ranks      a step of rank 0 waits {waits}"]
    if "images" in record["sent_bytes"]:
        sent_mb = record["sent_bytes"]["images"] / 1e6
        swap_ms = record["swap_s"] * 1000
        lines.append(f"           swapping halves, {sent_mb:.1f} MB each way, costs the feed {swap_ms:.1f} ms a batch")
    return "\n".join(lines)
