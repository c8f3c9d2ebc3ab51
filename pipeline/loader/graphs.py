"""The DALI graphs of the loader: encoded JPEGs in, crops out. float32 NCHW on the CPU, uint8 NHWC on the GPU.

The loader passes in one batch at a time: the encoded bytes as uint8 vectors, and small arrays with what was drawn for
each sample. Nothing in a graph is random. A graph has two outputs: `images`, and `tags`, int64 (N, 2) with the label
and the sample id. Tags travel through the graph with their images, so that labels cannot get out of step.

PCA (principal component analysis) lighting noise is almost free: normalisation computes (pixel - mean) / std in any
case, with a different mean and std for every sample. On the CPU a compiled operator in the graph does it. On the GPU
the loader does it after the graph (`normalise.py`), so that nothing but decoding and cropping needs a GPU to be tested.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, NamedTuple

from nvidia.dali import Pipeline, fn, types
from nvidia.dali.data_node import DataNode

from pipeline.loader.augment import BORDER, CROP, STORED, VIEW_ORIGINS
from pipeline.loader.cpu_kernel import mirror_normalize_node
from pipeline.loader.settings import Stage

# DALI takes host memory for allocations above this size from a pool instead of the system's allocator, whose page
# faults cost the CPU backend more than a third of its throughput. DALI reads the variable at its first allocation.
os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", "1M")


@dataclass(frozen=True)
class GraphSettings:
    """What DALI needs to know to run a graph.

    Attributes:
        batch: the most samples in a batch.
        device: "cpu" or "cuda".
        device_id: the number of the CUDA device; None on "cpu".
        threads: DALI's CPU threads.
        queue_depth: batches that DALI works on at once.
        hw_decoder_load: share of JPEGs for the GPU's hardware decoder; DALI ignores it on "cpu".
        largest: width and height of the largest image, for which the JPEG engines get memory at the start.
    """

    batch: int
    device: str
    device_id: int | None
    threads: int
    queue_depth: int
    hw_decoder_load: float
    largest: tuple[int, int] = (0, 0)


class Graph(NamedTuple):
    """A DALI pipeline whose outputs are `images` and `tags`, and the names of the inputs it needs for every batch."""

    pipeline: Pipeline
    inputs: tuple[str, ...]


def train_graph(settings: GraphSettings, stage: Stage = "full") -> Graph:
    """The graph of training crops: float32 (N, 3, 224, 224) = (crop, mirrored or not - mean) / std on the CPU, and on
    the GPU the crops as uint8 (N, 224, 224, 3).

    Its inputs are `jpeg`; `tags`; `origin` int32 (N, 2), the top and left of the crop in the stored image; and on the
    CPU `mirror` int32 (N, 1), `mean` and `std` float32 (N, 3), and `residual` float32 (N, 3, 224, 224), which is
    subtracted too.

    Args:
        settings: how DALI runs the graph.
        stage: the last stage of the graph; the shorter graphs are for timing. "read" outputs the encoded bytes,
            "decode" the crops as uint8 (N, 224, 224, 3).
    """
    pipeline = _pipeline(settings)
    with pipeline:
        jpeg, tags = _input("jpeg", types.UINT8, 1), _input("tags", types.INT64, 1)
        if stage == "read":
            # The input alone would only pass pointers on; the copy reads every byte, as a decoder does.
            pipeline.set_outputs(fn.copy(jpeg), tags)
            return Graph(pipeline, ("jpeg", "tags"))
        crop = _decode(settings, jpeg, _input("origin", types.INT32, 1), CROP)
        if stage == "decode" or settings.device == "cuda":
            pipeline.set_outputs(crop, tags)
            return Graph(pipeline, ("jpeg", "tags", "origin"))
        normalise = _MirrorNormalise()
        pipeline.set_outputs(normalise(crop, _input("mirror", types.INT32, 1)), tags)
        return Graph(pipeline, ("jpeg", "tags", "origin", "mirror", *normalise.inputs))


def view_graph(settings: GraphSettings, views: int) -> Graph:
    """The graph of evaluation views: float32 (N, views, 3, 224, 224) = (view - mean) / std on the CPU, and on the GPU
    the central squares as uint8 (N, 256, 256, 3).

    Its inputs are those of `train_graph` without `mirror`; `origin` is the top and left of the central 256 x 256.

    Args:
        settings: how DALI runs the graph.
        views: 1 or 10, in the order of `reference_views`.
    """
    pipeline = _pipeline(settings)
    with pipeline:
        jpeg, tags = _input("jpeg", types.UINT8, 1), _input("tags", types.INT64, 1)
        square = _decode(settings, jpeg, _input("origin", types.INT32, 1), STORED)
        if settings.device == "cuda":
            pipeline.set_outputs(square, tags)
            return Graph(pipeline, ("jpeg", "tags", "origin"))
        normalise = _MirrorNormalise()
        centre = (BORDER, BORDER)
        crops = [
            normalise(
                fn.slice(square, start=origin, shape=(CROP, CROP), axes=(0, 1)),
                fn.constant(idata=[mirror], shape=[1], dtype=types.INT32),
            )
            for mirror in ((0, 1) if views == 10 else (0,))
            for origin in (VIEW_ORIGINS if views == 10 else (centre,))
        ]
        pipeline.set_outputs(fn.stack(*crops), tags)
        return Graph(pipeline, ("jpeg", "tags", "origin", *normalise.inputs))


def _pipeline(settings: GraphSettings) -> Pipeline:
    return Pipeline(
        batch_size=settings.batch,
        num_threads=settings.threads,
        device_id=settings.device_id,
        prefetch_queue_depth=settings.queue_depth,
    )


def _input(name: str, dtype: types.DALIDataType, ndim: int) -> DataNode:
    # no_copy: DALI reads the arrays in place, so the loader keeps them until the batch is decoded.
    return fn.external_source(name=name, dtype=dtype, ndim=ndim, no_copy=True)


def _decode(settings: GraphSettings, jpeg: DataNode, origin: DataNode, side: int) -> DataNode:
    """The square of `side` pixels at `origin` of every image, uint8 (side, side, 3)."""
    window: dict[str, Any] = {"start": origin, "shape": (side, side), "axes": (0, 1)}
    if settings.device == "cpu":
        # Decodes only the window and skips what lies below and beside it. The pixels equal those of a whole decode.
        return fn.decoders.image_slice(jpeg, device="cpu", **window)
    image = fn.decoders.image(
        jpeg,
        # Decode whole images: decoding a region crashes on the GPU (github.com/NVIDIA/nvImageCodec/issues/55).
        device="mixed",
        # Interpolate chroma as the CPU decoder does; the GPU's default repeats it, and the images differ visibly.
        jpeg_fancy_upsampling=True,
        hw_decoder_load=settings.hw_decoder_load,
        # Memory of the JPEG engines; no pixel depends on it. The other decoders' own buffers suffice by default: 16 MiB
        # of device memory a thread hold an image of 256 x 21,845.
        preallocate_width_hint=settings.largest[0],
        preallocate_height_hint=settings.largest[1],
    )
    return fn.slice(image, **window)


class _MirrorNormalise:
    """Mirrors and normalises crops on the CPU: a compiled operator, four times as fast as DALI's."""

    def __init__(self) -> None:
        self.mean, self.std = (_input(name, types.FLOAT, 1) for name in ("mean", "std"))
        self.residual = _input("residual", types.FLOAT, 3)
        self.inputs = ("mean", "std", "residual")

    def __call__(self, crop: DataNode, mirror: DataNode) -> DataNode:
        """Makes float32 (3, 224, 224) of a crop uint8 (224, 224, 3)."""
        return mirror_normalize_node(crop, mirror, self.mean, self.std, self.residual)
