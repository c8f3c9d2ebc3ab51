"""The feed: a shard set in, batches of float32 (N, 3, 224, 224) RGB crops out, on the loader's device.

`TrainFeed` is endless and `view_feed` goes through a set once. There is no state to save: every batch is a pure
function of (shard set, settings, epoch, step), whatever the number of ranks or threads, so resuming is naming
(epoch, step). Pixels are in grey levels 0..255, minus the mean, lit and divided as `augment.py` says. Batches are the
caller's to keep.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali.tensors import TensorCPU, TensorListCPU
from torch.utils.dlpack import from_dlpack

from pipeline.augment import CROP, POSITIONS, STORED, Lighting, Mean, central_origin, draw, mean_of
from pipeline.bad_samples import REMEDY, damaged, several, stand_in
from pipeline.eigenbasis import Eigenbasis
from pipeline.graphs import Engine, Graph, Stage, train_graph, view_graph
from pipeline.order import (
    Order,
    batch_ids,
    epoch_order,
    evaluation_batches,
    local_batch,
    steps_per_epoch,
    windowed_order,
)
from pipeline.shards import ShardSet

Device = Literal["cpu", "cuda"]
OnBadSample = Literal["stop", "skip"]
Ids = NDArray[np.int64]

ANNOUNCED_AHEAD = 4  # batches between telling the kernel which bytes come next and handing them to DALI


def default_threads() -> int:
    """One more than there are cores, which keeps them busy while a thread waits for the others to end a batch (6 %
    faster on 2 cores); at most 8, as DALI advises 4 to 8 for one GPU."""
    return min(8, len(os.sched_getaffinity(0)) + 1)


def check_device(device: str) -> None:
    """ValueError where it is "cuda" and there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device is cuda, but torch sees no CUDA device here; use --device cpu, or install a CUDA torch"
        )


@dataclass(frozen=True)
class FeedSettings:
    """How the feed works. What changes its pictures: batch, seed, lighting, lighting_until, mean, positions, order,
    window_shards; and in a damaged set on_bad_sample."""

    batch: int = 128  # the global one, of all ranks together (P 5)
    seed: int = 0  # of order, crops, mirroring and lighting
    device: Device = "cpu"  # "cuda" is torch's current device
    threads: int = field(default_factory=default_threads)
    queue_depth: int = 2  # batches in work: one more than the one being waited for; a third gained nothing
    lighting: Lighting = field(default_factory=Lighting)
    lighting_until: int | None = None  # from this epoch on neither noise nor division (the 2012 run notes: 66 to 68)
    mean: Mean = "image"  # as the released code (convdata_jpeg.py:95)
    positions: int = POSITIONS  # crop offsets either way: 33 as the released code draws them, 32 for P 4.1's 2048
    order: Order = "global"  # "windowed" reads `window_shards` shards at a time, for sets that memory does not hold
    window_shards: int = 16
    on_bad_sample: OnBadSample = "stop"  # "skip": train on another instead; evaluation always stops
    max_bad_samples: int = 100  # as many are skipped; one more stops the feed
    hw_decoder_load: float = 0.65  # share of JPEGs for the GPU's decoder engines; DALI's default has changed over time

    def __post_init__(self) -> None:
        for name in ("batch", "threads", "queue_depth", "window_shards", "max_bad_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; it must be within 0 to 2**64 - 1")
        if self.device not in get_args(Device):
            raise ValueError(f"device is {self.device!r}; choose cpu or cuda")
        if self.mean not in get_args(Mean):
            raise ValueError(f"mean is {self.mean!r}; choose image or channel")
        if self.order not in get_args(Order):
            raise ValueError(f"order is {self.order!r}; choose global or windowed")
        if self.on_bad_sample not in get_args(OnBadSample):
            raise ValueError(f"on_bad_sample is {self.on_bad_sample!r}; choose stop or skip")
        if not 1 <= self.positions <= POSITIONS:
            raise ValueError(f"{self.positions} crop positions; a {CROP} crop of {STORED} has 1 to {POSITIONS}")
        if not 0 <= self.hw_decoder_load <= 1:
            raise ValueError(f"hw_decoder_load is {self.hw_decoder_load}; it is a share, 0 to 1")

    @property
    def made_ahead(self) -> int:
        """Batches that may be made, or read, before they are asked for: no measure of how fast the feed is."""
        return self.queue_depth + ANNOUNCED_AHEAD + 2

    def lighting_at(self, epoch: int) -> Lighting:
        """The lighting of `epoch`."""
        if self.lighting_until is not None and epoch >= self.lighting_until:
            return replace(self.lighting, coefficient=0.0)
        return self.lighting


