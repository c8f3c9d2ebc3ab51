"""Mirroring and normalisation of a crop in one compiled pass, as an operator for DALI's CPU backend.

    out[c, y, x] = (crop[y, x, c] - mean[c] - residual[c, y, x]) / std[c]

If the crop is mirrored, x counts from the right on the side of the crop. The loader puts the PCA (principal component
analysis) lighting noise of a sample into `mean`. On the GPU `normalise.py` does this. DALI's own operator
processes one pixel at a time and takes 0.14 ms for a crop, close to half of the time of decoding; this kernel, which
numba compiles to vector instructions, takes 0.03 ms (LOG.md). The loader without DALI calls the kernel itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
from numpy.typing import NDArray

from pipeline.compiled import address_as_void_pointer, cfunc, njit
from pipeline.loader.augment import CROP, Floats
from pipeline.loader.normalise import MEAN, MIRROR, STD

if TYPE_CHECKING:
    from nvidia.dali.data_node import DataNode


# error_model="numpy" makes 1 / 0 infinite, as in NumPy, so that the kernel needs no code that raises exceptions.
@njit("void(f4[:,:,::1], u1[:,:,::1], i4[::1], f4[::1], f4[::1], f4[:,:,::1])", error_model="numpy")
def mirror_normalize(
    out: Floats, crop: NDArray[np.uint8], mirror: NDArray[np.int32], mean: Floats, std: Floats, residual: Floats
) -> None:
    """Fills `out` with the mirrored and normalised crop.

    Args:
        out: float32 (3, H, W), overwritten.
        crop: uint8 (H, W, 3).
        mirror: (1,) 1 if the crop is mirrored, 0 if not.
        mean: (3,) subtracted from each channel.
        std: (3,) divides each channel.
        residual: (3, H, W) subtracted from each pixel.
    """
    height, width = crop.shape[0], crop.shape[1]
    red_scale, green_scale, blue_scale = np.float32(1) / std[0], np.float32(1) / std[1], np.float32(1) / std[2]
    for y in range(height):
        pixels = crop[y].reshape(-1)
        red, green, blue = out[0, y], out[1, y], out[2, y]
        if mirror[0]:
            # Unsigned indices: numba checks every signed index that may be negative for Python's wrap-around, and a
            # loop with that check is not vectorised.
            for x in range(width):
                red[numba.uintp(width - 1 - x)] = pixels[3 * x]
                green[numba.uintp(width - 1 - x)] = pixels[3 * x + 1]
                blue[numba.uintp(width - 1 - x)] = pixels[3 * x + 2]
        else:
            for x in range(width):
                red[x] = pixels[3 * x]
                green[x] = pixels[3 * x + 1]
                blue[x] = pixels[3 * x + 2]
        # A second loop for the arithmetic: it runs over whole planes with unit stride, on a row that is in the cache.
        for x in range(width):
            red[x] = (red[x] - mean[0] - residual[0, y, x]) * red_scale
            green[x] = (green[x] - mean[1] - residual[1, y, x]) * green_scale
            blue[x] = (blue[x] - mean[2] - residual[2, y, x]) * blue_scale


def compiled_images(
    squares: NDArray[np.uint8],
    rows: Floats,
    residual: Floats,
    origins: Sequence[tuple[int, int]],
    mirrors: Sequence[bool | None],
) -> Floats:
    """Images float32 (N, views, 3, 224, 224) by `mirror_normalize`, a view for each of `mirrors` and `origins`.

    Args:
        squares: uint8 (N, side, side, 3).
        rows: float32 (N, 5), from `rows_of`.
        residual: float32 (3, 224, 224).
        origins: top and left of the crops in the squares.
        mirrors: whether they are mirrored; None for what `rows` says.
    """
    images = np.empty((len(squares), len(mirrors) * len(origins), 3, CROP, CROP), np.float32)
    std = np.repeat(rows[:, STD, None], 3, axis=1)
    for views, square, row, divisor in zip(images, squares, rows, std, strict=True):
        for view, (mirror, (top, left)) in zip(views, product(mirrors, origins), strict=True):
            crop = np.ascontiguousarray(square[top : top + CROP, left : left + CROP])
            mirrored = np.array([row[MIRROR] if mirror is None else mirror], np.int32)
            mirror_normalize(view, crop, mirrored, row[MEAN], divisor, residual)
    return images


# DALI calls an operator of its numba plugin through two C functions: one for the output shapes of a batch, and one for
# each sample. Their arguments are addresses of arrays of addresses. The plugin would compile both around our kernel
# anew in every process, which takes 2 to 4 s. Compiled here as C callbacks, they are cached on disk with the kernel.
_SAMPLE_SIGNATURE = "void(u8, u8, u8, i4, u8, u8, u8, i4)"
_SHAPES_SIGNATURE = "void(u8, u8, i4, u8, u8, i4, i4)"


@cfunc(_SAMPLE_SIGNATURE)
def _run_sample(
    outs: int, out_shapes: int, out_ndims: int, out_count: int, ins: int, in_shapes: int, in_ndims: int, in_count: int
) -> None:
    out = numba.carray(address_as_void_pointer(outs), 1, dtype=np.uint64)
    inputs = numba.carray(address_as_void_pointer(ins), 5, dtype=np.uint64)
    mirror_normalize(
        numba.carray(address_as_void_pointer(out[0]), (3, CROP, CROP), dtype=np.float32),
        numba.carray(address_as_void_pointer(inputs[0]), (CROP, CROP, 3), dtype=np.uint8),
        numba.carray(address_as_void_pointer(inputs[1]), (1,), dtype=np.int32),
        numba.carray(address_as_void_pointer(inputs[2]), (3,), dtype=np.float32),
        numba.carray(address_as_void_pointer(inputs[3]), (3,), dtype=np.float32),
        numba.carray(address_as_void_pointer(inputs[4]), (3, CROP, CROP), dtype=np.float32),
    )


@cfunc(_SHAPES_SIGNATURE)
def _set_output_shapes(
    out_shapes: int, out_ndims: int, out_count: int, in_shapes: int, in_ndims: int, in_count: int, samples: int
) -> None:
    for address in numba.carray(address_as_void_pointer(out_shapes), samples, dtype=np.uint64):
        shape = numba.carray(address_as_void_pointer(address), 3, dtype=np.int64)
        shape[0], shape[1], shape[2] = 3, CROP, CROP


@cache
def _operator() -> Any:
    """The operator for DALI, which is imported here: the kernel is also used without it."""
    from nvidia.dali import types
    from nvidia.dali.plugin.numba import NumbaFunction

    class CompiledOperator(NumbaFunction):  # type: ignore[misc]
        """The plugin's operator, given the addresses of callbacks that are compiled already."""

        def _get_run_fn_cpu(self, *_: Any) -> int:
            return int(_run_sample.address)

        def _get_setup_fn_cpu(self, *_: Any) -> int:
            return int(_set_output_shapes.address)

    uint8, int32, float32 = types.UINT8, types.INT32, types.FLOAT
    return CompiledOperator(
        run_fn=mirror_normalize,
        setup_fn=_set_output_shapes,
        out_types=[float32],
        outs_ndim=[3],
        in_types=[uint8, int32, float32, float32, float32],
        ins_ndim=[3, 1, 1, 1, 3],
    )


def mirror_normalize_node(
    crop: DataNode, mirror: DataNode, mean: DataNode, std: DataNode, residual: DataNode
) -> DataNode:
    """Adds `mirror_normalize` to the pipeline that is being defined; its output is float32 (3, 224, 224)."""
    return _operator()(crop, mirror, mean, std, residual)
