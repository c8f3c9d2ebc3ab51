"""The inputs of each batch: which samples are in it, what is drawn for them, and their encoded bytes, as DALI tensors.

DALI is imported within functions: the loader that runs without it takes order and draws from the same planners.
`TrainPlanner` prepares training batches, `ViewPlanner` evaluation batches. The kernel is told to read the encoded bytes
when a batch is prepared, several batches before DALI needs them. Just before DALI gets a batch, they are copied from
the page cache and the header of every image is checked: one that cannot be parsed would end the process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.loader.augment import CROP, Floats, Mean, central_origin, draw, mean_of
from pipeline.loader.bad_samples import REMEDY, broken_images, damaged, first_few, substitute_for
from pipeline.loader.order import Ids, batch_ids, evaluation_batches, steps_per_epoch, windowed_order
from pipeline.loader.settings import READ_AHEAD_BATCHES, LoaderSettings, check_device
from pipeline.philox import epoch_order
from pipeline.rgb_pca import Eigenbasis
from pipeline.shards.reader import ShardSet

if TYPE_CHECKING:
    from nvidia.dali.tensors import TensorListCPU

    from pipeline.loader.graphs import Graph, GraphSettings

Place = tuple[int, int, Ids]  # epoch, step and sample ids of a batch
MOST_PREALLOCATED = 1024  # pixels of a side; one panorama must not reserve gigabytes for every image of a batch


@dataclass(frozen=True)
class BatchInputs:
    """Everything DALI needs for one batch of N samples.

    Attributes:
        epoch: counts from 0.
        step: counts from 0 in each epoch.
        ids: (N,) the sample ids.
        tensors: the graph's inputs by name (see `train_graph`); without "jpeg" until the images are read.
        damaged: the samples of the batch that substitutes replace: for each id, its place and the reason.
        substituted: the rows of the substitutes.
        jpegs: the encoded images. DALI reads this memory, so it must live until the batch is decoded.
    """

    epoch: int
    step: int
    ids: Ids
    tensors: dict[str, TensorListCPU]
    damaged: dict[int, str] = field(default_factory=dict)
    substituted: frozenset[int] = frozenset()
    jpegs: tuple[NDArray[np.uint8], ...] = ()


class BatchPlanner(ABC):
    """Prepares the batches of one rank, and replaces samples that cannot be decoded.

    Attributes:
        skipped: for each sample id that was skipped so far, its place and why it cannot be decoded.
    """

    def __init__(
        self, shards: ShardSet, basis: Eigenbasis, settings: LoaderSettings, rank: int = 0, ranks: int = 1
    ) -> None:
        self.skipped: dict[int, str] = {}
        self._shards, self._basis, self._settings = shards, basis, settings
        self._rank, self._ranks = rank, ranks
        self._residual = mean_residual(basis, settings.mean)

    def with_images(self, batches: Generator[BatchInputs], check: bool = True) -> Generator[BatchInputs]:
        """Yields `batches` with their encoded images, and with substitutes for images that `check` finds broken.

        It stays `READ_AHEAD_BATCHES` behind `batches`. The kernel has then read the bytes, and copying them waits for
        no disk.
        """
        planned = deque[BatchInputs]()
        for batch in batches:
            planned.append(batch)
            if len(planned) > READ_AHEAD_BATCHES:
                yield self._with_images(planned.popleft(), check)
        for batch in planned:
            yield self._with_images(batch, check)

    def accept(self, batch: BatchInputs) -> None:
        """Records the damaged samples of a batch that the loader is about to return.

        Raises:
            ValueError: a sample is damaged and must not be skipped, or more than `max_bad_samples` were skipped.
        """
        if not batch.damaged:
            return
        if self._settings.on_bad_sample != "skip":
            raise ValueError(
                f"{len(batch.damaged)} of {len(batch.ids)} images of epoch {batch.epoch}, step {batch.step} cannot be "
                f"decoded: {first_few(list(batch.damaged.values()))}; {REMEDY}"
            )
        self.skipped |= batch.damaged
        if len(self.skipped) > self._settings.max_bad_samples:
            raise ValueError(
                f"{len(self.skipped)} images cannot be decoded, and at most {self._settings.max_bad_samples} may be "
                f"skipped: {first_few(list(self.skipped.values()))}; {REMEDY}"
            )

    def without_undecodable(self, batch: BatchInputs) -> BatchInputs | None:
        """Replaces the samples of a batch that DALI cannot decode although their headers are intact.

        A sample is replaced if the loader's decoder or the CPU decoder fails: the GPU's may accept damaged data.

        Each sample is tried alone, in a pipeline of its own. The result then does not depend on the rest of the batch,
        and so not on the number of ranks.

        Returns:
            The batch with substitutes, or None if DALI decodes every sample alone.
        """
        ids = [sample_id for sample_id in batch.ids.tolist() if not self._decodes(batch.epoch, sample_id)]
        reasons = damaged(self._shards, np.array(ids, np.int64))
        found = {i: reasons.get(i, f"{self._shards.where(i)} (DALI cannot decode it)") for i in ids}
        return self._with_substitutes(batch, found) if found else None

    @abstractmethod
    def order(self, epoch: int) -> Ids:
        """The ids of the whole set in the order of `epoch`, from which substitutes are taken."""

    @abstractmethod
    def arrays(self, epoch: int, ids: Ids) -> dict[str, NDArray[Any]]:
        """The graph's small inputs for the samples `ids` in `epoch`, by name."""

    @abstractmethod
    def _graph(self, settings: GraphSettings) -> Graph:
        """A graph that decodes one batch."""

    def _with_images(self, batch: BatchInputs, check: bool = True) -> BatchInputs:
        jpegs = self._shards.jpegs(batch.ids)
        if check and (found := broken_images(self._shards, batch.ids, jpegs, self._settings.check_crc)):
            return self._with_substitutes(batch, found)
        from nvidia.dali.tensors import TensorCPU, TensorListCPU

        # contiguous=False keeps a list of pointers; the default would copy all images once more.
        tensors = {"jpeg": TensorListCPU([TensorCPU(jpeg) for jpeg in jpegs], contiguous=False), **batch.tensors}
        return replace(batch, tensors=tensors, jpegs=tuple(jpegs))

    def _with_substitutes(self, batch: BatchInputs, found: dict[int, str]) -> BatchInputs:
        """The batch with substitutes for the samples `found`. `accept` decides later whether they are allowed."""
        order = self.order(batch.epoch)
        before = batch.ids.tolist()
        ids = [substitute_for(self._shards, i, order) if i in found else i for i in before]
        rows = batch.substituted | {row for row, i in enumerate(before) if i in found}
        changed = self._with_images(self._batch(batch.epoch, batch.step, np.array(ids)), check=False)
        return replace(changed, damaged=batch.damaged | found, substituted=rows)

    def _decodes(self, epoch: int, sample_id: int) -> bool:
        """Whether DALI can decode this epoch's crop of one sample, whose header is intact."""
        batch = self._with_images(self._batch(epoch, 0, np.array([sample_id])), check=False)
        own = replace(graph_settings(self._settings, 1, self._shards), queue_depth=1)
        on_cpu = replace(own, device="cpu", device_id=None)
        return all(self._runs(batch, settings) for settings in dict.fromkeys((own, on_cpu)))

    def _runs(self, batch: BatchInputs, settings: GraphSettings) -> bool:
        graph = self._graph(settings)
        for name in graph.inputs:
            graph.pipeline.feed_input(name, batch.tensors[name])
        graph.pipeline.schedule_run()
        try:
            graph.pipeline.outputs()
        except RuntimeError:
            return False
        return True

    def _batch(self, epoch: int, step: int, ids: Ids) -> BatchInputs:
        arrays = self.arrays(epoch, ids)
        self._shards.read_ahead(ids)
        return BatchInputs(epoch, step, ids, _tensors(len(ids), arrays, self._residual))


