"""The stall report at the end of a training run, on one rank or several: stall.json, report.html, trace.json, screen.

All ranks measure together, batch by batch; the first one prints and writes. Figures are of all ranks together unless a
name says otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from model.batch import Batch
from model.dropout import DropoutDraws
from model.parallel.exchange import step_bytes
from model.parallel.half_batches import swaps_crops, whole_batches
from model.parallel.ranks import Ranks, ranks_here
from model.runs import STALL, write_atomically
from model.trainer import Trainer, wait_for
from pipeline.diagnosis.accounting import LoaderThroughput
from pipeline.diagnosis.findings import Findings, build_findings
from pipeline.diagnosis.html import report_html
from pipeline.diagnosis.screen import format_findings
from pipeline.diagnosis.workload import setup_of
from pipeline.host import read_host
from pipeline.loader.loader import TrainLoader
from pipeline.loader.order import Ids, local_batch
from pipeline.loader.settings import LoaderSettings
from pipeline.profiling.clocks import StepClocks
from pipeline.profiling.machine import describe_machine, memory_use
from pipeline.profiling.stages import (
    StageThroughput,
    known_cached_share,
    measure_stages,
    next_cached_share,
    next_ids,
    probe_epoch,
)
from pipeline.profiling.throughput import throughput_by_rank
from pipeline.profiling.trace import StepTrace, trace_events, trace_record
from pipeline.profiling.windows import TrainerUnderTest, measure_supply, measure_windows
from pipeline.rgb_pca import Eigenbasis
from pipeline.shards.reader import ShardSet
from tools.shared.jpeg_engines import with_engines_watched
from tools.shared.provenance import library_versions

REPORT, TRACE = "report.html", "trace.json"
REPLAYED_BATCHES = 4  # enough that none stays in a processor's cache
WAITED_FOR = {"swap": "halves of images", "exchange": "feature maps and their gradients", "sums": "sums of gradients"}
SENT_KINDS = {"swap": "images", "exchange": "maps", "sums": "sums"}  # of `step_bytes`, by the wait for them


class RanksGroup:
    """`Ranks` as a `Group` of `pipeline.profiling`: pipeline and model never import each other."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    @property
    def rank(self) -> int:
        """This process's number."""
        return self._ranks.place.rank

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self._ranks.place.world

    def largest(self, number: int) -> int:
        """The largest of all ranks' numbers."""
        return self._ranks.largest(number)

    def gather(self, row: Sequence[float]) -> list[list[float]]:
        """The rows of all ranks, on every rank."""
        # A sum of tables in which each rank has filled its own row. float64, since img/s have more than 24 bits.
        table = torch.zeros(self.world, len(row), dtype=torch.float64)
        table[self.rank] = torch.tensor(row, dtype=torch.float64)
        rows: list[list[float]] = self._ranks.total(table).tolist()
        return rows


@dataclass(frozen=True)
class Trained:
    """A run that has trained, and how long to measure it.

    Attributes:
        shards: the set that it trained on.
        basis: the set's eigenbasis.
        loader_settings: the settings of its loader, with the global batch.
        trainer: model, optimizer and ranks.
        folder: the run's folder.
        seconds: time to measure each throughput for.
        stage_rounds: windows of each stage of the loader.
        rounds: windows of the loader alone, of replayed batches and of real steps.
    """

    shards: ShardSet
    basis: Eigenbasis
    loader_settings: LoaderSettings
    trainer: Trainer
    folder: Path
    seconds: float
    stage_rounds: int = 2
    rounds: int = 5

    @property
    def ranks(self) -> Ranks:
        """This rank among those that trained."""
        return self.trainer.ranks


