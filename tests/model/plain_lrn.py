"""Local response normalisation (LRN) in plain NumPy loops, to test the fast one against."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from model.recipe import LocalResponseNorm

Array = NDArray[np.float64]


def plain_lrn_across_maps(x: Array, norm: LocalResponseNorm) -> Array:
    """The formula of paper section 3.3, feature map by feature map, with alpha on every term."""
    out = np.empty_like(x)
    for i in range(x.shape[1]):
        near = range(max(0, i - norm.window // 2), min(x.shape[1], i + norm.window // 2 + 1))
        out[:, i] = x[:, i] / (norm.k + norm.alpha * sum(x[:, j] ** 2 for j in near)) ** norm.beta
    return out


def plain_lrn_within_map(x: Array, norm: LocalResponseNorm) -> Array:
    """The same formula over 2-D windows of pixels, pixel by pixel."""
    out, half = np.empty_like(x), norm.window // 2
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            window = x[:, :, max(0, i - half) : i + half + 1, max(0, j - half) : j + half + 1]
            out[:, :, i, j] = x[:, :, i, j] / (norm.k + norm.alpha * (window**2).sum((2, 3))) ** norm.beta
    return out
