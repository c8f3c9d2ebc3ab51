"""How fast the feed is and where its time goes: reading, decoding, and the whole, in img/s and CPU time.

    python tools/bench_loader.py SHARDS [--device cpu|cuda] [--batch N] [--threads N] [--seconds S] [--json FILE]
                                        [--demand IMG_S [--au-bar 0.95] [--plot FILE]]

Prints a table for people, then one line of JSON for programs. Wants SHARDS/eigenbasis.json, which compute_pca makes.
With --demand, a trainer that takes so many images a second and no core (it sleeps) is fed for a while: the stall report
of that, and exit code 1 where it waits so much that AU is below the bar.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import cast, get_args

import numpy as np
from cli import Progress, cores, run, write_json

from pipeline import eigenbasis
from pipeline.augment import STORED
from pipeline.doctor import ROUNDS, EmulatedTrainer, Observed, Subject, observe
from pipeline.eigenbasis import Eigenbasis
from pipeline.findings import Findings, Setup, find, format_findings
from pipeline.fingerprint import machine, memory
from pipeline.graphs import Stage
from pipeline.loader import FeedSettings, stage_sizes
from pipeline.rates import Rate, measure_rates
from pipeline.report_html import page
from pipeline.shards import ShardSet, open_shards
from pipeline.stall import AU_BAR

STAGE_ROUNDS = 3
WORK = {"read": "read", "decode": "read + decode", "full": "read + decode + augment"}


def main() -> int:
    """Measures and prints; returns the exit code."""
    arguments = _arguments()
    trainer = None if arguments.demand is None else EmulatedTrainer(arguments.demand)
    if not 0 < arguments.au_bar <= 1:
        raise ValueError(f"--au-bar {arguments.au_bar:g}; AU is a share, above 0 and at most 1")
    shards = open_shards(arguments.shards)
    basis = eigenbasis.load(arguments.eigenbasis or arguments.shards / "eigenbasis.json", shards)
    changes = {} if arguments.threads is None else {"threads": arguments.threads}
    settings = FeedSettings(batch=arguments.batch, device=arguments.device, **changes)
    print(
        f"{arguments.shards}: {len(shards):,} samples, device {settings.device}, batch {settings.batch}, "
        f"{settings.threads} threads, "
        f"queue {settings.queue_depth}, {STAGE_ROUNDS} rounds of {arguments.seconds:g} s each"
    )
    stages = get_args(Stage)
    feeds = {stage: partial(stage_sizes, shards, basis, settings, stage) for stage in stages}
    with Progress("measuring", STAGE_ROUNDS * len(stages), "windows") as progress:
        rates = measure_rates(feeds, arguments.seconds, STAGE_ROUNDS, progress, settings.queue_depth + 1)
    print(table({WORK[stage]: rate for stage, rate in rates.items()}))
    record = {
        "shards": str(arguments.shards),
        "manifest_sha256": shards.manifest_sha256,
        "settings": asdict(settings),
        "seconds": arguments.seconds,
        "rounds": STAGE_ROUNDS,
        "stages": {stage: asdict(rate) for stage, rate in rates.items()},
    }
    found = None
    if trainer is not None:
        observed = fed(shards, basis, settings, trainer, arguments.seconds)
        about = {"machine": machine(), **{name: record[name] for name in ("shards", "manifest_sha256", "settings")}}
        found = find(rates, observed, setup_of(shards, settings), memory(), about, arguments.au_bar)
        print(f"\n{format_findings(found)}\n")
        record["stall"] = found.record()
        write_page(arguments.plot, found)
    print(json.dumps(record))
    write_json(arguments.json, record)
    return int(found is not None and found.report.au < arguments.au_bar)


def setup_of(shards: ShardSet, settings: FeedSettings) -> Setup:
    """What the feed works with."""
    pixels = shards.index["width"].astype(np.int64) * shards.index["height"]
    return Setup(settings.threads, settings.queue_depth, cores(), float(pixels.mean()) / STORED**2)


def write_page(path: Path | None, found: Findings) -> None:
    """The findings as a page (nothing where `--plot` was not given)."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(found, f"Stall report: {found.report.verdict}"))


def fed(
    shards: ShardSet, basis: Eigenbasis, settings: FeedSettings, trainer: EmulatedTrainer, seconds: float
) -> Observed:
    """The trainer on batches that are there and on real ones, in windows of `seconds`."""
    subject = Subject[int](size=int, step=trainer)
    feed = cast(Generator[int], stage_sizes(shards, basis, settings, "full"))
    with closing(feed), Progress("feeding the trainer", ROUNDS, "rounds") as progress:
        return observe(feed, subject, [settings.batch], seconds, settings.queue_depth + 1, progress=progress)


def table(rates: dict[str, Rate]) -> str:
    """Rates as lines for people."""
    lines = [f"{'':26}{'img/s':>9}{'min':>9}{'max':>9}{'ms/img':>9}{'CPU ms/img':>12}{'cores':>7}"]
    for name, rate in rates.items():
        lines.append(
            f"{name:26}{rate.img_s:9,.0f}{rate.img_s_min:9,.0f}{rate.img_s_max:9,.0f}{1000 / rate.img_s:9.3f}"
            f"{rate.cpu_ms_per_img:12.3f}{rate.cores_used:7.2f}"
        )
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, help="folder of a shard set")
    parser.add_argument("--eigenbasis", type=Path, help="default: SHARDS/eigenbasis.json")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=FeedSettings.device)
    parser.add_argument("--batch", type=int, default=FeedSettings.batch)
    parser.add_argument("--threads", type=int, help="DALI's; default: cores + 1, at most 8")
    parser.add_argument("--seconds", type=float, default=5.0, help="of one window (default 5)")
    parser.add_argument("--demand", type=float, metavar="IMG_S", help="of a trainer to be fed on trial")
    parser.add_argument("--au-bar", type=float, default=AU_BAR, help="exit with 1 below (default %(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="of --demand's report as an HTML page")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
