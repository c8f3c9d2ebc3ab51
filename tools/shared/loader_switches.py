"""Measures each switch of the loader on and off, in interleaved windows, and whether the JPEG engines decode."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from pipeline.loader.loader import stage_batch_sizes
from pipeline.loader.settings import LoaderSettings
from pipeline.profiling.throughput import measure_throughput
from pipeline.rgb_pca import Eigenbasis
from pipeline.shards.reader import ShardSet
from tools.shared.jpeg_engines import with_engines_watched
from tools.shared.step_switches import Rig, format_switches, measure_switches

ENGINES_SHARE = 0.65  # DALI's own default

# Changes of the settings, by name. The first one is what training does without options.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "JPEG engines": {"hw_decoder_load": ENGINES_SHARE},
    "JPEG engines, no preallocation": {"hw_decoder_load": ENGINES_SHARE, "preallocate": False},
}


def measure_loader_switches(
    shards: ShardSet, basis: Eigenbasis, settings: LoaderSettings, budget_s: float, rounds: int
) -> dict[str, Any]:
    """Measures the loader alone with each variant.

    Args:
        shards: the shard set.
        basis: its eigenbasis.
        settings: what the variants change.
        budget_s: seconds for the windows of all variants.
        rounds: windows of each variant.

    Returns:
        A `Throughput` for each variant as a record, with `over_default`; `skipped` if the set does not fill a batch.
    """
    if len(shards) < settings.batch:
        return {"skipped": f"{shards.folder} has {len(shards)} images, which do not fill a batch of {settings.batch}"}
    how = {name: replace(settings, **changes) for name, changes in VARIANTS.items()}
    loaders = {name: partial(stage_batch_sizes, shards, basis, each, "full") for name, each in how.items()}
    window_s = budget_s / (rounds * len(loaders))
    measured = measure_throughput(loaders, window_s, rounds, discard=settings.prefetched_batches)
    base = measured["default"].img_s
    return {name: {**asdict(found), "over_default": found.img_s / base} for name, found in measured.items()}


def measure_all_switches(
    shards: ShardSet,
    basis: Eigenbasis,
    settings: LoaderSettings,
    batches: tuple[int, ...],
    width: float,
    budget_s: float,
    rounds: int,
) -> dict[str, Any]:
    """Measures the switches of the training step and of the loader at every batch size, and prints the former.

    Args:
        shards: the shard set.
        basis: its eigenbasis.
        settings: of the loader.
        batches: batch sizes.
        width: width of the network.
        budget_s: seconds for the windows of the trainer, and again for those of the loader, at each batch size.
        rounds: windows of each variant.

    Returns:
        For each batch size `step` (see `measure_switches`) and `loader` (see `measure_loader_switches`).
    """
    rig, found = Rig(torch.device(settings.device), width), dict[str, Any]()
    for rows in batches:
        step = measure_switches(rig, rows, budget_s, rounds)
        print(format_switches(rows, step), flush=True)
        loader = measure_loader_switches(shards, basis, replace(settings, batch=rows), budget_s, rounds)
        found[f"batch {rows}"] = {"step": step, "loader": loader}
    return found


def measure_engines(shards: ShardSet, basis: Eigenbasis, settings: LoaderSettings, window_s: float) -> dict[str, Any]:
    """Decodes with the JPEG engines for a window, and judges whether they work; `skipped` on the CPU."""
    if settings.device == "cpu":
        return {"skipped": "it needs a CUDA device"}
    used = replace(settings, hw_decoder_load=ENGINES_SHARE)
    loader = {"decode": partial(stage_batch_sizes, shards, basis, used, "decode")}
    window = partial(measure_throughput, loader, window_s, 1, discard=used.prefetched_batches)
    measured, found = with_engines_watched(torch.device("cuda"), used, window)
    return {**found, "img_s": measured["decode"].img_s}
