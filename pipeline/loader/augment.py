"""Crop, mirroring and lighting of one sample, and their plain NumPy reference. NumPy only.

Every number drawn is a pure function of (seed, epoch, sample id). Pixels are in grey levels, 0..255; the maths is

    out = (crop of the picture's central 256 x 256, perhaps mirrored - mean + colour offset) / divisor

as float32 (3, 224, 224), RGB. Every backend of the feed is tested against `reference_train` and `reference_views`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from pipeline.philox import Purpose, below, normals, words_for

if TYPE_CHECKING:
    from pipeline.rgb_pca import Eigenbasis
STORED = 256  # side of the central square of which crops are taken (P 2)
CROP = 224  # side of a crop (P 4.1)
BORDER = (STORED - CROP) // 2
POSITIONS = STORED - CROP + 1  # 33: the released code draws offsets 0 to 32 (convdata_jpeg.py); P 4.1's 2048 needs 32
# The ten views' (top, left) in the central square: corners and centre, first as they are, then mirrored (P 4.1).
VIEW_ORIGINS = ((0, 0), (0, 2 * BORDER), (BORDER, BORDER), (2 * BORDER, 0), (2 * BORDER, 2 * BORDER))
Convention = Literal["source2012", "paper", "none"]
Mean = Literal["image", "channel"]
Floats = NDArray[np.float32]
Side = TypeVar("Side", int, NDArray[np.int64])


@dataclass(frozen=True)
class Draws:
    """Drawn for N samples: crop offsets `left`, `top` int64 (N,), `mirror` bool (N,), `normals` float32 (N, 3)."""

    left: NDArray[np.int64]
    top: NDArray[np.int64]
    mirror: NDArray[np.bool_]
    normals: Floats


def draw(seed: int, epoch: int, ids: NDArray[np.int64], positions: int = POSITIONS) -> Draws:
    """Draws for the samples `ids` (N,): offsets uniform over 0 to `positions` - 1, mirroring by a fair coin."""
    crop = words_for(ids, epoch, Purpose.CROP, seed)
    light = words_for(ids, epoch, Purpose.LIGHTING, seed)
    return Draws(
        left=below(crop[:, 0], positions),
        top=below(crop[:, 1], positions),
        mirror=below(crop[:, 2], 2).astype(np.bool_),
        normals=normals(light)[:, :3],
    )


@dataclass(frozen=True)
class Lighting:
    """Colour noise along the eigenvectors p_j of RGB pixels, one triple of standard normals z_j per picture and epoch.

    `source2012`: offset = coefficient * sum of z_j * stdev_j * p_j, then all is divided by 1 + coefficient
    (convdata_jpeg.py, weights named `color_stdevs`). `paper`: offset = coefficient * sum of z_j * eigenvalue_j * p_j on
    pixels of 0..1 (P 4.1), about half as strong on p_1. `none`, or coefficient 0: neither noise nor division.
    """

    convention: Convention = "source2012"
    coefficient: float = 0.1  # both sources

    def __post_init__(self) -> None:
        if self.convention not in get_args(Convention):
            raise ValueError(f"lighting convention {self.convention!r} is none of {', '.join(get_args(Convention))}")
        if not 0 <= self.coefficient < 10:
            raise ValueError(f"lighting coefficient {self.coefficient} is not within 0 to 10; both sources use 0.1")

    def colour(self, normals: Floats, basis: Eigenbasis) -> tuple[Floats, float]:
        """Colour offsets (N, 3) in grey levels, for normals (N, 3), and the divisor that goes with them."""
        if self.convention == "none" or self.coefficient == 0:
            return np.zeros_like(normals), 1.0
        if self.convention == "source2012":
            scale, divisor = basis.stdevs, 1.0 + self.coefficient
        else:  # eigenvalues of 0..1 pixels are 255**2 times smaller, and grey levels 255 times larger
            scale, divisor = basis.eigenvalues / 255, 1.0
        offsets = self.coefficient * (normals * scale) @ basis.eigenvectors.T
        return offsets.astype(np.float32), divisor


def mean_of(basis: Eigenbasis, mean: Mean) -> Floats:
    """What is subtracted from every crop: (3, 1, 1) for "channel", (3, 224, 224) for "image".

    "image" is the middle of the mean image wherever the crop lies, and never mirrored (convdata_jpeg.py:95, 209).
    """
    if mean == "channel":
        return basis.mean.astype(np.float32)[:, None, None]
    return basis.mean_image[:, BORDER : BORDER + CROP, BORDER : BORDER + CROP]


def central_origin(side: Side) -> Side:
    """First row (column) of the central 256 of `side` pixels; an odd pixel is left over at the end."""
    return (side - STORED) // 2


def _crop(pixels: NDArray[np.uint8], top: int, left: int, mirror: bool) -> Floats:
    height, width, _ = pixels.shape
    y, x = central_origin(height) + top, central_origin(width) + left
    crop = pixels[y : y + CROP, x : x + CROP].transpose(2, 0, 1).astype(np.float32)
    return crop[:, :, ::-1] if mirror else crop


def reference_train(
    pixels: NDArray[np.uint8], top: int, left: int, mirror: bool, offset: Floats, divisor: float, mean: Floats
) -> Floats:
    """What the feed must make of `pixels` (H, W, 3), both at least 256: float32 (3, 224, 224).

    `offset` (3,) and `divisor` come from `Lighting.colour`, `mean` from `mean_of`.
    """
    lit = (_crop(pixels, top, left, mirror) - mean + offset[:, None, None]) / np.float32(divisor)
    return np.ascontiguousarray(lit)


def reference_views(pixels: NDArray[np.uint8], mean: Floats, views: int) -> Floats:
    """The views a picture is judged by: float32 (views, 3, 224, 224); 1 is the centre, 10 is P 4.1's."""
    if views == 1:
        return _crop(pixels, BORDER, BORDER, False)[None] - mean
    assert views == 2 * len(VIEW_ORIGINS)
    return np.stack([_crop(pixels, *origin, mirror) for mirror in (False, True) for origin in VIEW_ORIGINS]) - mean
