"""What each way of storing a picture costs and keeps, and how fast ours is beside Pillow's, on any folder of pictures.

    python tools/bench_resize.py PICTURES [--images N] [--rounds N] [--json FILE]

Prints Markdown tables: size, decoding speed, PSNR and SSIM of every filter, quality and chroma subsampling against a
float64 Lanczos reference of the whole picture; then CPU time per picture of ours, its stages, and its rivals. All that
is timed runs on one thread. Wants scikit-image: pip install -e '.[bench]'.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from io import BytesIO
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.imagenet.folders import SUFFIXES
from pipeline.shards.transcode import ResizeSettings, Undecodable, decode, encode, resize, transcode
from tools.shared.cli import Progress, run, write_json

DEFAULT = ResizeSettings()
FILTERS = ("area", "bicubic", "lanczos")
QUALITIES = (85, 90, 95)
CHROMA = ("4:2:0", "4:4:4")

Similarity = Callable[[NDArray[np.float64], NDArray[np.float64]], float]


@dataclass(frozen=True)
class Spread:
    """Mean and worst over the pictures."""

    mean: float
    worst: float


@dataclass(frozen=True)
class Kept:
    """What is left of pictures stored with `filter`, `quality` and `subsampling`; decoding is whole, to RGB."""

    filter: str
    quality: int
    subsampling: str
    mean_kb: float
    decode_img_s: float
    psnr_db: Spread
    ssim: Spread


@dataclass(frozen=True)
class Times:
    """A ratio: median, least and greatest of the rounds."""

    median: float
    least: float
    greatest: float


@dataclass(frozen=True)
class Speed:
    """CPU milliseconds per picture, median over rounds, and how often each of OURS fits into that."""

    cpu_ms: float
    times: dict[str, Times]


def main() -> int:
    """Measures and prints; returns the exit code."""
    arguments = _arguments()
    torch.set_num_threads(1)
    similarity = _similarity()
    pictures = _pictures(arguments.pictures, arguments.images)
    kept, differences = measure_quality(pictures, arguments.rounds, similarity)
    speeds, stages_ms = measure_speed(pictures, arguments.rounds)
    print(f"{len(pictures)} pictures, mean {mean(map(len, pictures)) / 1000:.0f} kB, {arguments.rounds} rounds\n")
    print(_quality_table(kept), "\n")
    print(_difference_table(differences), "\n")
    print(_speed_table(speeds), "\n")
    print(_stage_table(stages_ms))
    record = {
        "pictures": len(pictures),
        "rounds": arguments.rounds,
        "default": asdict(DEFAULT),
        "quality": [asdict(row) for row in kept],
        "difference": {name: asdict(spread) for name, spread in differences.items()},
        "speed": {name: asdict(speed) for name, speed in speeds.items()},
        "stages_ms": stages_ms,
    }
    write_json(arguments.json, record)
    return 0


def _pictures(folder: Path, count: int) -> list[bytes]:
    """`count` files below `folder`, spread evenly over all of them; those that cannot be stored are left out."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    chosen = [paths[i] for i in np.linspace(0, len(paths) - 1, min(count, len(paths))).astype(int)]
    pictures = []
    for path in chosen:
        data = path.read_bytes()
        try:
            transcode(data, DEFAULT)
        except Undecodable as error:
            print(f"{path}: left out, {error}")
        else:
            pictures.append(data)
    if not pictures:
        raise ValueError(f"{folder}: no picture to measure with; give a folder that holds some, at any depth")
    return pictures


# ---- quality ------------------------------------------------------------------------------------------------------


