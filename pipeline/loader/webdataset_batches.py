"""The batches of the loader without DALI: the webdataset package in torch's DataLoader, with Pillow as the decoder.

Batches are those of DALI in every number, as far as the two decoders give the same pixels: order, draws, substitutes
and the arithmetic are the same code. It runs wherever torch does, and serves as the baseline of what DALI gains.

What is webdataset's: the pipeline of a worker process (`DataPipeline`, `map`). The worker processes are torch's.
What is not: webdataset reads a tar from its first byte to its last and mixes samples in a buffer. It has no access by
index, so it cannot follow an order of the whole set. The source of this pipeline reads the same tars at the offsets of
index.npy instead. Each worker process makes whole batches: worker w of W makes every W-th, from the w-th on. The
DataLoader takes batches from the workers in turn, which restores the order.
"""

from __future__ import annotations

import gc
import signal
import warnings
from collections.abc import Collection, Generator, Iterator
from contextlib import contextmanager
from io import BytesIO
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, get_worker_info

from pipeline.loader.augment import BORDER, CROP, STORED, VIEW_ORIGINS
from pipeline.loader.bad_samples import broken_images, damaged, substitute_for
from pipeline.loader.batch import Batch, without_substitutes
from pipeline.loader.cpu_kernel import compiled_images
from pipeline.loader.inputs import BatchInputs, BatchPlanner, Place, TrainPlanner, ViewPlanner, mean_residual
from pipeline.loader.normalise import mirror_normalise, normalised_views, rows_of
from pipeline.loader.order import Ids
from pipeline.loader.settings import LoaderSettings, Stage
from pipeline.rgb_pca import Eigenbasis
from pipeline.shards.reader import ShardSet

NO_PIXELS = torch.empty(0)


class Made(NamedTuple):
    """What a worker process sends.

    Attributes:
        inputs: epoch, step, ids and damaged samples of the batch; no tensors.
        crops: uint8 (N, side, side, 3); empty if the loader is cut short or the batch cannot be made.
        rows: float32 (N, 5), from `rows_of`.
        error: why the batch cannot be made; empty if it could.
    """

    inputs: BatchInputs
    crops: torch.Tensor = NO_PIXELS
    rows: torch.Tensor = NO_PIXELS
    error: str = ""


class TrainingBatches:
    """One rank's training batches; arguments as in `dali_batches`.

    Attributes:
        pipeline: what each worker process runs.
    """

    def __init__(
        self,
        shards: ShardSet,
        basis: Eigenbasis,
        settings: LoaderSettings,
        planner: TrainPlanner,
        start: tuple[int, int],
        rows: int,
        crops_only: bool,
    ) -> None:
        worker = Worker(shards, settings, planner)
        self._to_batch = BatchBuilder(shards, basis, settings, planner, 0, crops_only)
        self.pipeline = webdataset.DataPipeline(_Places(shards, planner, start), webdataset.map(worker))
        self._made: Generator[Made] | None = _in_workers(settings, self.pipeline)

    def next(self) -> Batch:
        """The next batch."""
        if self._made is None:
            raise ValueError("this loader is closed; create a new one")
        try:
            return self._to_batch(next(self._made))
        except ValueError:
            self.close()
            raise

    def close(self) -> None:
        """Ends the worker processes."""
        if self._made is not None:
            self._made.close()
            self._made = None


def view_batches(
    shards: ShardSet, basis: Eigenbasis, settings: LoaderSettings, planner: ViewPlanner, views: int, shares: list[int]
) -> Iterator[Batch]:
    """The rank's evaluation batches in which it has samples; arguments as in `dali_batches`."""
    worker = Worker(shards, settings, planner, STORED)
    to_batch = BatchBuilder(shards, basis, settings, planner, views, False)
    pipeline = webdataset.DataPipeline(_Places(shards, planner, ()), webdataset.map(worker))
    made = _in_workers(settings, pipeline, len(shares))
    try:
        for one in made:
            yield without_substitutes(to_batch(one), one.inputs)
    finally:
        made.close()


