"""Compares ways of storing an image, and the speed of our transcoding with Pillow's, on any folder of images.

    python tools/bench_resize.py IMAGES [--images N] [--rounds N] [--json FILE]

Prints Markdown tables. The first has size, decoding speed, PSNR (peak signal-to-noise ratio) and SSIM (structural
similarity) of every filter, quality and chroma subsampling, against a float64 Lanczos reference of the whole image. The
others have CPU time per image of ours, of its stages, and of the baselines. Everything that is timed runs on one
thread. Requires scikit-image: pip install -e '.[bench]'.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from tools.shared.cli import json_path, run, write_json

if TYPE_CHECKING:
    from tools.shared.resize_benchmark import Speed, Spread, StoredQuality


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="IMAGES", help="folder of images, searched to any depth")
    parser.add_argument("--images", type=int, default=100, help="number of images, spread evenly; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of each measurement; default: %(default)s")
    parser.add_argument("--json", type=json_path, metavar="FILE", help="also write the results to FILE")
    return parser.parse_args()


def main() -> int:
    """Measures and prints."""
    args = parse()
    import torch  # here, so that --help answers at once

    from tools.shared import resize_benchmark as benchmark

    torch.set_num_threads(1)
    similarity = benchmark.structural_similarity()
    images = benchmark.read_images(args.folder, args.images)
    quality, differences = benchmark.measure_quality(images, args.rounds, similarity)
    speeds, stages_ms = benchmark.measure_speed(images, args.rounds)
    print(f"{len(images)} images, mean {mean(map(len, images)) / 1000:.0f} kB, {args.rounds} rounds\n")
    print(quality_table(quality), "\n")
    print(difference_table(differences), "\n")
    print(speed_table(speeds), "\n")
    print(stage_table(stages_ms, benchmark.DEFAULT.filter))
    record = {
        "images": len(images),
        "rounds": args.rounds,
        "default": asdict(benchmark.DEFAULT),
        "quality": [asdict(row) for row in quality],
        "difference": {name: asdict(spread) for name, spread in differences.items()},
        "speed": {name: asdict(speed) for name, speed in speeds.items()},
        "stages_ms": stages_ms,
    }
    write_json(args.json, record)
    return 0


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def quality_table(quality: Iterable[StoredQuality]) -> str:
    """A row per way of storing images."""
    rows = [
        (
            row.filter,
            row.quality,
            row.subsampling,
            f"{row.mean_kb:.1f}",
            f"{row.decode_img_s:,.0f}",
            f"{row.psnr_db.mean:.2f} ({row.psnr_db.worst:.2f})",
            f"{row.ssim.mean:.4f} ({row.ssim.worst:.4f})",
        )
        for row in quality
    ]
    head = ("filter", "quality", "chroma", "kB", "decode img/s", "PSNR dB, mean (worst)", "SSIM, mean (worst)")
    return markdown(head, rows)


def difference_table(differences: dict[str, Spread]) -> str:
    """A row per filter: the difference that the filter alone makes."""
    rows = [(name, f"{spread.mean:.2f}", f"{spread.worst:.2f}") for name, spread in differences.items()]
    return markdown(("filter, before encoding", "mean difference in pixel values 0-255", "worst image"), rows)


def speed_table(speeds: dict[str, Speed]) -> str:
    """A row per job: time per image, and its ratio to ours."""
    rows = [
        (
            name,
            f"{speed.cpu_ms:.2f}",
            f"{1000 / speed.cpu_ms:,.0f}",
            *(f"{ratio.median:.2f} ({ratio.least:.2f} to {ratio.greatest:.2f})" for ratio in speed.ratios.values()),
        )
        for name, speed in speeds.items()
    ]
    ours = next(iter(speeds.values())).ratios
    return markdown(("", "CPU ms per image", "img/s per core", *(f"times {name} (rounds)" for name in ours)), rows)


def stage_table(stages_ms: dict[str, float], filter: str) -> str:
    """A row per stage of ours."""
    total_ms = sum(stages_ms.values())
    rows = [(name, f"{ms:.2f}", f"{ms / total_ms:.0%}") for name, ms in stages_ms.items()]
    return markdown((f"stage of ours, {filter}", "CPU ms per image", "share"), rows)


if __name__ == "__main__":
    run(main)
