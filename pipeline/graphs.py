"""The DALI graphs of the feed, one definition for CPU and GPU: encoded JPEGs in, float32 NCHW crops out.

The loader feeds one batch at a time: the encoded bytes as uint8 vectors, and small arrays of what was drawn for each
sample. Nothing random happens in here. Out come `images` and `tags`, int64 (N, 2) of label and sample id, which pass
through beside their picture so that the pairing cannot slip.

Lighting costs nothing: `crop_mirror_normalize` computes (pixel - mean) / std, and takes both per sample.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.data_node import DataNode

from pipeline.augment import CROP, STORED, VIEW_ORIGINS

# From this size on DALI takes host memory from a pool, and not from the system's allocator, whose page faults cost the
# CPU backend more than a third of its speed. DALI reads it when it first allocates.
os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", "1M")

Stage = Literal["read", "decode", "full"]


@dataclass(frozen=True)
class Engine:
    """What runs a graph: samples in a batch at most, "cpu" or "cuda" with its `device_id` (None on "cpu"), threads,
    batches in flight, and the share of JPEGs for the GPU's hardware decoder (ignored on the CPU)."""

    batch: int
    device: str
    device_id: int | None
    threads: int
    queue_depth: int
    hw_decoder_load: float


class Graph(NamedTuple):
    """A pipeline that gives `images` and `tags`, and the names of the inputs that it wants for every batch."""

    pipeline: Pipeline
    inputs: tuple[str, ...]


def crop_position(origin_px: NDArray[np.int64], side_px: NDArray[np.int64], crop_px: int) -> NDArray[np.float32]:
    """Where DALI's crop stands, 0 to 1, if it is to begin at `origin_px`: it rounds position * (side - crop)."""
    return (origin_px / np.maximum(side_px - crop_px, 1)).astype(np.float32)


def train_graph(engine: Engine, stage: Stage = "full") -> Graph:
    """Training crops: float32 (N, 3, 224, 224) = (crop, perhaps mirrored - mean) / std.

    Inputs: `jpeg`, `tags`; `x`, `y` float32 (N,) from `crop_position`; `mirror` int32 (N,); `mean`, `std` float32
    (N, 3). Cut after `stage` for timing: "read" gives the encoded bytes, "decode" whole pictures (H, W, 3) uint8.
    """
    pipeline = _pipeline(engine)
    with pipeline:
        jpeg, tags = _input("jpeg", types.UINT8, 1), _input("tags", types.INT64, 1)
        if stage == "read":
            pipeline.set_outputs(fn.copy(jpeg), tags)  # the copy touches every byte, which the input alone would not
            return Graph(pipeline, ("jpeg", "tags"))
        if stage == "decode":
            pipeline.set_outputs(_decode(engine, jpeg), tags)
            return Graph(pipeline, ("jpeg", "tags"))
        x, y = _input("x", types.FLOAT, 0), _input("y", types.FLOAT, 0)
        mirror = _input("mirror", types.INT32, 0)
        mean, std = _input("mean", types.FLOAT, 1), _input("std", types.FLOAT, 1)
        pipeline.set_outputs(_crop(_decode(engine, jpeg), x, y, mirror=mirror, mean=mean, std=std), tags)
        return Graph(pipeline, ("jpeg", "tags", "x", "y", "mirror", "mean", "std"))


def view_graph(engine: Engine, views: int, channel_mean: list[float]) -> Graph:
    """Views to judge by, in the order of `reference_views`: float32 (N, views, 3, 224, 224), `channel_mean` subtracted.

    Inputs: `jpeg`, `tags`; `x`, `y` float32 (N,), where the central 256 x 256 stands.
    """
    pipeline = _pipeline(engine)
    with pipeline:
        jpeg, tags = _input("jpeg", types.UINT8, 1), _input("tags", types.INT64, 1)
        x, y = _input("x", types.FLOAT, 0), _input("y", types.FLOAT, 0)
        square = fn.crop(_decode(engine, jpeg), crop=(STORED, STORED), crop_pos_x=x, crop_pos_y=y)
        room = STORED - CROP
        origins = VIEW_ORIGINS if views == 10 else ((room // 2, room // 2),)
        crops = [
            _crop(square, left / room, top / room, mirror=mirror, mean=channel_mean)
            for mirror in ((0, 1) if views == 10 else (0,))
            for top, left in origins
        ]
        pipeline.set_outputs(fn.stack(*crops), tags)
        return Graph(pipeline, ("jpeg", "tags", "x", "y"))


def _pipeline(engine: Engine) -> Pipeline:
    return Pipeline(
        batch_size=engine.batch,
        num_threads=engine.threads,
        device_id=engine.device_id,
        prefetch_queue_depth=engine.queue_depth,
    )


def _input(name: str, dtype: types.DALIDataType, ndim: int) -> DataNode:
    # no_copy: encoded bytes stay where they are, in the mapped tars; DALI holds every array it was given until used
    return fn.external_source(name=name, dtype=dtype, ndim=ndim, no_copy=True)


def _decode(engine: Engine, jpeg: DataNode) -> DataNode:
    return fn.decoders.image(
        jpeg,
        # Whole pictures: decoding a region only crashes on the GPU (github.com/NVIDIA/nvImageCodec/issues/55).
        device="mixed" if engine.device == "cuda" else "cpu",
        jpeg_fancy_upsampling=True,  # the CPU decoder's way of enlarging chroma; the GPU's default differs visibly
        hw_decoder_load=engine.hw_decoder_load,
    )


def _crop(picture: DataNode, x: DataNode | float, y: DataNode | float, **how: Any) -> DataNode:
    return fn.crop_mirror_normalize(
        picture, crop=(CROP, CROP), crop_pos_x=x, crop_pos_y=y, dtype=types.FLOAT, output_layout="CHW", **how
    )