def stage_ids(
    shards: ShardSet, settings: LoaderSettings, planner: TrainPlanner, stage: Stage, step: int
) -> Generator[Ids]:
    """The sample ids (N,) of batches from `step` on that are processed up to "read" or "decode"."""
    worker = Worker(shards, settings, planner, stage=stage)
    pipeline = webdataset.DataPipeline(_Places(shards, planner, (0, step)), webdataset.map(worker))
    made = _in_workers(settings, pipeline)
    try:
        for one in made:
            _accept(one, planner)
            yield one.inputs.ids
    finally:
        made.close()


class Worker:
    """Makes a batch of its place in the order: the only stage of a worker's pipeline after its source.

    Args:
        shards: the shard set.
        settings: of the loader.
        planner: gives draws and substitutes.
        side: of the crops, in pixels.
        stage: where to stop, for timing.
    """

    def __init__(
        self,
        shards: ShardSet,
        settings: LoaderSettings,
        planner: BatchPlanner,
        side: int = CROP,
        stage: Stage = "full",
    ) -> None:
        self._shards, self._settings, self._planner = shards, settings, planner
        self._side, self._stage = side, stage

    def __call__(self, place: Place) -> Made:
        """Makes the batch. A ValueError travels in the result: the DataLoader would wrap it into its traceback."""
        inputs = BatchInputs(*place, {})
        try:
            return self._made(inputs)
        except ValueError as error:
            return Made(inputs, error=str(error))

    def _made(self, inputs: BatchInputs) -> Made:
        epoch, ids, shards = inputs.epoch, inputs.ids, self._shards
        jpegs = shards.jpegs(ids)
        if self._stage == "read":
            return Made(inputs)
        found = broken_images(shards, ids, jpegs, self._settings.check_crc)
        arrays = self._planner.arrays(epoch, ids)
        crops, undecodable = self._crops(ids, jpegs, arrays["origin"], found.keys())
        if undecodable:
            reasons = damaged(shards, np.array(undecodable, np.int64))
            found |= {i: reasons.get(i, f"{shards.where(i)} (Pillow cannot decode it)") for i in undecodable}
        if found and self._settings.on_bad_sample == "skip":
            order = self._planner.order(epoch)
            rows = frozenset(row for row, i in enumerate(ids.tolist()) if i in found)
            ids = np.array([substitute_for(shards, i, order) if i in found else i for i in ids.tolist()])
            arrays = self._planner.arrays(epoch, ids)
            crops, undecodable = self._crops(ids, shards.jpegs(ids), arrays["origin"], ())
            assert not undecodable, "a substitute is intact"
            inputs = BatchInputs(epoch, inputs.step, ids, {}, found, rows)
        elif found:
            return Made(BatchInputs(epoch, inputs.step, ids, {}, found))
        if self._stage == "decode":
            return Made(inputs, crops)
        return Made(inputs, crops, torch.from_numpy(rows_of(arrays, len(ids))))

    def _crops(
        self, ids: Ids, jpegs: list[NDArray[np.uint8]], origins: NDArray[np.int32], skip: Collection[int]
    ) -> tuple[torch.Tensor, list[int]]:
        """Squares uint8 (N, side, side, 3) at `origins` (N, 2), top and left, and the ids that Pillow cannot decode."""
        crops, undecodable, side = np.empty((len(ids), self._side, self._side, 3), np.uint8), [], self._side
        for crop, sample_id, jpeg, (top, left) in zip(crops, ids.tolist(), jpegs, origins.tolist(), strict=True):
            if sample_id in skip:
                continue
            try:
                image = rgb_image(jpeg.tobytes())
            except (OSError, ValueError, SyntaxError):  # what Pillow raises for damaged files
                undecodable.append(sample_id)
                continue
            crop[:] = np.asarray(image.crop((left, top, left + side, top + side)))
        return torch.from_numpy(crops), undecodable


def rgb_image(jpeg: bytes) -> Image.Image:
    """Decodes an image with Pillow."""
    with Image.open(BytesIO(jpeg)) as encoded:
        return encoded.convert("RGB")


class _Places:
    """The source of a worker's pipeline: the places of its batches in the order, and read-ahead of the next one."""

    def __init__(self, shards: ShardSet, planner: TrainPlanner | ViewPlanner, start: tuple[int, ...]) -> None:
        self._shards, self._planner, self._start = shards, planner, start

    def __call__(self) -> Iterator[Place]:
        info = get_worker_info()
        assert info is not None
        planned = None
        for place in islice(self._planner.places(*self._start), info.id, None, info.num_workers):
            self._shards.read_ahead(place[2])
            if planned is not None:
                yield planned
            planned = place
        if planned is not None:
            yield planned


