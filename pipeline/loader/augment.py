"""Crop, mirroring and PCA lighting noise of one sample, and their plain NumPy reference. NumPy only.

PCA (principal component analysis) lighting noise adds one random RGB offset to all pixels of an image, along the
eigenvectors of the training set's RGB covariance. All random numbers are pure functions of (seed, epoch, sample id).
Pixel values are 0-255. A training image is

    (crop - mean + offset) / divisor      float32 (3, 224, 224), RGB

where the crop is taken from the central 256 x 256 pixels of the stored image and mirrored with probability 1/2. Every
backend of the loader is tested against `reference_train` and `reference_views`.

Sources: "paper section N" is a section of Krizhevsky et al., NIPS 2012; convdata_jpeg.py is a file of the code that
the authors released.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from pipeline.philox import Purpose, below, normals, words_for

if TYPE_CHECKING:
    from pipeline.rgb_pca import Eigenbasis
STORED = 256  # side, in pixels, of the central square from which crops are taken (paper section 2)
CROP = 224  # side of a crop, in pixels (paper section 4.1)
BORDER = (STORED - CROP) // 2
# Crop offsets in each direction: the released code draws 0 to 32 (convdata_jpeg.py); the 2048 variants of paper
# section 4.1 need 32 offsets.
POSITIONS = STORED - CROP + 1
# (top, left) of the evaluation crops in the central square: four corners and the centre (paper section 4.1). The ten
# views are these five, then the same five mirrored.
VIEW_ORIGINS = ((0, 0), (0, 2 * BORDER), (BORDER, BORDER), (2 * BORDER, 0), (2 * BORDER, 2 * BORDER))
LightingConvention = Literal["source2012", "paper", "none"]
Mean = Literal["image", "channel"]
Floats = NDArray[np.float32]
Side = TypeVar("Side", int, NDArray[np.int64])


@dataclass(frozen=True)
class Draws:
    """The random numbers of N samples in one epoch.

    Attributes:
        left: (N,) horizontal crop offset in the central square, in pixels.
        top: (N,) vertical crop offset in the central square, in pixels.
        mirror: (N,) whether the crop is mirrored horizontally.
        normals: (N, 3) standard normals of the lighting noise, one for each eigenvector.
    """

    left: NDArray[np.int64]
    top: NDArray[np.int64]
    mirror: NDArray[np.bool_]
    normals: Floats


def draw(seed: int, epoch: int, ids: NDArray[np.int64], positions: int = POSITIONS) -> Draws:
    """Draws the random numbers of the samples `ids` (N,): crop offsets are uniform over 0 to `positions` - 1."""
    crop_words = words_for(ids, epoch, Purpose.CROP, seed)
    lighting_words = words_for(ids, epoch, Purpose.LIGHTING, seed)
    return Draws(
        left=below(crop_words[:, 0], positions),
        top=below(crop_words[:, 1], positions),
        mirror=below(crop_words[:, 2], 2).astype(np.bool_),
        normals=normals(lighting_words)[:, :3],
    )


@dataclass(frozen=True)
class Lighting:
    """PCA lighting noise: an RGB offset along the eigenvectors p_j, from three normals z_j for each image and epoch.

    Attributes:
        convention: how the offset is scaled.
            `source2012`: offset = coefficient * sum of z_j * stdev_j * p_j, and the image is then divided by
            1 + coefficient (convdata_jpeg.py; the released code names the weights `color_stdevs`).
            `paper`: offset = coefficient * sum of z_j * eigenvalue_j * p_j on pixel values 0-1 (paper section 4.1),
            about half as strong along p_1. No division.
            `none`: no noise and no division; a coefficient of 0 means the same.
        coefficient: 0.1 in both sources.

    Raises:
        ValueError: the convention is unknown or the coefficient is outside its range.
    """

    convention: LightingConvention = "source2012"
    coefficient: float = 0.1

    def __post_init__(self) -> None:
        choices = get_args(LightingConvention)
        if self.convention not in choices:
            raise ValueError(f"lighting convention is {self.convention!r}; choose one of {', '.join(choices)}")
        if not 0 <= self.coefficient < 10:
            raise ValueError(f"lighting coefficient is {self.coefficient}; it must be from 0 to 10 (both sources: 0.1)")

    def offsets_and_divisor(self, normals: Floats, basis: Eigenbasis) -> tuple[Floats, float]:
        """Computes the noise of N images.

        Args:
            normals: (N, 3) standard normals.
            basis: eigenvectors, and eigenvalues in 0-255 units.

        Returns:
            RGB offsets (N, 3) in pixel values 0-255, and the number by which the images are divided.
        """
        if self.convention == "none" or self.coefficient == 0:
            return np.zeros_like(normals), 1.0
        if self.convention == "source2012":
            scale, divisor = basis.stdevs, 1.0 + self.coefficient
        else:  # eigenvalues of 0-1 pixels are 255**2 times smaller, and offsets in 0-255 units are 255 times larger
            scale, divisor = basis.eigenvalues / 255, 1.0
        offsets = self.coefficient * (normals * scale) @ basis.eigenvectors.T
        return offsets.astype(np.float32), divisor


def mean_of(basis: Eigenbasis, mean: Mean) -> Floats:
    """The mean that is subtracted from every crop: (3, 1, 1) for "channel", (3, 224, 224) for "image".

    "image" is the centre of the mean image. It does not depend on the position of the crop, and it is not mirrored
    with the crop (convdata_jpeg.py:95, 209).
    """
    if mean == "channel":
        return basis.mean.astype(np.float32)[:, None, None]
    return basis.mean_image[:, BORDER : BORDER + CROP, BORDER : BORDER + CROP]


def central_origin(side: Side) -> Side:
    """The first row (or column) of the central 256 out of `side` pixels; an odd surplus pixel is left at the end."""
    return (side - STORED) // 2


def _crop(pixels: NDArray[np.uint8], top: int, left: int, mirror: bool) -> Floats:
    height, width, _ = pixels.shape
    y, x = central_origin(height) + top, central_origin(width) + left
    crop = pixels[y : y + CROP, x : x + CROP].transpose(2, 0, 1).astype(np.float32)
    return crop[:, :, ::-1] if mirror else crop


def reference_train(
    pixels: NDArray[np.uint8], top: int, left: int, mirror: bool, offset: Floats, divisor: float, mean: Floats
) -> Floats:
    """The training image that the loader must make of a stored image.

    Args:
        pixels: uint8 (H, W, 3), both sides at least 256.
        top: first row of the crop in the central square.
        left: first column of the crop in the central square.
        mirror: whether the crop is mirrored.
        offset: (3,) lighting noise, from `Lighting.offsets_and_divisor`.
        divisor: from `Lighting.offsets_and_divisor`.
        mean: from `mean_of`.

    Returns:
        float32 (3, 224, 224).
    """
    normalised = (_crop(pixels, top, left, mirror) - mean + offset[:, None, None]) / np.float32(divisor)
    return np.ascontiguousarray(normalised)


def reference_views(pixels: NDArray[np.uint8], mean: Floats, views: int) -> Floats:
    """The evaluation views of a stored image, float32 (views, 3, 224, 224): 1 (centre) or 10 (paper section 4.1)."""
    if views == 1:
        return _crop(pixels, BORDER, BORDER, False)[None] - mean
    assert views == 2 * len(VIEW_ORIGINS)
    return np.stack([_crop(pixels, *origin, mirror) for mirror in (False, True) for origin in VIEW_ORIGINS]) - mean
