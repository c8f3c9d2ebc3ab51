"""Mirroring, lighting and cast of a crop in one pass, as an operator for DALI's CPU backend.

    out[c, y, x] = (crop[y, x, c] - mean[c] - residual[c, y, x]) / std[c], x counted from the right where mirrored

DALI's own `crop_mirror_normalize` does this on the GPU. On the CPU it goes pixel by pixel and takes 0.14 ms for a crop,
which is close to half of its decoding; compiled for the processor's vector units it is 0.03 ms (LOG.md).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray
from nvidia.dali import types
from nvidia.dali.data_node import DataNode
from nvidia.dali.plugin.numba import NumbaFunction, address_as_void_pointer

from pipeline.loader.augment import CROP

Floats = NDArray[np.float32]


@numba.njit("void(f4[:,:,::1], u1[:,:,::1], i4[::1], f4[::1], f4[::1], f4[:,:,::1])", cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def light(
    out: Floats, crop: NDArray[np.uint8], mirror: NDArray[np.int32], mean: Floats, std: Floats, residual: Floats
) -> None:
    """Fills `out` (3, H, W) from `crop` (H, W, 3); `mirror` (1,), `mean` and `std` (3,), `residual` (3, H, W)."""
    height, width = crop.shape[0], crop.shape[1]
    red_scale, green_scale, blue_scale = np.float32(1) / std[0], np.float32(1) / std[1], np.float32(1) / std[2]
    for y in range(height):
        pixels = crop[y].reshape(-1)
        red, green, blue = out[0, y], out[1, y], out[2, y]
        if mirror[0]:  # unsigned: an index that could be negative would be looked at each time, and nothing vectorised
            for x in range(width):
                red[numba.uintp(width - 1 - x)] = pixels[3 * x]
                green[numba.uintp(width - 1 - x)] = pixels[3 * x + 1]
                blue[numba.uintp(width - 1 - x)] = pixels[3 * x + 2]
        else:
            for x in range(width):
                red[x] = pixels[3 * x]
                green[x] = pixels[3 * x + 1]
                blue[x] = pixels[3 * x + 2]
        for x in range(width):
            red[x] = (red[x] - mean[0] - residual[0, y, x]) * red_scale
            green[x] = (green[x] - mean[1] - residual[1, y, x]) * green_scale
            blue[x] = (blue[x] - mean[2] - residual[2, y, x]) * blue_scale


# What DALI calls for each crop, and once for the shapes of a batch: addresses of arrays of addresses. The plugin would
# compile such functions around ours in every process, which takes seconds; compiled here, they are cached on disk.
_ADDRESSES = "u8, u8, u8, i4, u8, u8, u8, i4"


@numba.cfunc(f"void({_ADDRESSES})", cache=True)  # type: ignore[untyped-decorator]
def _run(
    outs: int, out_shapes: int, out_ndims: int, out_count: int, ins: int, in_shapes: int, in_ndims: int, in_count: int
) -> None:
    out = numba.carray(address_as_void_pointer(outs), 1, dtype=np.uint64)
    given = numba.carray(address_as_void_pointer(ins), 5, dtype=np.uint64)
    light(
        numba.carray(address_as_void_pointer(out[0]), (3, CROP, CROP), dtype=np.float32),
        numba.carray(address_as_void_pointer(given[0]), (CROP, CROP, 3), dtype=np.uint8),
        numba.carray(address_as_void_pointer(given[1]), (1,), dtype=np.int32),
        numba.carray(address_as_void_pointer(given[2]), (3,), dtype=np.float32),
        numba.carray(address_as_void_pointer(given[3]), (3,), dtype=np.float32),
        numba.carray(address_as_void_pointer(given[4]), (3, CROP, CROP), dtype=np.float32),
    )


@numba.cfunc("void(u8, u8, i4, u8, u8, i4, i4)", cache=True)  # type: ignore[untyped-decorator]
def _shapes(
    out_shapes: int, out_ndims: int, out_count: int, in_shapes: int, in_ndims: int, in_count: int, samples: int
) -> None:
    for address in numba.carray(address_as_void_pointer(out_shapes), samples, dtype=np.uint64):
        shape = numba.carray(address_as_void_pointer(address), 3, dtype=np.int64)
        shape[0], shape[1], shape[2] = 3, CROP, CROP


class _Light(NumbaFunction):  # type: ignore[misc]
    """The plugin's operator with functions that are compiled already."""

    def _get_run_fn_cpu(self, *_: Any) -> int:
        return int(_run.address)

    def _get_setup_fn_cpu(self, *_: Any) -> int:
        return int(_shapes.address)


@cache
def _operator() -> NumbaFunction:
    byte, whole, single = types.UINT8, types.INT32, types.FLOAT
    return _Light(
        run_fn=light,
        setup_fn=_shapes,
        out_types=[single],
        outs_ndim=[3],
        in_types=[byte, whole, single, single, single],
        ins_ndim=[3, 1, 1, 1, 3],
    )


def lit(crop: DataNode, mirror: DataNode, mean: DataNode, std: DataNode, residual: DataNode) -> DataNode:
    """`light` as a node of the pipeline that is being defined: float32 (3, 224, 224)."""
    return _operator()(crop, mirror, mean, std, residual)