class TrainPlanner(BatchPlanner):
    """The batches of training, without end."""

    def batches(self, start_epoch: int = 0, start_step: int = 0) -> Generator[BatchInputs]:
        """Yields the rank's batches without end, from `start_step` of `start_epoch` on."""
        return (self._batch(*place) for place in self.places(start_epoch, start_step))

    def places(self, start_epoch: int = 0, start_step: int = 0) -> Generator[Place]:
        """Yields epoch, step and sample ids of these batches."""
        steps = steps_per_epoch(len(self._shards), self._settings.batch)
        order = self.order(start_epoch)
        # The order of ImageNet takes a sixth of a second to compute, so the next epoch's is computed in a thread.
        with ThreadPoolExecutor(1) as pool:
            for epoch in count(start_epoch):
                next_order = pool.submit(self.order, epoch + 1)
                for step in range(start_step if epoch == start_epoch else 0, steps):
                    yield epoch, step, batch_ids(order, step, self._settings.batch, self._rank, self._ranks)
                order = next_order.result()

    def order(self, epoch: int) -> Ids:
        """All ids in the order of training."""
        return order_of(self._shards, self._settings, epoch)

    def arrays(self, epoch: int, ids: Ids) -> dict[str, NDArray[Any]]:
        """What is drawn for the samples."""
        return _drawn_arrays(self._shards, self._basis, self._settings, epoch, ids)

    def _graph(self, settings: GraphSettings) -> Graph:
        from pipeline.loader.graphs import train_graph

        return train_graph(settings, "decode")


