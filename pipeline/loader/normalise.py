"""Mirrors and normalises uint8 crops in torch, on any device: the arithmetic of `cpu_kernel.mirror_normalize`.

    images = (crops - mean - residual) * (1 / std)      mirrored first if `mirror` is 1

On the GPU the loader does this after DALI has decoded and cropped. Ranks of a pair swap the uint8 crops, a quarter of
the bytes of float32 images, and normalise after the swap. On the CPU the compiled operator is faster; a test compares
the two bit by bit. Nothing here makes the host wait for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.loader.augment import BORDER, CROP, VIEW_ORIGINS

MIRROR, MEAN, STD = 0, slice(1, 4), 4  # columns of `rows`
COLUMNS = 5


def rows_of(arrays: Mapping[str, NDArray[Any]], samples: int) -> NDArray[np.float32]:
    """What is drawn for each sample as float32 (N, 5): mirror (0 or 1), mean of red, green and blue, std.

    Args:
        arrays: inputs by name: `mean` and `std` float32 (N, 3), with one std for all channels; `mirror` int32 (N, 1),
            or none for views.
        samples: N.
    """
    rows = np.zeros((samples, COLUMNS), np.float32)
    if "mirror" in arrays:
        rows[:, MIRROR] = arrays["mirror"][:, 0]
    rows[:, MEAN], rows[:, STD] = arrays["mean"], arrays["std"][:, 0]
    return rows


def mirror_normalise(crops: Tensor, rows: Tensor, residual: Tensor) -> Tensor:
    """Returns the images float32 (N, 3, H, W).

    Args:
        crops: uint8 (N, H, W, 3).
        rows: float32 (N, 5), from `rows_of`.
        residual: float32 (3, H, W), the mean image minus the channel means.
    """
    mirror = rows[:, MIRROR].bool()[:, None, None, None]
    pixels = torch.where(mirror, crops.flip(2), crops).permute(0, 3, 1, 2)
    images = torch.empty(pixels.shape, dtype=torch.float32, device=crops.device)  # NCHW, whatever the order of `pixels`
    torch.sub(pixels, rows[:, MEAN, None, None], out=images)
    # One operation after the other, as in the compiled operator: another order would change last bits.
    return images.sub_(residual).mul_(rows[:, STD].reciprocal()[:, None, None, None])


def normalised_views(squares: Tensor, rows: Tensor, residual: Tensor, views: int) -> Tensor:
    """Returns the evaluation views float32 (N, views, 3, 224, 224), in the order of `augment.reference_views`.

    Args:
        squares: uint8 (N, 256, 256, 3), the central squares.
        rows: float32 (N, 5), from `rows_of`.
        residual: float32 (3, 224, 224).
        views: 1 or 10.
    """
    origins = VIEW_ORIGINS if views == 10 else ((BORDER, BORDER),)
    crops = [squares[:, top : top + CROP, left : left + CROP] for top, left in origins]
    mirrored = rows.clone()
    mirrored[:, MIRROR] = 1
    variants = (rows, mirrored) if views == 10 else (rows,)
    return torch.stack([mirror_normalise(crop, each, residual) for each in variants for crop in crops], dim=1)
