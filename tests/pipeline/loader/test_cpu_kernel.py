"""The compiled cast of a crop against NumPy doing the same plainly."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.loader.cpu_kernel import light


@pytest.mark.parametrize("mirror", [0, 1])
@pytest.mark.parametrize("side", [1, 15, 16, 33, 224])
def test_a_crop_is_mirrored_lit_and_cast(mirror: int, side: int):
    """For widths within and beyond a vector's: what NumPy gives, to the last bit where nothing is divided."""
    rng = np.random.default_rng(side)
    crop = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    mean, residual = rng.normal(120, 9, 3).astype(np.float32), rng.normal(0, 9, (3, side, side)).astype(np.float32)
    out = np.full((3, side, side), np.nan, np.float32)
    planes = (crop[:, ::-1] if mirror else crop).transpose(2, 0, 1).astype(np.float32)
    for divisor in (1.0, 1.1):
        std = np.full(3, divisor, np.float32)
        light(out, crop, np.array([mirror], np.int32), mean, std, residual)
        plain = (planes - mean[:, None, None] - residual) / np.float32(divisor)
        if divisor == 1:
            np.testing.assert_array_equal(out, plain)
        else:
            np.testing.assert_allclose(out, plain, rtol=3e-7)
