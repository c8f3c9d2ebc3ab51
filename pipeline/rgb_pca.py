"""RGB moments of a shard set: mean, mean image, covariance and its eigenbasis, exact and in 0..255 pixel units.

`measure` decodes every pixel of every stored picture. Sums are kept as integers, so any number of workers and any
grouping of the work gives the same bits. The result is two files beside each other:

    eigenbasis.json    pixel_scale 255, pixels, mean [R,G,B], covariance 3x3, eigenvalues (descending), stdevs (their
                       square roots), eigenvectors (COLUMNS), manifest_sha256 of the shard set
    mean_image.npy     float32 (3, 256, 256): the mean of every picture's central 256 x 256 part

Sources: P 4.1 (PCA of the RGB values over the training set); convdata.py (per-pixel mean image, `color_stdevs`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.files import published
from pipeline.shards.reader import ShardSet, open_shards
from pipeline.workers import Workers

PIXEL_SCALE = 255
SIDE = 256
MEAN_IMAGE = "mean_image.npy"
CHUNK = 256  # pictures in one job: small enough to share work out, large enough to forget the hand-over


@dataclass(frozen=True)
class Moments:
    """Integer sums over pictures: `sums` (3,), `products` (3, 3) over all pixels; `image_sums` (256, 256, 3) over
    central squares. int64 holds them for 1.4e14 pixels, ImageNet at short side 256 has 1.1e11."""

    pictures: int
    pixels: int
    sums: np.ndarray
    products: np.ndarray
    image_sums: np.ndarray

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.pictures + other.pictures,
            self.pixels + other.pixels,
            self.sums + other.sums,
            self.products + other.products,
            self.image_sums + other.image_sums,
        )


@dataclass(frozen=True)
class Eigenbasis:
    """The eigenbasis of RGB pixels in 0..255 units; arrays are float64, `mean_image` float32 (3, 256, 256)."""

    pixels: int
    mean: np.ndarray
    covariance: np.ndarray
    eigenvalues: np.ndarray
    eigenvectors: np.ndarray
    mean_image: np.ndarray
    manifest_sha256: str

    @property
    def stdevs(self) -> np.ndarray:
        """Standard deviations along the eigenvectors, grey levels: square roots of the eigenvalues."""
        roots: np.ndarray = np.sqrt(self.eigenvalues)
        return roots


def moments_of(pictures: Iterable[np.ndarray]) -> Moments:
    """Sums over pictures, each uint8 (H, W, 3) with H and W at least 256."""
    count = pixels = 0
    sums, products = np.zeros(3, np.int64), np.zeros((3, 3), np.int64)
    image_sums = np.zeros((SIDE, SIDE, 3), np.int64)
    for picture in pictures:
        flat = picture.reshape(-1, 3).astype(np.float64)
        assert len(flat) < 2**53 // 255**2  # below it every float64 partial sum is an exact integer
        sums += flat.sum(axis=0).astype(np.int64)
        products += (flat.T @ flat).astype(np.int64)
        top, left = (picture.shape[0] - SIDE) // 2, (picture.shape[1] - SIDE) // 2
        image_sums += picture[top : top + SIDE, left : left + SIDE]
        count += 1
        pixels += len(flat)
    return Moments(count, pixels, sums, products, image_sums)


def eigenbasis_of(moments: Moments, manifest_sha256: str) -> Eigenbasis:
    """The eigenbasis from exact sums. Signs: the first vector is positive, the others' last component is."""
    mean = moments.sums / moments.pixels
    # in Python integers n * products - outer(sums, sums) is exact; float64 would lose the small eigenvalues' digits
    n, sums, products = moments.pixels, moments.sums.tolist(), moments.products.tolist()
    covariance = np.array([[(n * products[i][j] - sums[i] * sums[j]) / (n * n) for j in range(3)] for i in range(3)])
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    eigenvalues, eigenvectors = eigenvalues[::-1].clip(min=0.0), eigenvectors[:, ::-1]
    signs = np.where(eigenvectors[2] < 0, -1.0, 1.0)
    signs[0] = np.sign(eigenvectors[:, 0].sum()) or 1.0
    image = (moments.image_sums / moments.pictures).transpose(2, 0, 1).astype(np.float32)
    return Eigenbasis(moments.pixels, mean, covariance, eigenvalues, eigenvectors * signs, image, manifest_sha256)