@dataclass(frozen=True)
class Batch:
    """A batch of N: `images` float32 (N, 3, 224, 224), or (N, views, 3, 224, 224) from `view_feed`; `labels` and sample
    `ids` int64 (N,); all on the loader's device. `epoch` and `step` count from 0."""

    images: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor
    epoch: int
    step: int


class TrainFeed:
    """Endless iterator over this rank's part of every global batch, from `start_step` of `start_epoch` on.

    Prefetches across the edges of epochs. Use it as a context manager or `close` it. ValueError where the set does not
    fill a batch, the batch cannot be shared by the ranks, there is no CUDA device, or a picture cannot be decoded and
    may not be skipped.
    """

    def __init__(
        self,
        shards: ShardSet,
        basis: Eigenbasis,
        settings: FeedSettings,
        start_epoch: int = 0,
        start_step: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.steps_per_epoch = steps_per_epoch(len(shards), settings.batch)
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"start_step is {start_step}, but an epoch has {self.steps_per_epoch} steps")
        graph = partial(train_graph, _engine(settings, local_batch(settings.batch, ranks)))
        plan = _Plan(shards, basis, settings, rank, ranks)
        self._skipped = plan.skipped
        self._runner = _Runner(graph, shards, plan.work(start_epoch, start_step), settings.queue_depth, plan.mended)
        self._finish = _Finish(basis, settings)

    @property
    def bad_samples(self) -> tuple[str, ...]:
        """The pictures that this rank has skipped so far: where they are, and why."""
        return tuple(self._skipped.values())

    def __iter__(self) -> TrainFeed:
        return self

    def __next__(self) -> Batch:
        return self._finish(*self._runner.next(self._finish.stream))

    def close(self) -> None:
        """Stops the pipeline and gives its threads and memory back. Batches handed out stay valid."""
        self._runner.close()

    def __enter__(self) -> TrainFeed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def view_feed(
    shards: ShardSet, basis: Eigenbasis, settings: FeedSettings, views: int = 1, rank: int = 0, ranks: int = 1
) -> Iterator[Batch]:
    """Every sample exactly once, in the order of ids, unlit: images (N, views, 3, 224, 224); the last batch is short.

    1 view is the centre crop, 10 are P 4.1's corners, centre and their mirror images. Every rank gets as many batches,
    of which it has its rows; of the last one that may be none. Close the iterator, or use it up.
    """
    if views not in (1, 10):
        raise ValueError(f"{views} views; choose 1 (the centre) or 10 (corners, centre and their mirror images)")
    shares = [len(ids) for ids in evaluation_batches(len(shards), settings.batch, rank, ranks)]
    batches = sum(share > 0 for share in shares)
    if batches:
        engine = _engine(settings, max(shares))
        depth = min(engine.queue_depth, batches)
        graph = partial(view_graph, replace(engine, queue_depth=depth), views)
        work = _view_work(shards, basis, settings, rank, ranks)
        runner, finish = _Runner(graph, shards, work, depth), _Finish(basis, settings)
        try:
            for _ in range(batches):
                yield finish(*runner.next(finish.stream))
        finally:
            runner.close()
    for step in range(batches, len(shares)):
        none = torch.empty(0, dtype=torch.int64, device=settings.device)
        yield Batch(torch.empty(0, views, 3, CROP, CROP, device=settings.device), none, none, 0, step)


def stage_feed(
    shards: ShardSet, basis: Eigenbasis, settings: FeedSettings, stage: Stage, start_step: int = 0
) -> Iterator[Ids]:
    """For timing: `TrainFeed`'s batches, endlessly, done as far as `stage`; only their sample ids (N,) are given."""
    if stage == "full":
        with TrainFeed(shards, basis, settings, start_step=start_step) as feed:
            while True:
                yield next(feed).ids.numpy(force=True)
    graph = partial(train_graph, _engine(settings, settings.batch), stage)
    plan = _Plan(shards, basis, settings)
    runner = _Runner(graph, shards, plan.work(0, start_step), settings.queue_depth, plan.mended)
    try:
        while True:
            _, (_, tags) = runner.next(None)
            yield np.array(tags.as_tensor())[:, 1]
    finally:
        runner.close()


def stage_sizes(
    shards: ShardSet, basis: Eigenbasis, settings: FeedSettings, stage: Stage, start_step: int = 0
) -> Iterator[int]:
    """Batch sizes of `stage_feed`, which is what `measure_rates` counts."""
    return (len(ids) for ids in stage_feed(shards, basis, settings, stage, start_step))


