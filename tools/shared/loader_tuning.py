"""What bench_loader.py does after its stall report: makes a change and measures again, or searches settings."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

from model.trainer import Trainer
from pipeline.diagnosis.findings import Findings
from pipeline.diagnosis.stored_shape import COMPARED_IMAGES, StoredShapes, both_shapes, has_whole_images, measure_shapes
from pipeline.diagnosis.tuning import (
    DECODERS_DIFFER,
    choices,
    compare_decoders,
    decoder_shares,
    paced_throughput,
    speed_settings,
    tune,
)
from pipeline.loader.order import steps_per_epoch
from pipeline.loader.settings import LoaderSettings
from pipeline.profiling.stages import STAGE_ROUNDS
from pipeline.profiling.windows import EmulatedTrainer
from pipeline.shards.reader import ShardSet
from tools.shared.cli import Progress, cores
from tools.shared.loader_bench import LoaderBench


def verify_prediction(
    found: Findings, bench: LoaderBench, trainer: EmulatedTrainer | Trainer, start_step: int
) -> dict[str, Any] | None:
    """Makes the first change that this tool can make (settings; the set read into memory) and measures again.

    Prints predicted against measured throughput and returns both for --json; None if there is no such change.

    Args:
        found: the report.
        bench: what was measured.
        trainer: the trainer.
        start_step: the step at which the measurement of the report started; this one starts half an epoch later.
    """
    action = next((action for action in found.actions if action.settings or action.change == "memory"), None)
    if action is None:
        print("verify     this tool can make none of the proposed changes: nothing to measure again\n")
        return None
    if action.change == "memory":
        read_once(bench.shards)
    steps = steps_per_epoch(len(bench.shards), bench.settings.batch)
    changed = replace(bench, settings=replace(bench.settings, **action.settings))
    again = changed.windows(trainer, (start_step + steps // 2) % steps)
    together = again.clocks.images / again.clocks.elapsed_s
    print(
        f"verify     {action.text}: predicted {action.together:,.0f} img/s, measured {together:,.0f}"
        f" ({together / action.together - 1:+.1%}); the loader alone {action.supply:,.0f}, measured {again.supply:,.0f}"
        f" ({again.supply / action.supply - 1:+.1%})\n"
    )
    return {**asdict(action), "measured_together": together, "measured_supply": again.supply}


def read_once(shards: ShardSet) -> None:
    """Reads every tar, so that the page cache holds it."""
    for tar in shards.tars:
        with tar.open("rb") as file:
            while file.read(2**24):
                pass


def tune_for(bench: LoaderBench, demand: float) -> dict[str, Any]:
    """Searches settings for the demand and prints the trials; returns the record for --tune's file."""

    def measure(candidates: Mapping[str, LoaderSettings]) -> dict[str, float]:
        return paced_throughput(bench.shards, bench.basis, candidates, demand, bench.window_s, progress)

    options, shares = choices(bench.settings, cores()), decoder_shares(bench.settings)
    with Progress("tuning", STAGE_ROUNDS * sum(map(len, (*options.values(), shares))), "windows") as progress:
        best, trials = tune(bench.settings, options, measure)
        decoders = compare_decoders(best, measure)
    for trial in (*trials, *decoders):
        print(f"tune       {format_settings(trial.settings)}: {trial.img_s:,.0f} img/s")
    if decoders:
        print(f"tune       {DECODERS_DIFFER}")
    tuned: dict[str, Any] = {"settings": speed_settings(best), "demand": demand}
    tuned |= {"trials": [asdict(trial) for trial in trials], "decoders": [asdict(trial) for trial in decoders]}
    if has_whole_images(bench.shards):
        shapes = stored_shapes(replace(bench, settings=best))
        print(f"tune       {shapes}")
        if shapes.needed(demand):
            print("tune       this demand requires squares: run make_shards.py SOURCE OUT --stored square")
        tuned["stored_shape"] = asdict(shapes)
    print(f"tuned      {format_settings(speed_settings(best))}\n")
    return tuned


def stored_shapes(bench: LoaderBench) -> StoredShapes:
    """Measures the loader alone with the same images in both stored shapes."""

    images = min(len(bench.shards), max(COMPARED_IMAGES, bench.settings.batch))
    with ExitStack() as kept:
        with Progress("storing", 2 * images) as progress:
            sets = kept.enter_context(both_shapes(bench.shards, images, progress))
        with Progress("measuring", STAGE_ROUNDS * len(sets), "windows") as progress:
            return measure_shapes(sets, bench.basis, bench.settings, bench.window_s, progress)


def format_settings(settings: dict[str, Any]) -> str:
    """Settings on one line."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())
