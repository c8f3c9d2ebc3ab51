"""The measurements of bench_loader.py: the loader's stages, and loader and trainer in turn, with their stall report.

`windows_of` measures supply, demand and both together for any iterable of batches.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, TypeVar, cast

from model.alexnet import AlexNet
from model.checkpoint import TrainState
from model.optim import Momentum2012
from model.parallel.exchange import TowerExchange
from model.parallel.ranks import start
from model.recipe import SOURCE2012, learning_rates
from model.shapes import NetSpec
from model.trainer import LoopSettings, Trainer
from pipeline.diagnosis.findings import Findings, build_findings
from pipeline.diagnosis.screen import format_findings
from pipeline.diagnosis.workload import setup_of
from pipeline.host import read_host
from pipeline.loader.bad_samples import broken_images
from pipeline.loader.inputs import order_of
from pipeline.loader.loader import TrainLoader, stage_batch_sizes
from pipeline.loader.order import Ids, shuffle_quality, steps_per_epoch
from pipeline.loader.settings import LoaderSettings
from pipeline.profiling.machine import describe_machine, memory_use
from pipeline.profiling.stages import (
    STAGE_ROUNDS,
    StageThroughput,
    format_storage,
    measure_stages,
    next_cached_share,
    probe_epoch,
    stage_windows,
)
from pipeline.profiling.throughput import Throughput
from pipeline.profiling.windows import (
    WINDOW_ROUNDS,
    EmulatedTrainer,
    TrainerUnderTest,
    WindowMeasurements,
    measure_windows,
)
from pipeline.rgb_pca import Eigenbasis
from pipeline.shards.reader import ShardSet
from tools.shared.cli import Progress, cores
from tools.shared.provenance import library_versions
from tools.shared.stall_report import REPLAYED_BATCHES, trainer_under_test

HEADER_CHECKS = 20  # passes over a batch
RANK_TIMEOUT_S = 300.0  # of ranks that wait for others; this tool has one rank
STAGE_NAMES = {
    "read": "read",
    "decode": "read + decode",
    "full": "read + decode + augment",
    "reread": "read again, from memory",
}
B = TypeVar("B")


def windows_of(
    batches: Iterator[B], trainer: TrainerUnderTest[B], replayed: Sequence[B], window_s: float, prefetched: int
) -> WindowMeasurements:
    """Measures supply, demand and both together, with a progress bar.

    Args:
        batches: any endless iterator of batches.
        trainer: what trains on them.
        replayed: batches to measure the demand with, again and again.
        window_s: seconds of a window.
        prefetched: batches that the iterator may have made before they are asked for.
    """
    with Progress("training", WINDOW_ROUNDS, "rounds") as progress:
        return measure_windows(batches, trainer, replayed, window_s, prefetched, progress=progress)


@dataclass(frozen=True)
class LoaderBench:
    """The loader that is measured, in windows of `window_s` seconds."""

    shards: ShardSet
    basis: Eigenbasis
    settings: LoaderSettings
    window_s: float

    def windows(self, trainer: EmulatedTrainer | Trainer, start_step: int) -> WindowMeasurements:
        """Measures the loader alone, the trainer on replayed batches, and both together, in turn.

        Args:
            trainer: the trainer.
            start_step: the step of the epoch from which on to read; nothing before it should be read again.
        """
        prefetched, settings = self.settings.prefetched_batches, self.settings
        if isinstance(trainer, Trainer):
            with TrainLoader(self.shards, self.basis, settings, start_step=start_step) as batches:
                replayed = [next(batches) for _ in range(REPLAYED_BATCHES)]
                subject = trainer_under_test(trainer, settings.batch)
                return windows_of(batches, subject, replayed, self.window_s, prefetched)
        sleeper = TrainerUnderTest[int](size=int, step=trainer)
        sizes = cast(Generator[int], stage_batch_sizes(self.shards, self.basis, settings, "full", start_step))
        with closing(sizes):
            return windows_of(sizes, sleeper, [settings.batch], self.window_s, prefetched)


def measure_loader(bench: LoaderBench, cold: bool) -> tuple[StageThroughput, dict[str, Any]]:
    """Measures the stages of the loader and prints them; returns them and the record for --json."""
    shards, settings, index = bench.shards, bench.settings, bench.shards.index
    print(
        f"{shards.folder}: {len(shards):,} samples, device {settings.device}, batch {settings.batch},"
        f" {settings.threads} threads, queue {settings.queue_depth}, {STAGE_ROUNDS} rounds of {bench.window_s:g} s each"
    )
    quality = shuffle_quality(order_of(shards, settings, 0), index["shard"], index["label"], settings.batch)
    print(f"order {settings.order}: {quality}")
    probe = probe_epoch(shards, settings)
    with Progress("measuring", stage_windows(), "windows") as progress:
        stages = measure_stages(shards, bench.basis, settings, bench.window_s, STAGE_ROUNDS, progress, cold)
    share = next_cached_share(shards, settings, 0, stages.next_step)
    stages = replace(stages, probe=probe, windows_cached_share=share)
    print(stage_table({name: getattr(stages, stage) for stage, name in STAGE_NAMES.items()}))
    check_s = header_check_s(shards, order_of(shards, settings, 0)[: settings.batch])
    share_of_batch = check_s * stages.full.img_s
    print(f"header check: {1e6 * check_s:.2f} microseconds an image, {share_of_batch:.3%} of a batch's time")
    print(f"storage: {format_storage(stages.storage)}{'; dropped before each window' * cold}")
    return stages, {
        "shards": str(shards.folder),
        "manifest_sha256": shards.manifest_sha256,
        "settings": asdict(settings),
        "window_s": bench.window_s,
        "rounds": STAGE_ROUNDS,
        "cold": cold,
        "shuffle": asdict(quality),
        "stages": asdict(stages),
        "supply": stages.full.img_s,
        "header_check": {"s_per_image": check_s, "share_of_batch": share_of_batch},
    }


def header_check_s(shards: ShardSet, ids: Ids) -> float:
    """Seconds an image that the check of JPEG headers takes, as the median of several passes over the samples `ids`."""
    images, seconds = shards.jpegs(ids), list[float]()
    for _ in range(HEADER_CHECKS):
        started_s = time.perf_counter()
        broken_images(shards, ids, images)
        seconds.append((time.perf_counter() - started_s) / len(ids))
    return median(seconds)


def stage_table(stages: dict[str, Throughput]) -> str:
    """Throughput of each stage as lines of text."""
    lines = [f"{'':26}{'img/s':>9}{'min':>9}{'max':>9}{'ms/img':>9}{'CPU ms/img':>12}{'cores':>7}"]
    for name, stage in stages.items():
        lines.append(
            f"{name:26}{stage.img_s:9,.0f}{stage.img_s_min:9,.0f}{stage.img_s_max:9,.0f}{1000 / stage.img_s:9.3f}"
            f"{stage.cpu_ms_per_img:12.3f}{stage.cores_used:7.2f}"
        )
    return "\n".join(lines)


def network(bench: LoaderBench, width: float) -> Trainer:
    """The network of 2012 with both towers in this process, at the first step of its recipe."""
    settings, shards = bench.settings, bench.shards
    ranks = start("towers", settings.device, RANK_TIMEOUT_S, cores=cores())
    spec = NetSpec(len(shards.manifest.classes), width)
    model = AlexNet(spec, SOURCE2012, ranks.place.towers, settings.seed).to(ranks.device)
    optimizer = Momentum2012(model.named_parameters(), SOURCE2012, learning_rates(SOURCE2012, 0, SOURCE2012.epochs))
    loop = LoopSettings(SOURCE2012.epochs, steps_per_epoch(len(shards), settings.batch), settings.seed)
    return Trainer(model, optimizer, loop, TrainState.start(), TowerExchange(ranks, model))


def diagnose(
    bench: LoaderBench, trainer: EmulatedTrainer | Trainer, stages: StageThroughput, au_threshold: float
) -> Findings:
    """Measures loader and trainer in turn; prints the stall report and returns it."""
    environment = {
        "machine": describe_machine(),
        "versions": library_versions(),
        "shards": str(bench.shards.folder),
        "manifest_sha256": bench.shards.manifest_sha256,
        "settings": asdict(bench.settings),
    }
    setup, measured = setup_of(bench.shards, bench.settings, read_host()), bench.windows(trainer, stages.next_step)
    found = build_findings(stages, measured, setup, memory_use(), environment, au_threshold)
    print(f"\n{format_findings(found)}\n")
    return found