def measure(shards: ShardSet, workers: Workers, progress: Callable[[int], None]) -> Eigenbasis:
    """Decodes the whole set; `progress` counts pictures."""
    chunks = [np.arange(start, min(start + CHUNK, len(shards))) for start in range(0, len(shards), CHUNK)]
    total = moments_of([])
    for part in workers.map(_chunk_moments, repeat(shards.folder), repeat(shards.manifest_sha256), chunks):
        total = total + part
        progress(part.pictures)
    return eigenbasis_of(total, shards.manifest_sha256)


def _chunk_moments(folder: Path, manifest_sha256: str, ids: np.ndarray) -> Moments:
    return moments_of(_decode(jpeg) for jpeg in _opened(folder, manifest_sha256).jpegs(ids))


@lru_cache(maxsize=1)  # a worker opens the set once
def _opened(folder: Path, manifest_sha256: str) -> ShardSet:
    shards = open_shards(folder)
    if shards.manifest_sha256 != manifest_sha256:
        raise ValueError(f"{folder}: made anew while it was read; run the same command again")
    return shards


def _decode(jpeg: np.ndarray) -> np.ndarray:
    with Image.open(BytesIO(jpeg.data)) as image:
        return np.asarray(image)


def check(basis: Eigenbasis) -> list[str]:
    """Asserts the mathematics (orthonormal vectors, covariance recomposed) and returns warnings about the data:
    each a line on a way in which it looks unlike photographs; none for ImageNet."""
    vectors = basis.eigenvectors
    assert np.allclose(vectors.T @ vectors, np.eye(3), atol=1e-12), "eigenvectors are not orthonormal"
    recomposed = vectors @ np.diag(basis.eigenvalues) @ vectors.T
    assert np.allclose(recomposed, basis.covariance, rtol=1e-9, atol=1e-9), "covariance is not recomposed"
    warnings = []
    if (basis.covariance[np.triu_indices(3, 1)] <= 0).any():
        warnings.append("channels are not positively correlated, which photographs' are: is this RGB?")
    grey = np.degrees(np.arccos(min(1.0, abs(vectors[:, 0].sum()) / np.sqrt(3))))
    if grey > 15:
        warnings.append(f"the first eigenvector is {grey:.0f} degrees from grey, photographs' about 2")
    channel_stdevs = np.sqrt(np.diag(basis.covariance))
    if not ((channel_stdevs > 40) & (channel_stdevs < 100)).all():
        warnings.append(f"channel deviations {channel_stdevs.round(1).tolist()} grey levels, photographs' are 60 to 80")
    return warnings


def record(basis: Eigenbasis) -> dict[str, Any]:
    """What eigenbasis.json holds."""
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


def save(basis: Eigenbasis, path: Path) -> None:
    """Writes `path` (JSON) and, beside it, mean_image.npy; the JSON last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with published(path.with_name(MEAN_IMAGE)) as file:
        np.save(file, basis.mean_image)
    with published(path) as file:
        file.write((json.dumps(record(basis), indent=1) + "\n").encode())


def load(path: Path, shards: ShardSet) -> Eigenbasis:
    """Reads `save`'s files; ValueError where they are missing, not ours, or of another shard set than `shards`."""
    remedy = f"run: python tools/compute_pca.py {shards.folder}"
    if not path.is_file():
        raise ValueError(f"{path}: no eigenbasis here; {remedy}")
    try:
        fields = json.loads(path.read_text())
        arrays = {name: np.array(fields[name]) for name in ("mean", "covariance", "eigenvalues", "eigenvectors")}
        basis = Eigenbasis(
            fields["pixels"],
            mean_image=np.load(path.with_name(MEAN_IMAGE)),
            manifest_sha256=fields["manifest_sha256"],
            **arrays,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not an eigenbasis with its {MEAN_IMAGE} ({error}); {remedy}") from error
    if basis.manifest_sha256 != shards.manifest_sha256:
        raise ValueError(f"{path}: made of another shard set than {shards.folder} (their manifests differ); {remedy}")
    return basis