# ---- what to do -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    """A batch to be made: which samples, and what the graph wants to be fed. Its bytes are on their way into memory."""

    epoch: int
    step: int
    ids: Ids
    inputs: dict[str, TensorListCPU]
    divisor: float


class _Plan:
    """The work of a rank's training, and what to do where it meets pictures that cannot be decoded. `skipped` has
    those that were skipped, by id: where they are, and why."""

    def __init__(
        self, shards: ShardSet, basis: Eigenbasis, settings: FeedSettings, rank: int = 0, ranks: int = 1
    ) -> None:
        self.skipped: dict[int, str] = {}
        self._shards, self._basis, self._settings = shards, basis, settings
        self._rank, self._ranks = rank, ranks
        self._residual = residual_of(basis, settings.mean)

    def work(self, start_epoch: int = 0, start_step: int = 0) -> Generator[_Work]:
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

    def mended(self, work: _Work, found: dict[int, str]) -> _Work | None:
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
        ids = [stand_in(self._shards, i, order) if i in bad else i for i in work.ids.tolist()]
        return self._work(work.epoch, work.step, np.array(ids)) if bad else None

    def _decodes(self, epoch: int, sample_id: int) -> bool:
        """Whether DALI makes this epoch's crop of the sample, alone."""
        work = self._work(epoch, 0, np.array([sample_id]))
        graph = train_graph(replace(_engine(self._settings, 1), queue_depth=1), "decode")
        for name in graph.inputs:
            graph.pipeline.feed_input(name, work.inputs[name])
        graph.pipeline.schedule_run()
        try:
            graph.pipeline.outputs()
        except RuntimeError:
            return False
        return True

    def _work(self, epoch: int, step: int, ids: Ids) -> _Work:
        arrays, divisor = _drawn(self._shards, self._basis, self._settings, epoch, ids)
        return _Work(epoch, step, ids, _inputs(self._shards, ids, arrays, self._residual), divisor)


def order_of(shards: ShardSet, settings: FeedSettings, epoch: int) -> Ids:
    """The sample ids (N,) of the set in the order in which `epoch` visits them, tail and all."""
    if settings.order == "windowed":
        return windowed_order(shards.index["shard"], settings.seed, epoch, settings.window_shards)
    return epoch_order(len(shards), settings.seed, epoch)


