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
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from typing import Any

import numba
import numpy as np
import simplejpeg

from pipeline.files import published
from pipeline.shards.reader import ShardSet, open_shards
from pipeline.workers import ProgressCallback, Workers

EIGENBASIS_FILE = "eigenbasis.json"
MEAN_IMAGE_FILE = "mean_image.npy"
PIXEL_SCALE = 255
MEAN_IMAGE_SIDE = 256  # pixels
IMAGES_PER_JOB = 256  # small enough to balance load between workers, large enough to hide the cost of a job

# What photographs have; `check` warns about data outside these ranges.
MAX_DEGREES_FROM_GREY = 15
CHANNEL_STDEV_RANGE = (40, 100)


READ_ONLY_PIXELS = numba.types.Array(numba.uint8, 2, "C", readonly=True)  # writable arrays are accepted, too
ADD_PIXELS_SIGNATURE = numba.void(READ_ONLY_PIXELS, numba.int64[::1], numba.int64[:, ::1])

READ_ONLY_VALUES = numba.types.Array(numba.uint8, 1, "C", readonly=True)
ADD_SQUARE_SIGNATURE = numba.void(READ_ONLY_VALUES, numba.int64, numba.int64, numba.int64[:, ::1])


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
    image_sums = np.zeros((side, side, 3), np.int64)
    for image in images:
        flat = np.ascontiguousarray(image).reshape(-1, 3)
        _add_pixels(flat, sums, products)
        top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
        _add_square(
            flat.reshape(-1), image.shape[1] * 3, (top * image.shape[1] + left) * 3, image_sums.reshape(side, -1)
        )
        count += 1
        pixels += len(flat)
    return Moments(count, pixels, sums, products, image_sums)


@numba.njit(ADD_PIXELS_SIGNATURE, cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _add_pixels(pixels: np.ndarray, sums: np.ndarray, products: np.ndarray) -> None:
    """Adds uint8 (N, 3) pixels to `sums` and `products` in one pass, in exact integers."""
    r_sum = g_sum = b_sum = rr = rg = rb = gg = gb = bb = np.int64(0)
    for i in range(len(pixels)):
        r, g, b = np.int64(pixels[i, 0]), np.int64(pixels[i, 1]), np.int64(pixels[i, 2])
        r_sum += r
        g_sum += g
        b_sum += b
        rr += r * r
        rg += r * g
        rb += r * b
        gg += g * g
        gb += g * b
        bb += b * b
    for channel, value in enumerate((r_sum, g_sum, b_sum)):
        sums[channel] += value
    for row, values in enumerate(((rr, rg, rb), (rg, gg, gb), (rb, gb, bb))):
        for column, value in enumerate(values):
            products[row, column] += value


@numba.njit(ADD_SQUARE_SIGNATURE, cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _add_square(values: np.ndarray, stride: int, start: int, totals: np.ndarray) -> None:
    """Adds the square whose first value is at `start` of an image with `stride` values per row to `totals`."""
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
    starts = range(0, len(shards), IMAGES_PER_JOB)
    jobs = [np.arange(start, min(start + IMAGES_PER_JOB, len(shards))) for start in starts]
    total = moments_of([])
    for part in workers.map(_moments_of_ids, repeat(shards.folder), repeat(shards.manifest_sha256), jobs):
        total = total + part
        progress(part.images)
    return eigenbasis_of(total, shards.manifest_sha256)


def _moments_of_ids(folder: Path, manifest_sha256: str, ids: np.ndarray) -> Moments:
    """One job: the moments of some samples. Runs in a worker."""
    return moments_of(_decode(jpeg) for jpeg in _open_cached(folder, manifest_sha256).jpegs(ids))


@lru_cache(maxsize=1)  # so that a worker opens the set once, not once per job
def _open_cached(folder: Path, manifest_sha256: str) -> ShardSet:
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