def measure_quality(
    pictures: Sequence[bytes], rounds: int, similarity: Similarity
) -> tuple[list[Kept], dict[str, Spread]]:
    """A row for each filter, quality and subsampling; and per filter the mean absolute difference to the reference in
    grey levels, before encoding."""
    kinds = list(product(FILTERS, QUALITIES, CHROMA))
    jpegs: dict[tuple[str, int, str], list[bytes]] = {kind: [] for kind in kinds}
    psnr_db: dict[tuple[str, int, str], list[float]] = {kind: [] for kind in kinds}
    ssim: dict[tuple[str, int, str], list[float]] = {kind: [] for kind in kinds}
    differences: dict[str, list[float]] = {name: [] for name in FILTERS}
    with Progress("quality", len(pictures)) as progress:
        for data in pictures:
            decoded = decode(data, DEFAULT)
            resized = {name: resize(decoded, ResizeSettings(filter=name)) for name in FILTERS}
            height, width, _ = resized[FILTERS[0]].shape
            reference = lanczos_reference(_whole(data), (width, height)).clip(0, 255)
            for name, picture in resized.items():
                differences[name].append(float(np.abs(picture - reference).mean()))
            for kind in kinds:
                name, quality, subsampling = kind
                jpeg = encode(resized[name], ResizeSettings(quality=quality, subsampling=subsampling)).jpeg
                stored = simplejpeg.decode_jpeg(jpeg, "RGB").astype(np.float64)
                jpegs[kind].append(jpeg)
                psnr_db[kind].append(float(10 * np.log10(255**2 / np.square(stored - reference).mean())))
                ssim[kind].append(similarity(stored, reference))
            progress(1)
    decode_ms = _decode_ms(jpegs, rounds)
    rows = [
        Kept(
            *kind,
            mean_kb=mean(map(len, jpegs[kind])) / 1000,
            decode_img_s=1000 / decode_ms[kind],
            psnr_db=Spread(mean(psnr_db[kind]), min(psnr_db[kind])),
            ssim=Spread(mean(ssim[kind]), min(ssim[kind])),
        )
        for kind in kinds
    ]
    return rows, {name: Spread(mean(values), max(values)) for name, values in differences.items()}


def lanczos_reference(picture: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.float64]:
    """uint8 (H, W, 3) to `size` (width, height) by Lanczos-3: float64 (height, width, 3), not rounded, not clipped.

    Antialiased as Pillow defines it: where the picture shrinks, the kernel is as much wider.
    """
    rows = _lanczos_weights(picture.shape[0], size[1])
    columns = _lanczos_weights(picture.shape[1], size[0])
    narrow: NDArray[np.float64] = np.einsum("yxc,wx->ywc", picture.astype(np.float64), columns, optimize=True)
    resized: NDArray[np.float64] = np.einsum("hy,ywc->hwc", rows, narrow, optimize=True)
    return resized


def _lanczos_weights(before: int, after: int) -> NDArray[np.float64]:
    """(after, before): what each new pixel takes of each old one; every row sums to 1."""
    scale = before / after
    centres = (np.arange(after) + 0.5) * scale
    distance = (np.arange(before) + 0.5 - centres[:, None]) / max(scale, 1.0)
    weights = np.where(np.abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0.0)
    normalised: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return normalised