def _drawn(
    shards: ShardSet, basis: Eigenbasis, settings: FeedSettings, epoch: int, ids: Ids
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


def _view_work(shards: ShardSet, basis: Eigenbasis, settings: FeedSettings, rank: int, ranks: int) -> Generator[_Work]:
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
        yield _Work(0, step, ids, _inputs(shards, ids, arrays, residual), 1.0)


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


# ---- doing it ---------------------------------------------------------------------------------------------------


def _engine(settings: FeedSettings, batch: int) -> Engine:
    check_device(settings.device)
    device_id = torch.cuda.current_device() if settings.device == "cuda" else None
    return Engine(batch, settings.device, device_id, settings.threads, settings.queue_depth, settings.hw_decoder_load)


Mend = Callable[[_Work, dict[int, str]], _Work | None]


class _Ahead:
    """Makes work in a thread of its own, `ANNOUNCED_AHEAD` batches before it is wanted: what Python takes for a batch,
    1.2 ms for 128 pictures, would else be waited for in every step."""

    def __init__(self, work: Generator[_Work]) -> None:
        self._work = work
        self._thread = ThreadPoolExecutor(1)
        self._wanted = deque[Future[_Work | None]]()
        self._first = deque[_Work]()

    def fill(self) -> None:
        """Has the thread make what is missing. Call it with time to spare: the thread takes Python's lock."""
        while len(self._wanted) <= ANNOUNCED_AHEAD:
            self._wanted.append(self._thread.submit(next, self._work, None))

    def put_first(self, works: list[_Work]) -> None:
        """Has these come before all others."""
        self._first = deque([*works, *self._first])

    def next(self) -> _Work | None:
        """The next batch's; None where there is none."""
        if self._first:
            return self._first.popleft()
        self.fill()
        return self._wanted.popleft().result()

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._work.close()


class _Runner:
    """Keeps `queue_depth` batches in a DALI pipeline, and knows which work each one that comes out was. What cannot be
    decoded goes to `mend`, which may give other work for it."""

    def __init__(
        self,
        make_graph: Callable[[], Graph],
        shards: ShardSet,
        work: Generator[_Work],
        queue_depth: int,
        mend: Mend = lambda work, found: None,
    ) -> None:
        self._make_graph, self._mend = make_graph, mend
        self._shards, self._ahead = shards, _Ahead(work)
        self._in_dali: deque[_Work] = deque()
        self._graph: Graph | None = None
        self._start(queue_depth)

    def _feed(self) -> bool:
        """Hands DALI the next batch; False where there is none."""
        assert self._graph is not None
        work = self._ahead.next()
        if work is None:
            return False
        for name in self._graph.inputs:
            self._graph.pipeline.feed_input(name, work.inputs[name])
        self._in_dali.append(work)
        return True

    def next(self, stream: torch.cuda.Stream | None) -> tuple[_Work, tuple[Any, Any]]:
        """The oldest batch's work and outputs, once they are ready (or ordered on `stream`); starts another batch."""
        if self._graph is None:
            raise ValueError("this feed is closed; make another one")
        while True:
            try:
                outputs = self._graph.pipeline.outputs(stream)
                break
            except RuntimeError as error:
                self._mend_oldest(error)
        work = self._in_dali.popleft()
        if self._feed():
            self._graph.pipeline.schedule_run()
            self._ahead.fill()
        return work, outputs

    def _mend_oldest(self, error: RuntimeError) -> None:
        """Starts a new pipeline on the same batches, the oldest one mended; raises and closes where that cannot be.

        A new one, since DALI calls a pipeline that met an error invalid.
        """
        work = self._in_dali[0]
        self._graph = None
        try:
            found = damaged(self._shards, work.ids)
            if not found:
                error.add_note(f"in the batch of epoch {work.epoch}, step {work.step}, whose pictures Pillow decodes")
                raise error
            mended = self._mend(work, found)
            if mended is None:
                raise ValueError(
                    f"{len(found)} of {len(work.ids)} pictures of epoch {work.epoch}, step {work.step} cannot be "
                    f"decoded: {several(list(found.values()))}; {REMEDY}"
                ) from error
        except (RuntimeError, ValueError):
            self.close()
            raise
        self._ahead.put_first([mended, *list(self._in_dali)[1:]])
        self._start(len(self._in_dali))

    def _start(self, batches: int) -> None:
        """Puts the next `batches` into a new pipeline, as many as its queue is deep."""
        self._graph = self._make_graph()
        self._in_dali.clear()
        for _ in range(batches):
            self._feed()
        self._graph.pipeline.schedule_run()  # the first call starts as many as the queue is deep

    def close(self) -> None:
        self._graph = None  # the pipeline goes with its last reference, and stops its threads
        self._ahead.close()


class _Finish:
    """Makes a Batch of a graph's outputs: into torch, and on the GPU minus what the mean image has beyond the channel
    means, which is done here in one kernel (on the CPU the graph has done it)."""

    def __init__(self, basis: Eigenbasis, settings: FeedSettings) -> None:
        self.device = torch.device(settings.device)
        # All of a GPU batch's work is on a stream of its own, so that waiting for it does not wait for the training.
        self.stream = torch.cuda.Stream() if settings.device == "cuda" else None  # type: ignore[no-untyped-call]
        self._residual = torch.from_numpy(residual_of(basis, settings.mean)).to(self.device)

    def __call__(self, work: _Work, outputs: tuple[Any, Any]) -> Batch:
        dali_images, dali_tags = outputs
        tags = np.array(dali_tags.as_tensor()).T.copy()
        assert np.array_equal(tags[1], work.ids)
        if self.stream is None:
            images, (labels, ids) = from_dlpack(dali_images.as_tensor()), torch.from_numpy(tags)
        else:
            images, (labels, ids) = self._on_gpu(self.stream, dali_images, torch.from_numpy(tags), work.divisor)
        return Batch(images, labels, ids, work.epoch, work.step)

    def _on_gpu(
        self, stream: torch.cuda.Stream, dali_images: Any, tags: torch.Tensor, divisor: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies into torch's own memory: DALI's is then given back in the order of `stream`, not when some kernel of
        the trainer may still read it."""
        with torch.cuda.stream(stream):
            images = torch.sub(from_dlpack(dali_images.as_tensor()), self._residual, alpha=1 / divisor)
            tags = tags.to(self.device, non_blocking=True)
            ready = stream.record_event()
        ready.synchronize()  # here, so that time spent in `next` is time waited for the input
        for tensor in (images, tags):
            tensor.record_stream(torch.cuda.current_stream())
        return images, tags
