"""Measurements of bench_resize: what each way of storing an image keeps of it, and what transcoding costs in CPU time.

Images come in as encoded bytes. Everything that is timed runs on one thread, in CPU time of this process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import product
from pathlib import Path
from statistics import mean, median

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from pipeline.imagenet.folders import SUFFIXES
from pipeline.shards.settings import ResizeSettings
from pipeline.shards.transcode import Undecodable, decode, encode, resize, transcode
from tools.shared.cli import Progress

DEFAULT = ResizeSettings()
FILTERS = ("area", "bicubic", "lanczos")
QUALITIES = (85, 90, 95)
SUBSAMPLINGS = ("4:2:0", "4:4:4")
LANCZOS_LOBES = 3

Kind = tuple[str, int, str]  # filter, quality, subsampling
Similarity = Callable[[NDArray[np.float64], NDArray[np.float64]], float]


@dataclass(frozen=True)
class Spread:
    """Mean and worst over the images."""

    mean: float
    worst: float


@dataclass(frozen=True)
class StoredQuality:
    """Size, decoding speed and quality of images stored in one way.

    Attributes:
        filter: Resampling filter.
        quality: JPEG quality.
        subsampling: Chroma subsampling.
        mean_kb: Size of a JPEG.
        decode_img_s: Images decoded whole, to RGB, per CPU second.
        psnr_db: Peak signal-to-noise ratio against the reference.
        ssim: Structural similarity to the reference.
    """

    filter: str
    quality: int
    subsampling: str
    mean_kb: float
    decode_img_s: float
    psnr_db: Spread
    ssim: Spread


@dataclass(frozen=True)
class Ratio:
    """Median, least and greatest of a ratio over the rounds."""

    median: float
    least: float
    greatest: float


@dataclass(frozen=True)
class Speed:
    """CPU milliseconds per image (median over rounds), and the ratio to the time of each of OURS."""

    cpu_ms: float
    ratios: dict[str, Ratio]


def read_images(folder: Path, count: int) -> list[bytes]:
    """Reads `count` image files below `folder`, spread evenly over all of them. Skips those that cannot be stored."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    chosen = [paths[i] for i in np.linspace(0, len(paths) - 1, min(count, len(paths))).astype(int)]
    images = []
    for path in chosen:
        data = path.read_bytes()
        try:
            transcode(data, DEFAULT)
        except Undecodable as error:
            print(f"{path}: skipped, {error}")
        else:
            images.append(data)
    if not images:
        raise ValueError(f"{folder}: no image to measure with; give a folder that contains images, at any depth")
    return images


# ---- quality ------------------------------------------------------------------------------------------------------


def measure_quality(
    images: Sequence[bytes], rounds: int, similarity: Similarity
) -> tuple[list[StoredQuality], dict[str, Spread]]:
    """Measures every combination of filter, quality and subsampling.

    Returns:
        A row per combination; and per filter the mean absolute difference to the reference in pixel values 0-255,
        before encoding.
    """
    kinds: list[Kind] = list(product(FILTERS, QUALITIES, SUBSAMPLINGS))
    jpegs: dict[Kind, list[bytes]] = {kind: [] for kind in kinds}
    psnr_db: dict[Kind, list[float]] = {kind: [] for kind in kinds}
    ssim: dict[Kind, list[float]] = {kind: [] for kind in kinds}
    differences: dict[str, list[float]] = {name: [] for name in FILTERS}
    with Progress("quality", len(images)) as progress:
        for data in images:
            resized, reference = _resized_and_reference(data)
            for name, pixels in resized.items():
                differences[name].append(float(np.abs(pixels - reference).mean()))
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
        StoredQuality(
            *kind,
            mean_kb=mean(map(len, jpegs[kind])) / 1000,
            decode_img_s=1000 / decode_ms[kind],
            psnr_db=Spread(mean(psnr_db[kind]), min(psnr_db[kind])),
            ssim=Spread(mean(ssim[kind]), min(ssim[kind])),
        )
        for kind in kinds
    ]
    return rows, {name: Spread(mean(values), max(values)) for name, values in differences.items()}


def _resized_and_reference(data: bytes) -> tuple[dict[str, NDArray[np.uint8]], NDArray[np.float64]]:
    """The image resized by each filter as the shards store it, and by the reference, both (H, W, 3)."""
    decoded = decode(data, DEFAULT)
    resized = {name: resize(decoded, ResizeSettings(filter=name)) for name in FILTERS}
    height, width, _ = resized[FILTERS[0]].shape
    with Image.open(BytesIO(data)) as image:
        whole = np.asarray(image.convert("RGB"))
    return resized, lanczos_reference(whole, (width, height)).clip(0, 255)


def lanczos_reference(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.float64]:
    """Resizes by Lanczos-3 in float64, without rounding or clipping.

    Antialiased as Pillow defines it: when the image shrinks, the kernel is wider by the same factor.

    Args:
        pixels: uint8 (H, W, 3).
        size: Width and height of the result.

    Returns:
        float64 (height, width, 3).
    """
    rows = _lanczos_weights(pixels.shape[0], size[1])
    columns = _lanczos_weights(pixels.shape[1], size[0])
    narrow: NDArray[np.float64] = np.einsum("yxc,wx->ywc", pixels.astype(np.float64), columns, optimize=True)
    resized: NDArray[np.float64] = np.einsum("hy,ywc->hwc", rows, narrow, optimize=True)
    return resized


