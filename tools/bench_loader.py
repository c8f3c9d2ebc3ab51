"""How fast the feed is and where its time goes: reading, decoding, and the whole, in img/s and CPU time.

    python tools/bench_loader.py SHARDS [--device cpu|cuda] [--batch N] [--threads N] [--seconds S] [--json FILE]

Prints a table for people, then one line of JSON for programs. Wants SHARDS/eigenbasis.json, which compute_pca makes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import get_args

from cli import Progress, run, write_json

from pipeline import eigenbasis
from pipeline.graphs import Stage
from pipeline.loader import FeedSettings, stage_sizes
from pipeline.rates import Rate, measure_rates
from pipeline.shards import open_shards

ROUNDS = 3
WORK = {"read": "read", "decode": "read + decode", "full": "read + decode + augment"}


def main() -> int:
    """Measures and prints; returns the exit code."""
    arguments = _arguments()
    shards = open_shards(arguments.shards)
    basis = eigenbasis.load(arguments.eigenbasis or arguments.shards / "eigenbasis.json", shards)
    changes = {} if arguments.threads is None else {"threads": arguments.threads}
    settings = FeedSettings(batch=arguments.batch, device=arguments.device, **changes)
    print(
        f"{arguments.shards}: {len(shards):,} samples, device {settings.device}, batch {settings.batch}, "
        f"{settings.threads} threads, queue {settings.queue_depth}, {ROUNDS} rounds of {arguments.seconds:g} s each"
    )
    stages = get_args(Stage)
    feeds = {stage: partial(stage_sizes, shards, basis, settings, stage) for stage in stages}
    with Progress("measuring", ROUNDS * len(stages), "windows") as progress:
        rates = measure_rates(feeds, arguments.seconds, ROUNDS, progress, settings.queue_depth + 1)
    print(table({WORK[stage]: rate for stage, rate in rates.items()}))
    record = {
        "shards": str(arguments.shards),
        "manifest_sha256": shards.manifest_sha256,
        "settings": asdict(settings),
        "seconds": arguments.seconds,
        "rounds": ROUNDS,
        "stages": {stage: asdict(rate) for stage, rate in rates.items()},
    }
    print(json.dumps(record))
    write_json(arguments.json, record)
    return 0


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
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
