"""Compares whole runs of make_shards with a plain Pillow loop and with img2dataset: same images, one process each.

    python tools/bench_sharding.py PHOTOS [--images N] [--rounds N] [--json FILE]

PHOTOS is a folder of images at any depth. A run has N images: links to PHOTOS, repeated as often as needed, in class
folders. Runs of all candidates alternate, so that background load affects all equally. Start-up counts. Also measures
compute_pca on the set that make_shards wrote. img2dataset is measured if it is installed (pip install img2dataset); it
reads the same files through file URLs, shrinks by area as it does by default, and writes WebDataset tars.

Prints wall-clock and CPU time, images per CPU second, and hours of one core for ImageNet's 1,281,167 images.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from tools.shared.cli import Progress, json_path, parser_of, require_at_least, run, write_json

TOOLS = Path(__file__).parent
OURS, PCA, PILLOW, IMG2DATASET = "make_shards", "compute_pca", "Pillow loop", "img2dataset"
PYTHONPATH = os.environ.get("PYTHONPATH")
IMAGENET_IMAGES = 1_281_167
CLASS_FOLDERS = 1000


@dataclass(frozen=True)
class Run:
    """The time of one process and its children.

    Attributes:
        wall_s: from start to exit.
        cpu_s: user and system time.
    """

    wall_s: float
    cpu_s: float


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("photos", type=Path, metavar="PHOTOS", help="folder of images, searched to any depth")
    parser.add_argument("--images", type=int, metavar="N", help="images in a run; default: those of PHOTOS, once each")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each candidate; default: %(default)s")
    parser.add_argument("--json", type=json_path, metavar="FILE", help="also write the results to FILE")
    return parser.parse_args()


def main() -> int:
    """Measures and prints."""
    args = parse()
    require_at_least(1, rounds=args.rounds, images=args.images)
    photos = sorted(path.resolve() for path in args.photos.rglob("*") if path.is_file())
    if not photos:
        raise ValueError(f"{args.photos}: no files here; give a folder that contains images, at any depth")
    images = args.images or len(photos)
    with TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        link(photos, images, source / "train")
        candidates = commands(source, Path(folder) / "out")
        runs: dict[str, list[Run]] = {name: [] for name in candidates}
        with Progress("measuring", args.rounds * len(candidates), "runs") as progress:
            for _ in range(args.rounds):
                for name, command in candidates.items():
                    runs[name].append(measure(command))
                    progress.say(f"{name}: {runs[name][-1].wall_s:.2f} s, CPU time {runs[name][-1].cpu_s:.2f} s")
                    progress(1)
                shutil.rmtree(Path(folder) / "out")
    from pipeline.profiling.machine import describe_machine

    print(f"{images:,} images, {len(photos):,} of them different, {args.rounds} rounds, one process each")
    print(table(runs, images))
    if IMG2DATASET not in candidates:
        print(f"{IMG2DATASET}: not measured: it is not installed")
    record: dict[str, Any] = {"machine": describe_machine(), "images": images, "photos": len(photos)}
    write_json(args.json, record | {"runs": {name: [asdict(one) for one in found] for name, found in runs.items()}})
    return 0


def link(photos: list[Path], images: int, folder: Path) -> None:
    """Fills `folder` with class folders that hold `images` links to photos in all."""
    for number in range(CLASS_FOLDERS):
        (folder / f"n{number:08d}").mkdir(parents=True)
    for number in range(images):
        photo = photos[number % len(photos)]
        (folder / f"n{number % CLASS_FOLDERS:08d}" / f"{number:07d}{photo.suffix}").symlink_to(photo)
    for number in range(images, CLASS_FOLDERS):
        (folder / f"n{number:08d}").rmdir()


def commands(source: Path, out: Path) -> dict[str, list[str]]:
    """The command of each candidate. Each writes to a folder of its own in `out`."""
    shards, urls = out / "shards", source / "urls.txt"
    found = {
        OURS: [TOOLS / "make_shards.py", source, shards, "--workers", 1],
        PCA: [TOOLS / "compute_pca.py", shards / "train", "--workers", 1],
        PILLOW: ["-m", "tools.shared.pillow_loop", source / "train", out / "pillow"],
    }
    if find_spec("img2dataset"):
        urls.write_text("".join(f"{path.absolute().as_uri()}\n" for path in sorted(source.rglob("n*/*"))))
        one = ["--processes_count", 1, "--thread_count", 1, "--output_format", "webdataset"]
        size = ["--image_size", 256, "--resize_mode", "keep_ratio", "--encode_quality", 90]
        where = ["--url_list", urls, "--output_folder", out / "img2dataset"]
        found[IMG2DATASET] = ["-m", "img2dataset.main", *where, *size, *one]
    return {name: [sys.executable, *map(str, command)] for name, command in found.items()}


def measure(command: list[str]) -> Run:
    """Runs a command to its end. Raises OSError if it fails."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(TOOLS.parent), PYTHONPATH]))}
    before, started_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    wall_s, after = time.perf_counter() - started_s, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise OSError(f"{' '.join(command[1:4])}: exit code {done.returncode}: {done.stderr.strip()[-300:]}")
    return Run(wall_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def table(runs: dict[str, list[Run]], images: int) -> str:
    """A line per candidate; the ratios are its time divided by that of make_shards in the same round."""
    head = f"{'':14}{'wall s':>8}{'CPU s':>8}{'img per CPU s':>15}{'ImageNet, h':>13}"
    lines = [f"{head}{'wall / ours':>22}{'CPU / ours':>22}"]
    for name, found in runs.items():
        wall_s, cpu_s = median(one.wall_s for one in found), median(one.cpu_s for one in found)
        hours = cpu_s / images * IMAGENET_IMAGES / 3600
        line = f"{name:14}{wall_s:8.2f}{cpu_s:8.2f}{images / cpu_s:15,.0f}{hours:13.2f}"
        if name in (PILLOW, IMG2DATASET):
            pairs = list(zip(found, runs[OURS], strict=True))
            line += spread([one.wall_s / ours.wall_s for one, ours in pairs])
            line += spread([one.cpu_s / ours.cpu_s for one, ours in pairs])
        lines.append(line)
    return "\n".join(lines)


def spread(ratios: list[float]) -> str:
    """Median of the rounds, with the least and the greatest."""
    return f"{f'{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})':>22}"


if __name__ == "__main__":
    run(main)
