"""The DALI graphs of the feed, one definition for CPU and GPU: encoded JPEGs in, float32 NCHW crops out.

The loader feeds one batch at a time: the encoded bytes as uint8 vectors, and small arrays of what was drawn for each
sample. Nothing random happens in here. Out come `images` and `tags`, int64 (N, 2) of label and sample id, which pass
through beside their picture so that the pairing cannot slip.

Lighting costs nothing: what casts a crop computes (pixel - mean) / std anyway, and takes both per sample.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from nvidia.dali import Pipeline, fn, types
from nvidia.dali.data_node import DataNode

from pipeline.loader.augment import BORDER, CROP, STORED, VIEW_ORIGINS
from pipeline.loader.cpu_kernel import lit

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


def train_graph(engine: Engine, stage: Stage = "full") -> Graph:
    """Training crops: float32 (N, 3, 224, 224) = (crop, perhaps mirrored - mean) / std.

    Inputs: `jpeg`, `tags`; `origin` int32 (N, 2), top and left of the crop; `mirror` int32 (N, 1); `mean` and `std`
    float32 (N, 3); on the CPU `residual` float32 (N, 3, 224, 224), which is subtracted too. Cut after `stage` for
    timing: "read" gives the encoded bytes, "decode" the crops (N, 224, 224, 3) uint8.
    """
    pipeline = _pipeline(engine)
    with pipeline:
        jpeg, tags = _input("jpeg", types.UINT8, 1), _input("tags", types.INT64, 1)
        if stage == "read":
            pipeline.set_outputs(fn.copy(jpeg), tags)  # the copy touches every byte, which the input alone would not
            return Graph(pipeline, ("jpeg", "tags"))
        crop = _decode(engine, jpeg, _input("origin", types.INT32, 1), CROP)
        if stage == "decode":
            pipeline.set_outputs(crop, tags)
            return Graph(pipeline, ("jpeg", "tags", "origin"))
        cast = _Cast(engine, _input("mean", types.FLOAT, 1), _input("std", types.FLOAT, 1))
        pipeline.set_outputs(cast(crop, _input("mirror", types.INT32, 1)), tags)
        return Graph(pipeline, ("jpeg", "tags", "origin", "mirror", *cast.inputs))


def view_graph(engine: Engine, views: int) -> Graph:
    """Views to judge by, in the order of `reference_views`: float32 (N, views, 3, 224, 224) = (view - mean) / std.

    Inputs: `jpeg`, `tags`; `origin` int32 (N, 2), where the central 256 x 256 stands; `mean`, `std` and, on the CPU,
    `residual` as for `train_graph`.
    """
    pipeline = _pipeline(engine)
    with pipeline:
        jpeg, tags = _input("jpeg", types.UINT8, 1), _input("tags", types.INT64, 1)
        square = _decode(engine, jpeg, _input("origin", types.INT32, 1), STORED)
        cast = _Cast(engine, _input("mean", types.FLOAT, 1), _input("std", types.FLOAT, 1))
        centre = (BORDER, BORDER)
        crops = [
            cast(
                fn.slice(square, start=origin, shape=(CROP, CROP), axes=(0, 1)),
                fn.constant(idata=[mirror], shape=[1], dtype=types.INT32),
            )
            for mirror in ((0, 1) if views == 10 else (0,))
            for origin in (VIEW_ORIGINS if views == 10 else (centre,))
        ]
        pipeline.set_outputs(fn.stack(*crops), tags)
        return Graph(pipeline, ("jpeg", "tags", "origin", *cast.inputs))


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


def _decode(engine: Engine, jpeg: DataNode, origin: DataNode, side: int) -> DataNode:
    """The square of `side` pixels at `origin` of every picture, uint8 (side, side, 3)."""
    window: dict[str, Any] = {"start": origin, "shape": (side, side), "axes": (0, 1)}
    if engine.device == "cpu":
        return fn.decoders.image_slice(jpeg, device="cpu", **window)  # what lies below and beside is not decoded
    picture = fn.decoders.image(
        jpeg,
        # Whole pictures: decoding a region only crashes on the GPU (github.com/NVIDIA/nvImageCodec/issues/55).
        device="mixed",
        jpeg_fancy_upsampling=True,  # the CPU decoder's way of enlarging chroma; the GPU's default differs visibly
        hw_decoder_load=engine.hw_decoder_load,
    )
    return fn.slice(picture, **window)


class _Cast:
    """Mirrors and lights crops. On the CPU by an operator of ours, four times as fast as DALI's, which subtracts the
    mean image too; on the GPU by DALI's, after which the loader does that."""

    def __init__(self, engine: Engine, mean: DataNode, std: DataNode) -> None:
        self.mean, self.std = mean, std
        self.residual = _input("residual", types.FLOAT, 3) if engine.device == "cpu" else None
        self.inputs = ("mean", "std") if self.residual is None else ("mean", "std", "residual")

    def __call__(self, crop: DataNode, mirror: DataNode) -> DataNode:
        """float32 (3, 224, 224) of a crop (224, 224, 3)."""
        if self.residual is not None:
            return lit(crop, mirror, self.mean, self.std, self.residual)
        return fn.crop_mirror_normalize(
            crop,
            mirror=fn.squeeze(mirror, axes=0),
            mean=self.mean,
            std=self.std,
            dtype=types.FLOAT,
            output_layout="CHW",
        )
