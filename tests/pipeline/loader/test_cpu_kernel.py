"""The compiled operator of the CPU backend against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.loader.cpu_kernel import mirror_normalize


@pytest.mark.parametrize("mirror", [0, 1])
@pytest.mark.parametrize("side", [1, 15, 16, 33, 224])
def test_a_crop_is_mirrored_and_normalised(mirror: int, side: int):
    """Rows shorter and longer than a vector register equal NumPy's result, bit for bit if the divisor is 1."""
    rng = np.random.default_rng(side)
    crop = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    mean, residual = rng.normal(120, 9, 3).astype(np.float32), rng.normal(0, 9, (3, side, side)).astype(np.float32)
    out = np.full((3, side, side), np.nan, np.float32)
    planes = (crop[:, ::-1] if mirror else crop).transpose(2, 0, 1).astype(np.float32)
    for divisor in (1.0, 1.1):
        std = np.full(3, divisor, np.float32)
        mirror_normalize(out, crop, np.array([mirror], np.int32), mean, std, residual)
        plain = (planes - mean[:, None, None] - residual) / np.float32(divisor)
        if divisor == 1:
            np.testing.assert_array_equal(out, plain)
        else:
            np.testing.assert_allclose(out, plain, rtol=3e-7)