def report(
    run: Trained, clocks: StepClocks, waits_s: dict[str, float], trace: StepTrace | None = None
) -> dict[str, Any] | None:
    """Measures what explains the run, prints it and writes it into the run's folder.

    Args:
        run: the run.
        clocks: its step times. Without a step, because the run was complete already, an existing report is kept.
        waits_s: seconds that this rank's steps waited for other ranks in the whole run, by kind.
        trace: its last steps, for trace.json.

    Returns:
        The record of stall.json; None if an existing report is kept.
    """
    ranks, path = run.ranks, run.folder / STALL
    if not clocks.steps and ranks.any(ranks.first and path.is_file()):
        say(ranks, f"this run is complete; its stall report is {path}")
        return None
    say(ranks, "measuring supply and demand for the stall report")
    found = measure_run(run, clocks)
    record, screen = found.record(), format_findings(found)
    if ranks.place.world > 1:
        record |= ranks_record(run, found.loader_img_s, clocks.steps + 1, waits_s)
        screen += f"\n\n{format_ranks(record)}"
    if ranks.first:
        write_atomically(path, json.dumps(record, indent=1) + "\n")
        write_atomically(path.with_name(REPORT), report_html(found, f"{run.folder.name}: {found.account.verdict}"))
        if trace and trace.steps:
            part_s = found.loader_img_s.part_s()
            stage_s = {part: run.loader_settings.batch * seconds for part, seconds in part_s.items() if seconds}
            events = trace_record(trace_events(trace, stage_s, run.folder.name))
            write_atomically(path.with_name(TRACE), json.dumps(events) + "\n")
    say(ranks, f"\n{screen}\n")
    return record


def say(ranks: Ranks, text: str) -> None:
    """Prints on the first rank only."""
    if ranks.first:
        print(text, flush=True)


def measure_run(run: Trained, clocks: StepClocks) -> Findings:
    """Measures supply, demand and both together in turn, and diagnoses them.

    The windows go on where the run has stopped, and the stages where the windows have: each reads what the run would
    have read next, which is as cold as the run would have found it.
    """
    clocks.finish()
    ranks, place, group, settings = run.ranks, run.ranks.place, RanksGroup(run.ranks), run.loader_settings
    epoch, step = run.trainer.state.epoch, run.trainer.state.step
    before: dict[str, Any] = {
        "probe": probe_epoch(run.shards, settings, epoch + 1),
        "cached_share": known_cached_share(run.shards),
        "windows_cached_share": next_cached_share(run.shards, settings, epoch, step),
    }
    subject, ratio = trainer_under_test(run.trainer, settings.batch), 1.0
    discard = settings.prefetched_batches + place.is_pair  # swapping halves prefetches one batch more
    with (
        TrainLoader(
            run.shards, run.basis, settings, epoch, step, place.rank, place.world, swaps_crops(ranks)
        ) as loader,
        closing(whole_batches(loader, ranks, finish=loader.finish)) as batches,
    ):
        replayed = [next(batches) for _ in range(REPLAYED_BATCHES)]
        window_s = run.seconds / run.rounds
        measured = measure_windows(batches, subject, replayed, window_s, discard, run.rounds, group=group)
        if place.is_pair:
            ratio = swap_ratio(run, loader, batches, subject, discard)
        last = next(batches)
    ids = next_ids(run.shards, settings, last.epoch, last.step + discard)
    here, decoding = with_engines_watched(ranks.device, settings, partial(local_stages, run, ids))
    stages = replace(here.over_ranks(group), **before)
    return build_findings(
        stages,
        measured,
        setup_of(run.shards, settings, read_host(), place.world, place.world / ranks_here()),
        memory_use(),
        {
            "machine": describe_machine(),
            "versions": library_versions(),
            "settings": asdict(settings),
            "manifest_sha256": run.shards.manifest_sha256,
            **decoding,
            "step": {name: getattr(run.trainer.settings, name) for name in ("precision", "lrn", "cuda_graph")},
        },
        clocks=clocks if clocks.steps else None,  # none if the report of a complete run is made later
        swapped=ratio * stages.full.img_s,
        rank_supplies=[rank.img_s for rank in throughput_by_rank(here.full, group)] if place.world > 1 else (),
    )


