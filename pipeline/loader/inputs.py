"""TODO-DOC pipeline.loader.inputs (from pipeline.loader)."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali.tensors import TensorCPU, TensorListCPU

from pipeline.loader.augment import CROP, Mean, central_origin, draw, mean_of
from pipeline.loader.bad_samples import REMEDY, several, substitute_for
from pipeline.loader.graphs import Engine, train_graph
from pipeline.loader.order import batch_ids, evaluation_batches, steps_per_epoch, windowed_order
from pipeline.loader.settings import LoaderSettings, check_device
from pipeline.philox import epoch_order
from pipeline.rgb_pca import Eigenbasis
from pipeline.shards.reader import ShardSet

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Work:
    """A batch to be made: which samples, and what the graph wants to be fed. Its bytes are on their way into memory."""

    epoch: int
    step: int
    ids: Ids
    inputs: dict[str, TensorListCPU]
    divisor: float


class Plan:
    """The work of a rank's training, and what to do where it meets pictures that cannot be decoded. `skipped` has
    those that were skipped, by id: where they are, and why."""

    def __init__(
        self, shards: ShardSet, basis: Eigenbasis, settings: LoaderSettings, rank: int = 0, ranks: int = 1
    ) -> None:
        self.skipped: dict[int, str] = {}
        self._shards, self._basis, self._settings = shards, basis, settings
        self._rank, self._ranks = rank, ranks
        self._residual = residual_of(basis, settings.mean)

    def work(self, start_epoch: int = 0, start_step: int = 0) -> Generator[Work]:
        """Endless, from that step on."""
        steps = steps_per_epoch(len(self._shards), self._settings.batch)
        order = order_of(self._shards, self._settings, start_epoch)
        with ThreadPoolExecutor(1) as pool:  # an ImageNet's order takes a sixth of a second: have the next one ready
            for epoch in count(start_epoch):
                following = pool.submit(order_of, self._shards, self._settings, epoch + 1)
                for step in range(start_step if epoch == start_epoch else 0, steps):
                    ids = batch_ids(order, step, self._settings.batch, self._rank, self._ranks)
                    yield self._work(epoch, step, ids)
                order = following.result()

    def mended(self, work: Work, found: dict[int, str]) -> Work | None:
        """`work` with others in the place of those among the damaged samples `found` that DALI does not decode; None
        where none may be skipped, or DALI decodes them all. ValueError where they are too many."""
        if self._settings.on_bad_sample == "stop":
            return None
        # DALI reads a picture no further down than its crop, so it may decode a damaged one in some epochs. Asked of
        # each alone, the answer does not depend on what else is in the batch.
        bad = {sample_id: where for sample_id, where in found.items() if not self._decodes(work.epoch, sample_id)}
        self.skipped |= bad
        if len(self.skipped) > self._settings.max_bad_samples:
            raise ValueError(
                f"{len(self.skipped)} pictures cannot be decoded, and at most {self._settings.max_bad_samples} may be "
                f"skipped: {several(list(self.skipped.values()))}; {REMEDY}"
            )
        order = order_of(self._shards, self._settings, work.epoch)
        ids = [substitute_for(self._shards, i, order) if i in bad else i for i in work.ids.tolist()]
        return self._work(work.epoch, work.step, np.array(ids)) if bad else None

    def _decodes(self, epoch: int, sample_id: int) -> bool:
        """Whether DALI makes this epoch's crop of the sample, alone."""
        work = self._work(epoch, 0, np.array([sample_id]))
        graph = train_graph(replace(engine_for(self._settings, 1), queue_depth=1), "decode")
        for name in graph.inputs:
            graph.pipeline.feed_input(name, work.inputs[name])
        graph.pipeline.schedule_run()
        try:
            graph.pipeline.outputs()
        except RuntimeError:
            return False
        return True

    def _work(self, epoch: int, step: int, ids: Ids) -> Work:
        arrays, divisor = _drawn(self._shards, self._basis, self._settings, epoch, ids)
        return Work(epoch, step, ids, _inputs(self._shards, ids, arrays, self._residual), divisor)