def _in_workers(
    settings: LoaderSettings, pipeline: webdataset.DataPipeline, batches: int | None = None
) -> Generator[Made]:
    """Starts worker processes now, and yields what they make, in order. Closing the generator ends them.

    Args:
        settings: of the loader.
        pipeline: what each of them runs.
        batches: how many there are; None if there is no end.
    """
    workers = settings.threads if batches is None else min(settings.threads, batches)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than cores
        loader: DataLoader[Made] = DataLoader(
            pipeline,
            batch_size=None,  # the workers make whole batches
            num_workers=workers,
            prefetch_factor=settings.queue_depth,
            collate_fn=_unchanged,
            pin_memory=settings.device == "cuda",
            worker_init_fn=_leave_signals_to_the_main_process,
            generator=torch.Generator(),  # otherwise the DataLoader takes a number from torch's global generator
        )
        with _no_collection_in_forks():
            return _all_of(iter(loader))


@contextmanager
def _no_collection_in_forks() -> Iterator[None]:
    """Processes that are forked meanwhile never collect the garbage of this one.

    A fork has this process's objects, but not its threads. If it collected a DALI pipeline of this process, it would
    wait for the pipeline's threads for ever.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _all_of(made: Iterator[Made]) -> Generator[Made]:
    yield from made


def _unchanged(made: Any) -> Any:
    return made


def _leave_signals_to_the_main_process(worker: int) -> None:
    """A terminal sends Ctrl-C to all processes. The run finishes its step then, which requires its workers."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _accept(made: Made, planner: BatchPlanner) -> None:
    if made.error:
        raise ValueError(made.error)
    planner.accept(made.inputs)


class BatchBuilder:
    """Makes a `Batch` of what a worker made: moves the crops to the device, and mirrors and normalises them there.

    The workers send uint8 crops: float32 images would be four times as many bytes of shared memory.

    Args:
        shards: the shard set, whose labels are used.
        basis: the eigenbasis whose mean is subtracted.
        settings: of the loader.
        planner: decides whether damaged samples may be skipped.
        views: of evaluation; 0 in training.
        crops_only: whether the batches are to stay crops.
    """

    def __init__(
        self,
        shards: ShardSet,
        basis: Eigenbasis,
        settings: LoaderSettings,
        planner: BatchPlanner,
        views: int,
        crops_only: bool,
    ) -> None:
        self._labels, self._planner, self._device = shards.index["label"], planner, torch.device(settings.device)
        self._views, self._crops_only = views, crops_only
        self._residual = mean_residual(basis, settings.mean)

    def __call__(self, made: Made) -> Batch:
        """Raises ValueError if the batch could not be made, or has damaged samples that must not be skipped."""
        _accept(made, self._planner)
        inputs, labels = made.inputs, self._labels[made.inputs.ids].astype(np.int64)
        tensors = (made.crops, made.rows, torch.from_numpy(labels), torch.from_numpy(inputs.ids))
        crops, rows, labels_, ids = (tensor.to(self._device, non_blocking=True) for tensor in tensors)
        images = crops if self._crops_only else self._finished(crops, rows)
        return Batch(images, labels_, ids, inputs.epoch, inputs.step, rows=rows if self._crops_only else None)

    def _finished(self, crops: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cuda":
            residual = torch.from_numpy(self._residual).to(self._device, non_blocking=True)
            if self._views:
                return normalised_views(crops, rows, residual, self._views)
            return mirror_normalise(crops, rows, residual)
        if not self._views:
            whole = compiled_images(crops.numpy(), rows.numpy(), self._residual, ((0, 0),), (None,))
            return torch.from_numpy(whole[:, 0])
        origins = VIEW_ORIGINS if self._views == 10 else ((BORDER, BORDER),)
        mirrors = (False, True) if self._views == 10 else (False,)
        return torch.from_numpy(compiled_images(crops.numpy(), rows.numpy(), self._residual, origins, mirrors))
