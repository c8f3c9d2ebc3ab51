"""Searches loader settings for a demand by measuring: one kind of setting after another, the cheapest that suffices.

Only settings of speed are searched; no setting here changes an image. The result is a JSON file that train.py takes.
The share of a GPU's JPEG engines, `hw_decoder_load`, changes pixels: `compare_decoders` measures it and chooses none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.loader.loader import stage_batch_sizes
from pipeline.loader.settings import LoaderSettings
from pipeline.profiling.stages import STAGE_ROUNDS
from pipeline.profiling.throughput import measure_throughput
from pipeline.profiling.windows import EmulatedTrainer
from pipeline.rgb_pca import Eigenbasis
from pipeline.shards.reader import ShardSet

DEMAND_HEADROOM = 1.1  # times the demand: with background load, a loader that only just keeps up no longer does
GOOD_ENOUGH_SHARE = 0.98  # of the best throughput: the cheapest setting that reaches it is chosen
TUNED_SETTINGS = ("threads", "queue_depth")
HW_DECODER_LOADS = (0.0, 0.25, 0.5, 0.65, 0.8, 1.0)
DECODERS_DIFFER = (
    "hw_decoder_load changes pixels slightly, and which ones depends on the number of ranks; none is chosen. "
    "To use one: train.py --hw-decoder-load SHARE"
)
Measure = Callable[[Mapping[str, LoaderSettings]], dict[str, float]]


@dataclass(frozen=True)
class Trial:
    """Settings that were tried.

    Attributes:
        settings: the settings that were varied.
        img_s: img/s that an emulated trainer of DEMAND_HEADROOM times the demand got.
    """

    settings: dict[str, Any]
    img_s: float


def choices(settings: LoaderSettings, cores: int) -> dict[str, tuple[Any, ...]]:
    """What to try for each setting, the cheapest first."""
    most = max(cores + 1, settings.threads)
    threads = sorted({*(n for n in (1, 2, 3, 4, 6, 8) if n <= most), most})
    return {"threads": tuple(threads), "queue_depth": (1, 2, 3, 4)}


def decoder_shares(settings: LoaderSettings) -> tuple[float, ...]:
    """Shares of the GPU's JPEG engines to compare; none on the CPU."""
    return HW_DECODER_LOADS if settings.device == "cuda" else ()


def compare_decoders(settings: LoaderSettings, measure: Measure) -> tuple[Trial, ...]:
    """Measures `settings` with each of `decoder_shares`, for the user to choose."""
    candidates = {f"hw_decoder_load {s:g}": replace(settings, hw_decoder_load=s) for s in decoder_shares(settings)}
    img_s = measure(candidates) if candidates else {}
    return tuple(Trial({"hw_decoder_load": candidates[key].hw_decoder_load}, value) for key, value in img_s.items())


def tune(
    start: LoaderSettings, options: Mapping[str, Sequence[Any]], measure: Measure
) -> tuple[LoaderSettings, tuple[Trial, ...]]:
    """Searches one setting after another and keeps the first value that is about as good as the best.

    Args:
        start: the settings to start from.
        options: values to try for each setting, the cheapest first.
        measure: gives the img/s of each candidate; it should measure all of them in turn.

    Returns:
        The settings found, and every trial.
    """
    best, trials = start, list[Trial]()
    for name, values in options.items():
        candidates = {f"{name} {value}": replace(best, **{name: value}) for value in values}
        img_s = measure(candidates)
        trials += [Trial(speed_settings(candidates[key]), value) for key, value in img_s.items()]
        enough = GOOD_ENOUGH_SHARE * max(img_s.values())
        best = next(candidates[key] for key in candidates if img_s[key] >= enough)
    return best, tuple(trials)


def paced_throughput(
    shards: ShardSet,
    basis: Eigenbasis,
    candidates: Mapping[str, LoaderSettings],
    demand: float,
    seconds: float,
    progress: Callable[[int], None] = lambda n: None,
) -> dict[str, float]:
    """img/s that an emulated trainer of DEMAND_HEADROOM times the demand gets from each candidate, measured in turn.

    Args:
        shards: the shard set.
        basis: its eigenbasis.
        candidates: loader settings by name.
        demand: img/s.
        seconds: length of a window.
        progress: called with 1 after each window; there are STAGE_ROUNDS of each candidate.
    """
    trainer = EmulatedTrainer(demand * DEMAND_HEADROOM)

    def paced_sizes(settings: LoaderSettings) -> Iterator[int]:
        for images in stage_batch_sizes(shards, basis, settings, "full"):
            trainer(images)
            yield images

    factories = {name: partial(paced_sizes, settings) for name, settings in candidates.items()}
    discard = max(settings.prefetched_batches for settings in candidates.values())
    measured = measure_throughput(factories, seconds, STAGE_ROUNDS, progress, discard)
    return {name: candidate.img_s for name, candidate in measured.items()}


def speed_settings(settings: LoaderSettings) -> dict[str, Any]:
    """The settings that are searched."""
    return {name: getattr(settings, name) for name in TUNED_SETTINGS}


def load_tuned(path: Path) -> dict[str, Any]:
    """Reads the settings that `bench_loader --tune` wrote, as fields of LoaderSettings.

    Raises:
        ValueError: the file is of another kind.
    """
    try:
        found = json.loads(path.read_text())["settings"]
        tuned, share = {name: found[name] for name in TUNED_SETTINGS}, found.get("hw_decoder_load", 0)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: no settings of bench_loader --tune FILE here; run that first:"
            f" python tools/bench_loader.py SHARDS --demand IMG_S --tune {path}"
        ) from error
    if share:  # of an earlier version, which searched it like a setting of speed
        raise ValueError(
            f"{path}: it has hw_decoder_load {share}, which changes pixels and is no setting of speed; remove it from"
            f" the file, and add --hw-decoder-load {share} if it is intended"
        )
    return tuned