class ViewPlanner(BatchPlanner):
    """The batches of evaluation in which the rank has samples, each once, without noise."""

    def batches(self) -> Generator[BatchInputs]:
        """Yields the rank's batches in the order of ids."""
        return (self._batch(*place) for place in self.places())

    def places(self) -> Generator[Place]:
        """Yields epoch, step and sample ids of these batches."""
        steps = evaluation_batches(len(self._shards), self._settings.batch, self._rank, self._ranks)
        for step, ids in enumerate(steps):
            if len(ids):
                yield 0, step, ids

    def order(self, epoch: int) -> Ids:
        """All ids, ascending."""
        return np.arange(len(self._shards))

    def arrays(self, epoch: int, ids: Ids) -> dict[str, NDArray[Any]]:
        """The central squares, without noise."""
        no_offset = np.zeros_like(ids)
        return {
            **_tags_and_origins(self._shards, ids, no_offset, no_offset),
            "mean": np.tile(self._basis.mean.astype(np.float32), (len(ids), 1)),
            "std": np.ones((len(ids), 3), np.float32),
        }

    def _graph(self, settings: GraphSettings) -> Graph:
        from pipeline.loader.graphs import view_graph

        return view_graph(settings, 1)


def order_of(shards: ShardSet, settings: LoaderSettings, epoch: int) -> Ids:
    """All sample ids (N,) of the set in the order of `epoch`, including the tail that does not fill a batch."""
    if settings.order == "windowed":
        return windowed_order(shards.index["shard"], settings.seed, epoch, settings.window_shards)
    return epoch_order(len(shards), settings.seed, epoch)


def mean_residual(basis: Eigenbasis, mean: Mean) -> Floats:
    """The mean minus the channel means, float32 (3, 224, 224): zeros for "channel".

    The channel means, and with them the lighting noise, are one number per channel and sample. What is left of the mean
    image is the same for all samples.
    """
    residual = mean_of(basis, mean) - mean_of(basis, "channel")
    return np.array(np.broadcast_to(residual, (3, CROP, CROP)), order="C")


def graph_settings(settings: LoaderSettings, batch: int, shards: ShardSet) -> GraphSettings:
    """The settings of a graph for batches of at most `batch` samples; ValueError if the CUDA device is missing.

    The JPEG engines get memory for `batch` times the largest image of the set, but not for a side above
    `MOST_PREALLOCATED`: DALI allocates more when a larger image comes.
    """
    from pipeline.loader.graphs import GraphSettings

    check_device(settings.device)
    device_id = torch.cuda.current_device() if settings.device == "cuda" else None
    used = settings.device == "cuda" and settings.preallocate and settings.hw_decoder_load > 0 and len(shards.index) > 0
    width, height = (int(shards.index[side].max()) if used else 0 for side in ("width", "height"))
    return GraphSettings(
        batch=batch,
        device=settings.device,
        device_id=device_id,
        threads=settings.threads,
        queue_depth=settings.queue_depth,
        hw_decoder_load=settings.hw_decoder_load,
        largest=(min(width, MOST_PREALLOCATED), min(height, MOST_PREALLOCATED)),
    )


def _drawn_arrays(
    shards: ShardSet, basis: Eigenbasis, settings: LoaderSettings, epoch: int, ids: Ids
) -> dict[str, NDArray[Any]]:
    """The graph's small inputs for the samples `ids` in `epoch`, by name."""
    draws = draw(settings.seed, epoch, ids, settings.positions)
    offsets, divisor = settings.lighting_at(epoch).offsets_and_divisor(draws.normals, basis)
    return {
        **_tags_and_origins(shards, ids, draws.left, draws.top),
        "mirror": draws.mirror.astype(np.int32)[:, None],
        # pixel - mean + offset = pixel - (mean - offset): the noise needs no pass over the pixels of its own.
        "mean": basis.mean.astype(np.float32) - offsets,
        "std": np.full((len(ids), 3), divisor, np.float32),
    }


def _tags_and_origins(shards: ShardSet, ids: Ids, left: Ids, top: Ids) -> dict[str, NDArray[Any]]:
    """The inputs `tags`, and `origin` for offsets `left` and `top` (N,) in the central square."""
    rows = shards.index[ids]
    width, height = rows["width"].astype(np.int64), rows["height"].astype(np.int64)
    return {
        "tags": np.stack([rows["label"].astype(np.int64), ids], axis=1),
        "origin": np.stack([central_origin(height) + top, central_origin(width) + left], axis=1).astype(np.int32),
    }


def _tensors(samples: int, arrays: dict[str, NDArray[Any]], residual: Floats) -> dict[str, TensorListCPU]:
    """`arrays` and the residual as DALI's own tensor type.

    `feed_input` would make the same tensors of NumPy arrays, and takes twice the time for it.
    """
    from nvidia.dali.tensors import TensorCPU, TensorListCPU

    tensors = {name: TensorListCPU(array) for name, array in arrays.items()}
    # contiguous=False keeps a list of pointers; the default would copy the residual, 600 kB, once for every sample.
    same_residual = TensorListCPU([TensorCPU(residual)] * samples, contiguous=False)
    return {"residual": same_residual, **tensors}