def order_of(shards: ShardSet, settings: LoaderSettings, epoch: int) -> Ids:
    """The sample ids (N,) of the set in the order in which `epoch` visits them, tail and all."""
    if settings.order == "windowed":
        return windowed_order(shards.index["shard"], settings.seed, epoch, settings.window_shards)
    return epoch_order(len(shards), settings.seed, epoch)


def _drawn(
    shards: ShardSet, basis: Eigenbasis, settings: LoaderSettings, epoch: int, ids: Ids
) -> tuple[dict[str, NDArray[Any]], float]:
    """What is drawn for the samples `ids` in `epoch`, as the graph wants it, and the lighting's divisor."""
    draws = draw(settings.seed, epoch, ids, settings.positions)
    offsets, divisor = settings.lighting_at(epoch).colour(draws.normals, basis)
    arrays = {
        **_places(shards, ids, draws.left, draws.top),
        "mirror": draws.mirror.astype(np.int32)[:, None],
        "mean": basis.mean.astype(np.float32) - offsets,
        "std": np.full((len(ids), 3), divisor, np.float32),
    }
    return arrays, divisor


def view_work(shards: ShardSet, basis: Eigenbasis, settings: LoaderSettings, rank: int, ranks: int) -> Generator[Work]:
    residual = residual_of(basis, settings.mean)
    for step, ids in enumerate(evaluation_batches(len(shards), settings.batch, rank, ranks)):
        if not len(ids):
            continue
        nowhere = np.zeros_like(ids)
        arrays = {
            **_places(shards, ids, nowhere, nowhere),
            "mean": np.tile(basis.mean.astype(np.float32), (len(ids), 1)),
            "std": np.ones((len(ids), 3), np.float32),
        }
        yield Work(0, step, ids, _inputs(shards, ids, arrays, residual), 1.0)


def _places(shards: ShardSet, ids: Ids, left: Ids, top: Ids) -> dict[str, NDArray[Any]]:
    """`tags`, and the `origin` of what stands `left`, `top` into the central square."""
    rows = shards.index[ids]
    width, height = rows["width"].astype(np.int64), rows["height"].astype(np.int64)
    return {
        "tags": np.stack([rows["label"].astype(np.int64), ids], axis=1),
        "origin": np.stack([central_origin(height) + top, central_origin(width) + left], axis=1).astype(np.int32),
    }


def residual_of(basis: Eigenbasis, mean: Mean) -> NDArray[np.float32]:
    """What the mean has beyond the channel means: float32 (3, 224, 224), zeros for "channel"."""
    beyond = mean_of(basis, mean) - mean_of(basis, "channel")
    return np.array(np.broadcast_to(beyond, (3, CROP, CROP)), order="C")


def _inputs(
    shards: ShardSet, ids: Ids, arrays: dict[str, NDArray[Any]], residual: NDArray[np.float32]
) -> dict[str, TensorListCPU]:
    """The encoded bytes and `arrays` as DALI's own type, which takes half the time that feed_input takes to make it."""
    jpegs = [TensorCPU(jpeg) for jpeg in shards.jpegs(ids)]
    _announce(np.array([jpeg.data_ptr() for jpeg in jpegs]), shards.index["size"][ids])
    inputs = {name: TensorListCPU(array) for name, array in arrays.items()}
    same = TensorListCPU([TensorCPU(residual)] * len(ids), contiguous=False)  # one array, for every sample
    return {"jpeg": TensorListCPU(jpegs, contiguous=False), "residual": same, **inputs}


_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def _announce(addresses: NDArray[np.int64], sizes: NDArray[np.int32]) -> None:
    """Has the kernel read these parts of mapped files, and nothing else, while we do other work.

    Without it a cold read pulls in the whole read-ahead window around each picture: measured, 23 times the bytes.
    """
    pages = addresses & -mmap.PAGESIZE
    for page, length in zip(pages.tolist(), (addresses + sizes - pages).tolist(), strict=True):
        _madvise(page, length, mmap.MADV_WILLNEED)  # advice: an error would not matter


def engine_for(settings: LoaderSettings, batch: int) -> Engine:
    check_device(settings.device)
    device_id = torch.cuda.current_device() if settings.device == "cuda" else None
    return Engine(batch, settings.device, device_id, settings.threads, settings.queue_depth, settings.hw_decoder_load)
