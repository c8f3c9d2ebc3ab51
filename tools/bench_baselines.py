"""Compares the throughput of this loader with that of other loaders on the CPU: same shards, same number of threads.

    python tools/bench_baselines.py SHARDS [--batch N] [--threads N] [--workers N] [--seconds S] [--rounds N]
                                    [--json FILE]

This loader decodes images, takes random 224 x 224 crops from the central 256 x 256, mirrors them, subtracts the
channel means and adds PCA (principal component analysis) lighting noise as in 2012. Its output is float32 NCHW. The
baselines do the same on batches of shuffled samples, except as stated here; each exception favours the baseline:

- bare decoder: libjpeg-turbo (simplejpeg) decodes whole stored images in threads, and does nothing else.
- SPDL, own decoder: the threads of spdl.pipeline; spdl.io (FFmpeg) decodes, crops and mirrors; NumPy does the rest. It
  gets the bytes through this project's index instead of reading tars. FFmpeg interpolates chroma in a simpler way.
- SPDL + libjpeg-turbo: the same, but simplejpeg decodes. SPDL itself does not offer that.
- webdataset + DataLoader: Pillow and NumPy in --workers processes. It shuffles within a buffer only.

Windows are interleaved, so that background load affects all loaders equally. Prints a table with ratios, then one line
of JSON. Names each baseline that is not installed, with the reason. Requires SHARDS/eigenbasis.json and
`pip install -e .[baselines]`; SPDL's own decoder also requires the FFmpeg libraries of the system.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from tools.shared.cli import Progress, json_path, run, write_json

if TYPE_CHECKING:
    from pipeline.profiling.throughput import Throughput

THIS_LOADER = "this loader"
NAME_WIDTH = 26


def main() -> int:
    """Measures and prints; returns the exit code."""
    arguments = _arguments()
    # Heavy imports are here, so that --help is fast.
    from pipeline import rgb_pca
    from pipeline.loader.loader import stage_batch_sizes
    from pipeline.loader.settings import LoaderSettings
    from pipeline.profiling.throughput import measure_throughput
    from pipeline.shards.reader import open_shards
    from tools.shared.baselines import BATCHES_PER_THREAD, NOT_INSTALLABLE, baselines_for, reason_missing

    shards = open_shards(arguments.shards)
    basis = rgb_pca.load_for(shards, arguments.eigenbasis)
    if len(shards.tars) < arguments.workers:
        raise ValueError(
            f"the set has {len(shards.tars)} tars, but webdataset needs one for each of {arguments.workers} workers; "
            f"use --workers {len(shards.tars)}, or make smaller shards"
        )
    given = {"batch": arguments.batch, "threads": arguments.threads}
    settings = LoaderSettings(mean="channel", **{name: value for name, value in given.items() if value is not None})
    baselines = baselines_for(shards, basis, settings, arguments.workers)
    absent = {name: reason for name, found in baselines.items() if (reason := reason_missing(found))} | NOT_INSTALLABLE
    candidates = {THIS_LOADER: lambda: stage_batch_sizes(shards, basis, settings, "full")}
    candidates |= {name: baseline.batch_sizes for name, baseline in baselines.items() if name not in absent}
    with Progress("measuring", arguments.rounds * len(candidates), "windows") as progress:
        # Threads and workers may each hold batches that were ready before the window began.
        discard = BATCHES_PER_THREAD * max(arguments.workers, settings.threads) + 1
        measured = measure_throughput(candidates, arguments.seconds, arguments.rounds, progress, discard)
    ratios = {name: _ratios(measured, name) for name in measured if name != THIS_LOADER}
    targets = {name: baseline.target_ratio for name, baseline in baselines.items()}
    print(
        f"{arguments.shards}: {len(shards):,} samples, batch {settings.batch}, {settings.threads} threads, "
        f"{arguments.workers} DataLoader workers, {arguments.rounds} rounds of {arguments.seconds:g} s each"
    )
    print(_table(measured, ratios, targets, absent))
    record = {
        **{name: getattr(arguments, name) for name in ("workers", "seconds", "rounds")},
        "shards": str(arguments.shards),
        "manifest_sha256": shards.manifest_sha256,
        "settings": asdict(settings),
        "throughput": {name: asdict(found) for name, found in measured.items()},
        "ratios": ratios,
        "target_ratios": targets,
        "absent": absent,
    }
    print(json.dumps(record))
    write_json(arguments.json, record)
    return 0


def _ratios(measured: dict[str, Throughput], name: str) -> dict[str, Any]:
    """This loader relative to baseline `name`: throughput, throughput by round, and images per CPU second."""
    ours, baseline = measured[THIS_LOADER], measured[name]
    by_round = [mine / its for mine, its in zip(ours.rounds_img_s, baseline.rounds_img_s, strict=True)]
    return {
        "throughput": median(by_round),
        "throughput_by_round": by_round,
        "cpu": baseline.cpu_ms_per_img / ours.cpu_ms_per_img,
    }


def _table(
    measured: dict[str, Throughput],
    ratios: dict[str, dict[str, Any]],
    targets: dict[str, float | None],
    absent: dict[str, str],
) -> str:
    """A table for the screen: the throughput of each loader, then what this loader's is relative to it."""
    lines = [
        f"{'':{NAME_WIDTH}}{'img/s':>8}{'min':>8}{'max':>8}{'CPU ms/img':>12}{'cores':>7}  "
        f"{'this / its':>12}{'(rounds)':>18}{'by CPU':>8}{'target':>8}"
    ]
    for name, found in measured.items():
        line = f"{name:{NAME_WIDTH}}{found.img_s:8,.0f}{found.img_s_min:8,.0f}{found.img_s_max:8,.0f}"
        line += f"{found.cpu_ms_per_img:12.3f}{found.cores_used:7.2f}"
        if name in ratios:
            ratio, target = ratios[name], targets[name]
            rounds = f"({min(ratio['throughput_by_round']):.2f} to {max(ratio['throughput_by_round']):.2f})"
            line += f"  {ratio['throughput']:12.2f}{rounds:>18}{ratio['cpu']:8.2f}"
            line += f"{f'{target:g}' if target else '-':>8}"
        lines.append(line)
    lines += [f"{name:{NAME_WIDTH}}not measured: {reason}" for name, reason in absent.items()]
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", metavar="SHARDS", type=Path, help="folder of a shard set")
    parser.add_argument("--eigenbasis", type=Path, help="eigenbasis file; default: the one in SHARDS")
    parser.add_argument("--batch", type=int, help="samples in a batch; default: the loader's, 128")
    parser.add_argument(
        "--threads", type=int, help="of this loader and of the baselines; default: cores + 1, at most 8"
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="DataLoader processes of webdataset; default: 2; best: one per core"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="length of a window; default: 5")
    parser.add_argument("--rounds", type=int, default=3, help="windows of each loader; default: 3")
    parser.add_argument("--json", type=json_path, help="also write the figures to this file")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
