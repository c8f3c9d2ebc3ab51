"""Principal component analysis (PCA) of the RGB values of a shard set, for PCA lighting noise; and the mean image.

`measure` decodes every stored image. All results are in pixel values 0-255. Sums are kept as exact integers, so any
number of workers gives the same bits. The result is two files in one folder:

    eigenbasis.json    pixel_scale 255, pixels, mean [R,G,B], covariance 3x3, eigenvalues (descending), stdevs (their
                       square roots), eigenvectors (COLUMNS), manifest_sha256 of the shard set
    mean_image.npy     float32 (3, 256, 256): the mean of every image's central 256 x 256 part

Sources: paper section 4.1 (PCA of the RGB values over the training set); convdata.py of the released 2012 code
(per-pixel mean image, `color_stdevs`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from typing import Any, TypeVar

import numba
import numpy as np
import simplejpeg

from pipeline.compiled import njit
from pipeline.files import published
from pipeline.shards.reader import ShardSet, open_shards
from pipeline.workers import ProgressCallback, Workers

Result = TypeVar("Result")

EIGENBASIS_FILE = "eigenbasis.json"
MEAN_IMAGE_FILE = "mean_image.npy"
PIXEL_SCALE = 255
MEAN_IMAGE_SIDE = 256  # pixels
IMAGES_PER_JOB = 256  # at most: small enough to balance load between workers, large enough to hide the cost of a job
MIN_JOBS_PER_WORKER = 2  # in a small set, so that all workers have work; each job sends 0.4 MB of sums

# What photographs have; `check` warns about data outside these ranges.
MAX_DEGREES_FROM_GREY = 15
CHANNEL_STDEV_RANGE = (40, 100)


# Exact sums in narrow integers, so that one instruction adds many of them.
LANES = 192  # values of an image that are added side by side; a multiple of 3, so that a lane has one channel
MAX_PRODUCTS_IN_UINT32 = (2**32 - 1) // 255**2
MAX_IMAGES_IN_UINT16 = (2**16 - 1) // 255

READ_ONLY_VALUES = numba.types.Array(numba.uint8, 1, "C", readonly=True)  # writable arrays are accepted, too
ADD_PIXELS_SIGNATURE = numba.void(READ_ONLY_VALUES, numba.int64[::1], numba.int64[:, ::1])
ADD_SQUARE_SIGNATURE = numba.void(READ_ONLY_VALUES, numba.int64, numba.int64, numba.uint16[:, ::1])


@dataclass(frozen=True)
class Moments:
    """Exact integer sums over images. int64 suffices for 1.4e14 pixels; ImageNet at short side 256 has 1.1e11.

    Attributes:
        images: Number of images.
        pixels: Number of pixels of all images.
        sums: int64 (3,), sum of each channel over all pixels.
        products: int64 (3, 3), sum of the outer products of all pixels with themselves.
        image_sums: int64 (256, 256, 3), sum of the central squares.
    """

    images: int
    pixels: int
    sums: np.ndarray
    products: np.ndarray
    image_sums: np.ndarray

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.images + other.images,
            self.pixels + other.pixels,
            self.sums + other.sums,
            self.products + other.products,
            self.image_sums + other.image_sums,
        )


@dataclass(frozen=True)
class Eigenbasis:
    """The eigenbasis of RGB pixels in pixel values 0-255.

    Attributes:
        pixels: Number of pixels measured.
        mean: float64 (3,), mean of R, G and B.
        covariance: float64 (3, 3).
        eigenvalues: float64 (3,), of the covariance, in descending order.
        eigenvectors: float64 (3, 3), orthonormal COLUMNS in the order of `eigenvalues`.
        mean_image: float32 (3, 256, 256), mean of the central squares.
        manifest_sha256: Identifies the shard set that was measured.
    """

    pixels: int
    mean: np.ndarray
    covariance: np.ndarray
    eigenvalues: np.ndarray
    eigenvectors: np.ndarray
    mean_image: np.ndarray
    manifest_sha256: str

    @property
    def stdevs(self) -> np.ndarray:
        """Standard deviations along the eigenvectors in pixel values: square roots of the eigenvalues."""
        roots: np.ndarray = np.sqrt(self.eigenvalues)
        return roots


def moments_of(images: Iterable[np.ndarray]) -> Moments:
    """Sums over images, each uint8 (H, W, 3) with H and W at least 256."""
    count = pixels = 0
    sums, products = np.zeros(3, np.int64), np.zeros((3, 3), np.int64)
    side = MEAN_IMAGE_SIDE
    image_sums, newest_sums = np.zeros((side, side * 3), np.int64), np.zeros((side, side * 3), np.uint16)
    for image in images:
        height, width, _ = image.shape
        values = np.ascontiguousarray(image).reshape(-1)
        _add_pixels(values, sums, products)
        top, left = (height - side) // 2, (width - side) // 2
        _add_square(values, width * 3, (top * width + left) * 3, newest_sums)
        count += 1
        pixels += height * width
        if count % MAX_IMAGES_IN_UINT16 == 0:
            image_sums += newest_sums
            newest_sums[:] = 0
    return Moments(count, pixels, sums, products, (image_sums + newest_sums).reshape(side, side, 3))


@njit(ADD_PIXELS_SIGNATURE, nogil=True)
def _add_pixels(values: np.ndarray, sums: np.ndarray, products: np.ndarray) -> None:
    """Adds the pixels R, G, B, R, G, B, ... to `sums` and `products` in one pass, in exact integers.

    Multiplies each value by itself and by the next two, whatever its channel. A lane always has the same channel, so
    only the sums of the lanes need sorting: for R these products are RR, RG and RB; for G they are GG, GB and, of two
    pixels, GR, which is dropped; for B only BB is kept.
    """
    end = (len(values) - 2) // LANES * LANES
    for start in range(0, end, LANES * MAX_PRODUCTS_IN_UINT32):
        own, squares, by_next, by_second = np.zeros((4, LANES), np.uint32)
        for first in range(start, min(end, start + LANES * MAX_PRODUCTS_IN_UINT32), LANES):
            window = values[first : first + LANES + 2]
            for lane in range(LANES):
                value = np.uint32(window[lane])
                own[lane] += value
                squares[lane] += np.uint32(value * value)
                by_next[lane] += np.uint32(value * np.uint32(window[lane + 1]))
                by_second[lane] += np.uint32(value * np.uint32(window[lane + 2]))
        for lane in range(LANES):
            channel = lane % 3
            sums[channel] += own[lane]
            products[channel, channel] += squares[lane]
            if channel < 2:
                products[channel, channel + 1] += by_next[lane]
            if channel == 0:
                products[0, 2] += by_second[lane]
    for first in range(end, len(values), 3):
        for i in range(3):
            sums[i] += values[first + i]
            for j in range(i, 3):
                products[i, j] += np.int64(values[first + i]) * np.int64(values[first + j])
    for i in range(3):
        for j in range(i):
            products[i, j] = products[j, i]


@njit(ADD_SQUARE_SIGNATURE, nogil=True)
def _add_square(values: np.ndarray, stride: int, start: int, totals: np.ndarray) -> None:
    """Adds the square whose first value is at `start` of an image with `stride` values per row to `totals`.

    At most MAX_IMAGES_IN_UINT16 squares fit into `totals`.
    """
    for row in range(totals.shape[0]):
        first = start + row * stride
        line, total = values[first : first + totals.shape[1]], totals[row]
        for i in range(len(total)):
            total[i] += line[i]


def eigenbasis_of(moments: Moments, manifest_sha256: str) -> Eigenbasis:
    """The eigenbasis from exact sums.

    An eigenvector's sign is arbitrary. Here the components of the first vector have a positive sum, and the last
    component of each other vector is positive.
    """
    mean = moments.sums / moments.pixels
    # In Python integers, n * products - outer(sums, sums) is exact. In float64 it would cancel, and the small
    # eigenvalues would lose most of their digits.
    n, sums, products = moments.pixels, moments.sums.tolist(), moments.products.tolist()
    covariance = np.array([[(n * products[i][j] - sums[i] * sums[j]) / (n * n) for j in range(3)] for i in range(3)])
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    eigenvalues, eigenvectors = eigenvalues[::-1].clip(min=0.0), eigenvectors[:, ::-1]
    signs = np.where(eigenvectors[2] < 0, -1.0, 1.0)
    signs[0] = np.sign(eigenvectors[:, 0].sum()) or 1.0
    mean_image = (moments.image_sums / moments.images).transpose(2, 0, 1).astype(np.float32)
    return Eigenbasis(moments.pixels, mean, covariance, eigenvalues, eigenvectors * signs, mean_image, manifest_sha256)


def measure(shards: ShardSet, workers: Workers, progress: ProgressCallback) -> Eigenbasis:
    """Decodes the whole shard set. `progress` is called with the number of images done."""
    total = moments_of([])
    for part in map_samples(_moments_of_ids, shards, workers):
        total = total + part
        progress(part.images)
    return eigenbasis_of(total, shards.manifest_sha256)


def map_samples(job: Callable[[Path, str, np.ndarray], Result], shards: ShardSet, workers: Workers) -> Iterator[Result]:
    """Yields the results of `job(folder, manifest_sha256, ids)` for all samples, a few hundred ids in each job."""
    size = min(IMAGES_PER_JOB, -(-len(shards) // (MIN_JOBS_PER_WORKER * workers.count)))  # no set is empty
    ids = [np.arange(start, min(start + size, len(shards))) for start in range(0, len(shards), size)]
    return workers.map(job, repeat(shards.folder), repeat(shards.manifest_sha256), ids)


def _moments_of_ids(folder: Path, manifest_sha256: str, ids: np.ndarray) -> Moments:
    """One job: the moments of some samples. Runs in a worker."""
    assert len(ids) <= MAX_IMAGES_IN_UINT16
    moments = moments_of(_decode(jpeg) for jpeg in open_in_worker(folder, manifest_sha256).jpegs(ids))
    return replace(moments, image_sums=moments.image_sums.astype(np.uint16))  # a quarter of the bytes to send


@lru_cache(maxsize=1)  # so that a worker opens the set once, not once per job
def open_in_worker(folder: Path, manifest_sha256: str) -> ShardSet:
    """The shard set of a job. Raises ValueError if it is no longer the one that the caller opened."""
    shards = open_shards(folder)
    if shards.manifest_sha256 != manifest_sha256:
        raise ValueError(f"{folder}: the shard set was replaced while it was read; run the same command again")
    return shards


def _decode(jpeg: np.ndarray) -> np.ndarray:
    pixels: np.ndarray = simplejpeg.decode_jpeg(jpeg, "RGB")  # the same pixels as Pillow's, in less time
    return pixels


def check(basis: Eigenbasis) -> list[str]:
    """Checks the mathematics and compares the data with photographs.

    Asserts that the eigenvectors are orthonormal and that they recompose the covariance.

    Returns:
        Warnings, one line for each way in which the data is unlike photographs; none for ImageNet.
    """
    vectors = basis.eigenvectors
    assert np.allclose(vectors.T @ vectors, np.eye(3), atol=1e-12), "eigenvectors are not orthonormal"
    recomposed = vectors @ np.diag(basis.eigenvalues) @ vectors.T
    assert np.allclose(recomposed, basis.covariance, rtol=1e-9, atol=1e-9), "covariance is not recomposed"
    warnings = []
    if (basis.covariance[np.triu_indices(3, 1)] <= 0).any():
        warnings.append("the channels are not positively correlated, but those of photographs are: is this RGB?")
    degrees = np.degrees(np.arccos(min(1.0, abs(vectors[:, 0].sum()) / np.sqrt(3))))
    if degrees > MAX_DEGREES_FROM_GREY:
        warnings.append(f"the first eigenvector is {degrees:.0f} degrees from grey; for photographs it is about 2")
    stdevs = np.sqrt(np.diag(basis.covariance))
    if not ((stdevs > CHANNEL_STDEV_RANGE[0]) & (stdevs < CHANNEL_STDEV_RANGE[1])).all():
        warnings.append(
            f"the channels' standard deviations are {stdevs.round(1).tolist()} pixel values;"
            " for photographs they are 60 to 80"
        )
    return warnings


def record(basis: Eigenbasis) -> dict[str, Any]:
    """The content of eigenbasis.json."""
    return {
        "pixel_scale": PIXEL_SCALE,
        "pixels": basis.pixels,
        "mean": basis.mean.tolist(),
        "covariance": basis.covariance.tolist(),
        "eigenvalues": basis.eigenvalues.tolist(),
        "stdevs": basis.stdevs.tolist(),
        "eigenvectors": basis.eigenvectors.tolist(),
        "manifest_sha256": basis.manifest_sha256,
    }


def eigenbasis_path(folder: Path) -> Path:
    """Where the eigenbasis of the shard set in `folder` is, unless the user chose another place."""
    return folder / EIGENBASIS_FILE


def save(basis: Eigenbasis, path: Path) -> None:
    """Writes mean_image.npy into the folder of `path`, then the JSON to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with published(path.with_name(MEAN_IMAGE_FILE)) as file:
        np.save(file, basis.mean_image)
    with published(path) as file:
        file.write((json.dumps(record(basis), indent=1) + "\n").encode())