def swap_ratio(
    run: Trained, loader: Iterator[Batch], batches: Iterator[Batch], subject: TrainerUnderTest[Batch], discard: int
) -> float:
    """Supply of `batches`, the loader with halves swapped, over that of the loader alone; at most 1.

    The cost of the swap is a small difference, so both are measured in turn, under the same background load.
    """
    ratios, seconds = list[float](), run.seconds / (2 * run.stage_rounds)
    for _ in range(run.stage_rounds):
        apart, swapped = (
            measure_supply(one, subject, seconds, discard, RanksGroup(run.ranks)) for one in (loader, batches)
        )
        ratios.append(min(1.0, swapped / apart))
    return median(ratios)


def local_stages(run: Trained, ids: Ids) -> StageThroughput:
    """The stages of this rank's loader, with its share of the batch. All ranks measure at once, on different images.

    Args:
        run: the run.
        ids: samples to read, of which each rank takes its part.
    """
    place, settings = run.ranks.place, run.loader_settings
    part = run.shards.part(ids[place.rank :: place.world])
    here = replace(settings, batch=local_batch(settings.batch, place.world))
    window_s = run.seconds / run.stage_rounds
    return measure_stages(part, run.basis, here, window_s, run.stage_rounds, group=RanksGroup(run.ranks))


def trainer_under_test(trainer: Trainer, batch: int) -> TrainerUnderTest[Batch]:
    """The loop's own training step, with the loss read as often as the loop does.

    Args:
        trainer: model, optimizer and ranks. The measured steps train the model on.
        batch: images of the global batch.
    """
    place = trainer.ranks.place
    losses: list[torch.Tensor] = []

    def step(rows: Batch) -> None:
        draws = DropoutDraws(0, len(losses), place.first_row(batch), batch)
        losses.append(trainer.compute(rows, draws)[0])

    def after(rows: Batch) -> None:
        if len(losses) % trainer.settings.log_every == 0:
            losses[-1].item()

    device = trainer.ranks.device
    launches_only = device.type == "cuda"  # a step on the CPU returns when it is done
    return TrainerUnderTest(lambda rows: batch, step, partial(wait_for, device), after, launches_only)


def ranks_record(run: Trained, loader: LoaderThroughput, steps: int, waits_s: dict[str, float]) -> dict[str, Any]:
    """What stall.json has on several ranks only.

    Returns:
        `ranks`: the layout; `rank_waits_s`: seconds that a step of rank 0 waits for other ranks, by kind; `sent_bytes`:
        bytes that a step of rank 0 sends, by kind; `swap_s`: seconds that swapping halves adds to a batch.
    """
    ranks, model, batch = run.ranks, run.trainer.model, run.loader_settings.batch
    precision, crops = run.trainer.settings.precision, swaps_crops(ranks)
    crossing = step_bytes(ranks.place, model.spec, model.recipe, batch, precision, crops)
    waits = {what: waits_s.get(what, 0.0) / steps for what in WAITED_FOR if SENT_KINDS[what] in crossing}
    return {
        "ranks": {**asdict(ranks.place), "backend": ranks.backend, "shared_gpu": ranks.shared_gpu},
        "rank_waits_s": waits,
        "sent_bytes": crossing,
        "swap_s": max(0.0, batch / loader.supply - batch / loader.augmented),
    }


def format_ranks(record: dict[str, Any]) -> str:
    """`ranks_record` as lines of text."""
    waits = [f"{seconds * 1000:.1f} ms for {WAITED_FOR[what]}" for what, seconds in record["rank_waits_s"].items()]
    lines = [f"ranks      a step of rank 0 waits {', '.join(waits)}"]
    if "images" in record["sent_bytes"]:
        sent_mb = record["sent_bytes"]["images"] / 1e6
        swap_ms = record["swap_s"] * 1000
        lines.append(
            f"           swapping halves, {sent_mb:.1f} MB each way, costs the loader {swap_ms:.1f} ms a batch"
        )
    return "\n".join(lines)