def _lanczos_weights(before: int, after: int) -> NDArray[np.float64]:
    """(after, before): the weight of each old pixel in each new one; every row sums to 1."""
    scale = before / after
    centres = (np.arange(after) + 0.5) * scale
    distance = (np.arange(before) + 0.5 - centres[:, None]) / max(scale, 1.0)
    inside = np.abs(distance) < LANCZOS_LOBES
    weights = np.where(inside, np.sinc(distance) * np.sinc(distance / LANCZOS_LOBES), 0.0)
    normalised: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return normalised


def structural_similarity() -> Similarity:
    """SSIM of two images (H, W, 3) in pixel values 0-255: windows of 7 x 7 pixels, mean of the channels."""
    try:
        from skimage import metrics
    except ImportError as error:
        raise ValueError("scikit-image is not installed; run: pip install -e '.[bench]'") from error
    return lambda one, other: float(metrics.structural_similarity(one, other, channel_axis=2, data_range=255))


def _decode_ms(jpegs: dict[Kind, list[bytes]], rounds: int) -> dict[Kind, float]:
    """CPU milliseconds to decode an image of each kind whole, median over rounds."""
    windows: dict[Kind, list[float]] = {kind: [] for kind in jpegs}
    with Progress("decoding", rounds, "rounds") as progress:
        for _ in range(rounds):
            for kind, encoded in jpegs.items():
                windows[kind].append(cpu_ms(lambda jpeg: simplejpeg.decode_jpeg(jpeg, "RGB"), encoded))
            progress(1)
    return {kind: median(window) for kind, window in windows.items()}


# ---- speed --------------------------------------------------------------------------------------------------------


def measure_speed(images: Sequence[bytes], rounds: int) -> tuple[dict[str, Speed], dict[str, float]]:
    """Measures ours and the baselines, interleaved so that background load affects all of them equally.

    Each job transcodes all images in every round. pipeline/profiling/throughput.py is not used: its windows end after
    a fixed time, so that jobs would transcode different images.

    Returns:
        Speed of each job; and CPU milliseconds per image of each stage of ours.
    """
    windows: dict[str, list[float]] = {name: [] for name in JOBS}
    stages: list[tuple[float, float, float]] = []
    with Progress("speed", rounds, "rounds") as progress:
        for _ in range(rounds):
            for name, job in JOBS.items():
                windows[name].append(cpu_ms(job, images))
            stages.append(_stages_ms(images))
            progress(1)
    speeds = {}
    for name, window in windows.items():
        ratios = {ours: [b / a for a, b in zip(windows[ours], window, strict=True)] for ours in OURS}
        speeds[name] = Speed(median(window), {o: Ratio(median(r), min(r), max(r)) for o, r in ratios.items()})
    names = ("decode", "resize", "encode")
    return speeds, {name: median(stage) for name, stage in zip(names, zip(*stages, strict=True), strict=True)}


def cpu_ms(job: Callable[[bytes], object], items: Sequence[bytes]) -> float:
    """CPU milliseconds that this process spends on `job` per item."""
    start_s = time.process_time()
    for item in items:
        job(item)
    return 1000 * (time.process_time() - start_s) / len(items)


def _stages_ms(images: Iterable[bytes]) -> tuple[float, float, float]:
    """CPU milliseconds per image to decode, to resize and to encode."""
    spent_s = []
    for data in images:
        start_s = time.process_time()
        decoded = decode(data, DEFAULT)
        decoded_s = time.process_time()
        resized = resize(decoded, DEFAULT)
        resized_s = time.process_time()
        encode(resized, DEFAULT)
        spent_s.append((decoded_s - start_s, resized_s - decoded_s, time.process_time() - resized_s))
    decode_s, resize_s, encode_s = np.mean(spent_s, axis=0)
    return 1000 * decode_s, 1000 * resize_s, 1000 * encode_s


def _transcode_with_pillow(data: bytes, kernel: Image.Resampling, shortcuts: bool) -> bytes:
    """Transcodes with Pillow alone. `shortcuts` uses the options that Pillow has to make it faster."""
    with Image.open(BytesIO(data)) as image:
        scale = DEFAULT.short_side / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        if shortcuts:
            image.draft("RGB", size)
        small = image.convert("RGB").resize(size, kernel, reducing_gap=2.0 if shortcuts else None)
        out = BytesIO()
        small.save(out, "JPEG", quality=DEFAULT.quality, subsampling=DEFAULT.subsampling)
        return out.getvalue()


_PILLOW_LANCZOS = partial(_transcode_with_pillow, kernel=Image.Resampling.LANCZOS)
OURS = {f"ours, {name}": ResizeSettings(filter=name) for name in ("bicubic", "lanczos")}
JOBS: dict[str, Callable[[bytes], object]] = {
    **{name: partial(transcode, settings=settings) for name, settings in OURS.items()},
    "Pillow, lanczos": partial(_PILLOW_LANCZOS, shortcuts=False),
    "Pillow, lanczos, draft and reducing_gap 2": partial(_PILLOW_LANCZOS, shortcuts=True),
    "Pillow, bicubic": partial(_transcode_with_pillow, kernel=Image.Resampling.BICUBIC, shortcuts=False),
}