def load(path: Path, shards: ShardSet) -> Eigenbasis:
    """Reads the two files that `save` wrote.

    Args:
        path: The JSON file; mean_image.npy is in the same folder.
        shards: The shard set that the eigenbasis must belong to.

    Raises:
        ValueError: A file is missing or damaged, or belongs to another shard set.
    """
    remedy = f"run: python tools/compute_pca.py {shards.folder}"
    if not path.is_file():
        raise ValueError(f"{path}: no eigenbasis here; {remedy}")
    try:
        fields = json.loads(path.read_text())
        arrays = {name: np.array(fields[name]) for name in ("mean", "covariance", "eigenvalues", "eigenvectors")}
        basis = Eigenbasis(
            fields["pixels"],
            mean_image=np.load(path.with_name(MEAN_IMAGE_FILE)),
            manifest_sha256=fields["manifest_sha256"],
            **arrays,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not an eigenbasis with its {MEAN_IMAGE_FILE} ({error}); {remedy}") from error
    if basis.manifest_sha256 != shards.manifest_sha256:
        raise ValueError(f"{path}: made of another shard set than {shards.folder} (their manifests differ); {remedy}")
    return basis


def load_for(shards: ShardSet, path: Path | None = None) -> Eigenbasis:
    """The eigenbasis of `shards`, from `path` or, by default, from the shard set's own folder. Raises as `load`."""
    return load(path or eigenbasis_path(shards.folder), shards)
