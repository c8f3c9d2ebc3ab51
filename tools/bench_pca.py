"""Compares compute_pca's pass over a shard set with bare decoding of the same samples by the same number of workers.

    python tools/bench_pca.py SHARDS [--workers N] [--seconds S] [--rounds N] [--json FILE]

First checks that compute_pca and a plain pass with Pillow and float64 sums give the same bits. Then measures, in
alternating windows: compute_pca, libjpeg-turbo (simplejpeg) that only decodes, and the plain pass. Prints throughput,
CPU time per image, and compute_pca's throughput relative to each with its 95 % confidence interval over the rounds.
Exit codes: 0 success; 1 the results differ; 2 wrong input.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.shared.cli import Progress, cores, json_path, parser_of, require_at_least, require_positive, run, write_json

if TYPE_CHECKING:
    from pipeline.profiling.throughput import Throughput

MIN_ROUNDS = 2  # a confidence interval needs two values


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="one split's shard set")
    parser.add_argument("--workers", type=int, default=cores(), metavar="N", help="processes; default: one per core")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a window; default: %(default)g")
    parser.add_argument("--rounds", type=int, default=8, help="windows of each candidate; default: %(default)s")
    parser.add_argument("--json", type=json_path, metavar="FILE", help="also write the results to FILE")
    return parser.parse_args()


def main() -> int:
    """Checks, measures and prints."""
    args = parse()
    require_at_least(1, workers=args.workers)
    require_at_least(MIN_ROUNDS, rounds=args.rounds)
    require_positive(seconds=args.seconds)
    # Imported here, so that --help answers at once.
    from pipeline import rgb_pca
    from pipeline.profiling.machine import describe_machine
    from pipeline.profiling.throughput import measure_throughput
    from pipeline.shards.reader import open_shards
    from pipeline.workers import ignore, workers_of
    from tools.shared import pca_benchmark as benchmark

    shards = open_shards(args.shards)
    with workers_of(args.workers, benchmark.__name__) as workers:
        ours = rgb_pca.measure(shards, workers, ignore)
        plain = rgb_pca.eigenbasis_of(benchmark.pillow_moments(shards, workers), shards.manifest_sha256)
        if rgb_pca.record(ours) != rgb_pca.record(plain) or (ours.mean_image != plain.mean_image).any():
            print(f"{args.shards}: compute_pca and {benchmark.PILLOW} give different results", file=sys.stderr)
            return 1
        candidates = benchmark.passes(shards, workers)
        with Progress("measuring", args.rounds * len(candidates), "windows") as progress:
            measured = measure_throughput(candidates, args.seconds, args.rounds, progress, discard=1)
    ratios = {name: relative(measured[benchmark.OURS], found) for name, found in measured.items()}
    del ratios[benchmark.OURS]
    print(f"{args.shards}: {len(shards):,} images, {args.workers} workers, {args.rounds} rounds; results are identical")
    print(table(measured, ratios))
    record = {
        "machine": describe_machine(),
        "images": len(shards),
        **{name: getattr(args, name) for name in ("workers", "seconds", "rounds")},
        "throughput": {name: asdict(found) for name, found in measured.items()},
        "ratios": ratios,
    }
    write_json(args.json, record)
    return 0


def relative(ours: Throughput, baseline: Throughput) -> dict[str, Any]:
    """Our throughput divided by the baseline's, round by round: mean and interval; and the same by CPU time."""
    from pipeline.profiling.confidence import t_interval

    by_round = [mine / its for mine, its in zip(ours.rounds_img_s, baseline.rounds_img_s, strict=True)]
    return {
        "throughput": asdict(t_interval(by_round)),
        "by_round": by_round,
        "cpu": baseline.cpu_ms_per_img / ours.cpu_ms_per_img,
    }


def table(measured: dict[str, Throughput], ratios: dict[str, dict[str, Any]]) -> str:
    """A line per candidate; after each baseline what compute_pca's throughput is relative to it."""
    lines = [f"{'':22}{'img/s':>8}{'CPU ms/img':>12}  {'compute_pca / its, 95 %':>26}{'by CPU':>8}"]
    for name, found in measured.items():
        line = f"{name:22}{found.img_s:8,.0f}{found.cpu_ms_per_img:12.3f}"
        if name in ratios:
            interval = ratios[name]["throughput"]
            shown = f"{interval['mean']:.2f} ({interval['low']:.2f} to {interval['high']:.2f})"
            line += f"  {shown:>26}{ratios[name]['cpu']:8.2f}"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