def _whole(data: bytes) -> NDArray[np.uint8]:
    with Image.open(BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def _similarity() -> Similarity:
    """SSIM of two pictures (H, W, 3), 0 to 255, over windows of 7 x 7, mean of the channels."""
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise ValueError("scikit-image is not installed; run: pip install -e '.[bench]'") from error
    return lambda one, other: float(structural_similarity(one, other, channel_axis=2, data_range=255))


def _decode_ms(jpegs: dict[tuple[str, int, str], list[bytes]], rounds: int) -> dict[tuple[str, int, str], float]:
    """CPU milliseconds to decode a picture of each kind, whole, median over rounds."""
    windows: dict[tuple[str, int, str], list[float]] = {kind: [] for kind in jpegs}
    with Progress("decoding", rounds, "rounds") as progress:
        for _ in range(rounds):
            for kind, those in jpegs.items():
                windows[kind].append(cpu_ms(lambda jpeg: simplejpeg.decode_jpeg(jpeg, "RGB"), those))
            progress(1)
    return {kind: median(those) for kind, those in windows.items()}


# ---- speed --------------------------------------------------------------------------------------------------------


def measure_speed(pictures: Sequence[bytes], rounds: int) -> tuple[dict[str, Speed], dict[str, float]]:
    """Ours and its rivals in turn, each over all pictures in every round; and the stages of ours, CPU ms per picture.

    Not by pipeline/rates.py: its windows end by the clock, so that rivals would do unequal pictures.
    """
    windows: dict[str, list[float]] = {name: [] for name in RIVALS}
    stages: list[tuple[float, float, float]] = []
    with Progress("speed", rounds, "rounds") as progress:
        for _ in range(rounds):
            for name, job in RIVALS.items():
                windows[name].append(cpu_ms(job, pictures))
            stages.append(_stages_ms(pictures))
            progress(1)
    speeds = {}
    for name, those in windows.items():
        times = {ours: [b / a for a, b in zip(windows[ours], those, strict=True)] for ours in OURS}
        speeds[name] = Speed(median(those), {o: Times(median(t), min(t), max(t)) for o, t in times.items()})
    names = ("decode", "resize", "encode")
    return speeds, {name: median(stage) for name, stage in zip(names, zip(*stages, strict=True), strict=True)}


def cpu_ms(job: Callable[[bytes], object], items: Sequence[bytes]) -> float:
    """CPU milliseconds that this process takes for `job` on an item."""
    start_s = time.process_time()
    for item in items:
        job(item)
    return 1000 * (time.process_time() - start_s) / len(items)


def _stages_ms(pictures: Iterable[bytes]) -> tuple[float, float, float]:
    """CPU milliseconds per picture to decode, to resize and to encode."""
    clocks = []
    for data in pictures:
        start_s = time.process_time()
        decoded = decode(data, DEFAULT)
        decoded_s = time.process_time()
        resized = resize(decoded, DEFAULT)
        resized_s = time.process_time()
        encode(resized, DEFAULT)
        clocks.append((decoded_s - start_s, resized_s - decoded_s, time.process_time() - resized_s))
    decode_s, resize_s, encode_s = np.mean(clocks, axis=0)
    return 1000 * decode_s, 1000 * resize_s, 1000 * encode_s


def _by_pillow(data: bytes, kernel: Image.Resampling, shortcuts: bool) -> bytes:
    """The picture as plain Pillow stores it; `shortcuts` are what Pillow has to make it quicker."""
    with Image.open(BytesIO(data)) as image:
        scale = DEFAULT.short_side / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        if shortcuts:
            image.draft("RGB", size)
        small = image.convert("RGB").resize(size, kernel, reducing_gap=2.0 if shortcuts else None)
        out = BytesIO()
        small.save(out, "JPEG", quality=DEFAULT.quality, subsampling=DEFAULT.subsampling)
        return out.getvalue()


OURS = {f"ours, {name}": ResizeSettings(filter=name) for name in ("bicubic", "lanczos")}
RIVALS: dict[str, Callable[[bytes], object]] = {
    **{name: partial(transcode, settings=settings) for name, settings in OURS.items()},
    "Pillow, lanczos": lambda data: _by_pillow(data, Image.Resampling.LANCZOS, shortcuts=False),
    "Pillow, lanczos, draft and reducing_gap 2": lambda data: _by_pillow(
        data, Image.Resampling.LANCZOS, shortcuts=True
    ),
    "Pillow, bicubic": lambda data: _by_pillow(data, Image.Resampling.BICUBIC, shortcuts=False),
}


# ---- tables -------------------------------------------------------------------------------------------------------


def _markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _quality_table(kept: Iterable[Kept]) -> str:
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
        for row in kept
    ]
    head = ("filter", "quality", "chroma", "kB", "decode img/s", "PSNR dB, mean (worst)", "SSIM, mean (worst)")
    return _markdown(head, rows)


def _difference_table(differences: dict[str, Spread]) -> str:
    rows = [(name, f"{spread.mean:.2f}", f"{spread.worst:.2f}") for name, spread in differences.items()]
    return _markdown(("filter, before encoding", "grey levels off the reference, mean", "worst picture"), rows)


def _speed_table(speeds: dict[str, Speed]) -> str:
    rows = [
        (
            name,
            f"{speed.cpu_ms:.2f}",
            f"{1000 / speed.cpu_ms:,.0f}",
            *(f"{times.median:.2f} ({times.least:.2f} to {times.greatest:.2f})" for times in speed.times.values()),
        )
        for name, speed in speeds.items()
    ]
    return _markdown(("", "CPU ms per picture", "img/s per core", *(f"times {name} (rounds)" for name in OURS)), rows)


def _stage_table(stages_ms: dict[str, float]) -> str:
    total_ms = sum(stages_ms.values())
    rows = [(name, f"{ms:.2f}", f"{ms / total_ms:.0%}") for name, ms in stages_ms.items()]
    return _markdown((f"stage of ours, {DEFAULT.filter}", "CPU ms per picture", "share"), rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, help="folder of pictures, searched to any depth")
    parser.add_argument("--images", type=int, default=100, help="how many of them, spread evenly (default 100)")
    parser.add_argument("--rounds", type=int, default=5, help="windows of each rival (default 5)")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
