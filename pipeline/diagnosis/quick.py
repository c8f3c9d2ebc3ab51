"""Diagnoses a loader in one call: does it keep a trainer of a given throughput busy, and if not, what would help?

    findings = diagnose_loader(shards, basis, LoaderSettings(), demand_img_s=2500)
    print(format_findings(findings))

`tools/bench_loader.py --demand` prints the same report, and can also train, tune and verify.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, replace
from typing import cast

from pipeline.diagnosis.findings import Findings, build_findings
from pipeline.diagnosis.workload import setup_of
from pipeline.host import read_host
from pipeline.loader.loader import stage_batch_sizes
from pipeline.loader.settings import LoaderSettings
from pipeline.profiling.machine import describe_machine, memory_use
from pipeline.profiling.stages import measure_stages, next_cached_share, probe_epoch
from pipeline.profiling.windows import EmulatedTrainer, TrainerUnderTest, measure_windows
from pipeline.rgb_pca import Eigenbasis
from pipeline.shards.reader import ShardSet


def diagnose_loader(
    shards: ShardSet, basis: Eigenbasis, settings: LoaderSettings, demand_img_s: float, window_s: float = 1.0
) -> Findings:
    """Measures the loader alone, an emulated trainer alone and both together, and explains the difference.

    Args:
        shards: the shard set.
        basis: its eigenbasis.
        settings: the loader on trial; a CPU loader, since the emulated trainer sleeps for its steps.
        demand_img_s: img/s of the emulated trainer.
        window_s: seconds of each measurement; the whole diagnosis takes about 20 of them.

    Returns:
        The findings; `pipeline.diagnosis.screen.format_findings` turns them into text.

    Raises:
        ValueError: `demand_img_s` is not above 0, or the loader cannot be built.
    """
    trainer = TrainerUnderTest[int](size=int, step=EmulatedTrainer(demand_img_s))
    probe, stages = probe_epoch(shards, settings), measure_stages(shards, basis, settings, window_s)
    start_step = stages.next_step  # what comes before it was just read
    share = next_cached_share(shards, settings, 0, start_step)
    stages = replace(stages, probe=probe, windows_cached_share=share)
    # "full" batches are wholly decoded and augmented; only their sizes leave the loader.
    with closing(cast(Generator[int], stage_batch_sizes(shards, basis, settings, "full", start_step))) as sizes:
        measured = measure_windows(sizes, trainer, [settings.batch], window_s, settings.prefetched_batches)
    environment = {
        "machine": describe_machine(),
        "shards": str(shards.folder),
        "manifest_sha256": shards.manifest_sha256,
        "settings": asdict(settings),
    }
    return build_findings(stages, measured, setup_of(shards, settings, read_host()), memory_use(), environment)
