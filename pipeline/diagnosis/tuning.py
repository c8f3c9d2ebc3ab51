"""Settings of the feed for a demand, found by measuring: one kind of setting after the other, the least that does.

Nothing here changes a picture: only settings of speed are searched. The result is a JSON file that train.py takes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.loader.settings import LoaderSettings

HEADROOM = 1.1  # times the demand: weather must not turn a feed that just keeps up into one that does not
AS_GOOD = 0.98  # of the best rate: what costs less and is this close is chosen
KINDS = ("threads", "queue_depth", "hw_decoder_load")
Measure = Callable[[Mapping[str, LoaderSettings]], dict[str, float]]


@dataclass(frozen=True)
class Trial:
    """Settings that were tried, and the img/s that a trainer of HEADROOM times the demand got of them."""

    settings: dict[str, Any]
    img_s: float


def choices(settings: LoaderSettings, cores: int) -> dict[str, tuple[Any, ...]]:
    """What to try of each kind, the cheapest first."""
    most = max(cores + 1, settings.threads)
    threads = sorted({*(n for n in (1, 2, 3, 4, 6, 8) if n <= most), most})
    found: dict[str, tuple[Any, ...]] = {"threads": tuple(threads), "queue_depth": (1, 2, 3, 4)}
    if settings.device == "cuda":
        found["hw_decoder_load"] = (0.0, 0.25, 0.5, 0.65, 0.8, 1.0)
    return found


def tune(
    start: LoaderSettings, options: Mapping[str, Sequence[Any]], measure: Measure
) -> tuple[LoaderSettings, tuple[Trial, ...]]:
    """For each kind, `measure`s all its options in turn, the others held, and keeps the first that is as good as the
    best. Returns the settings and every trial."""
    best, trials = start, list[Trial]()
    for kind, values in options.items():
        rivals = {f"{kind} {value}": replace(best, **{kind: value}) for value in values}
        rates = measure(rivals)
        trials += [Trial(speed_of(rivals[name]), img_s) for name, img_s in rates.items()]
        enough = AS_GOOD * max(rates.values())
        best = next(rivals[name] for name in rivals if rates[name] >= enough)
    return best, tuple(trials)


def speed_of(settings: LoaderSettings) -> dict[str, Any]:
    """The settings that are searched."""
    return {kind: getattr(settings, kind) for kind in KINDS}


def load_tuned(path: Path) -> dict[str, Any]:
    """The settings in a file of `bench_loader --tune`, to replace those of a LoaderSettings. ValueError where the file is
    another one."""
    try:
        found = json.loads(path.read_text())["settings"]
        known = {kind: found[kind] for kind in KINDS}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no settings of bench_loader --tune FILE here; run that first") from error
    return known
