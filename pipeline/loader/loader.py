"""The data loader: a shard set in, batches of float32 (N, 3, 224, 224) RGB crops out, on the loader's device.

`TrainLoader` is endless; `view_loader` goes through a set once. There is no state to save: every batch is a pure
function of (shard set, settings, epoch, step), whatever the number of ranks or threads. To resume, pass (epoch, step).
Pixel values are 0-255 minus the mean, with PCA (principal component analysis) lighting noise, as `augment.py` says. The
caller owns the batches: later batches do not overwrite them.

`LoaderSettings.library` names the library that decodes and prefetches. Each is imported only if it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import ModuleType

import torch

from pipeline.loader.augment import CROP
from pipeline.loader.batch import Batch, TrainBatches
from pipeline.loader.inputs import TrainPlanner, ViewPlanner, mean_residual
from pipeline.loader.normalise import mirror_normalise
from pipeline.loader.order import Ids, evaluation_batches, local_batch, steps_per_epoch
from pipeline.loader.settings import LoaderSettings, Stage, check_device, check_library
from pipeline.rgb_pca import Eigenbasis
from pipeline.shards.reader import ShardSet


class TrainLoader:
    """An endless iterator over one rank's part of every global batch.

    It prefetches across the ends of epochs. Use it as a context manager, or call `close`.

    Args:
        shards: the shard set.
        basis: the eigenbasis of the shard set.
        settings: how the loader works; the same on all ranks.
        start_epoch: the epoch of the first batch.
        start_step: the step of the first batch.
        rank: 0 to ranks - 1.
        ranks: how many ranks share each global batch.
        crops_only: yield crops before mirroring and normalisation. A pair of GPUs swaps them as uint8.

    Attributes:
        steps_per_epoch: global batches in an epoch.
        finish: makes the images of the crops and `rows` of a batch, bit by bit those that the loader would yield
            itself. None without `crops_only`.

    Raises:
        ValueError: the set does not fill a batch, the ranks cannot share the batch evenly, or the CUDA device is
            missing. While iterating: an image cannot be decoded and must not be skipped.
    """

    def __init__(
        self,
        shards: ShardSet,
        basis: Eigenbasis,
        settings: LoaderSettings,
        start_epoch: int = 0,
        start_step: int = 0,
        rank: int = 0,
        ranks: int = 1,
        crops_only: bool = False,
    ) -> None:
        self.steps_per_epoch = steps_per_epoch(len(shards), settings.batch)
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"start_step is {start_step}, but an epoch has {self.steps_per_epoch} steps")
        planner, rows = TrainPlanner(shards, basis, settings, rank, ranks), local_batch(settings.batch, ranks)
        make = _library(settings).TrainingBatches
        self._batches: TrainBatches = make(
            shards, basis, settings, planner, (start_epoch, start_step), rows, crops_only
        )
        self._skipped = planner.skipped
        residual = torch.from_numpy(mean_residual(basis, settings.mean)).to(settings.device) if crops_only else None
        self.finish = partial(mirror_normalise, residual=residual) if residual is not None else None

    @property
    def bad_samples(self) -> tuple[str, ...]:
        """The images that this rank has skipped so far: the place (tar, byte offset, key) and the reason of each."""
        return tuple(self._skipped.values())

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> Batch:
        return self._batches.next()

    def close(self) -> None:
        """Stops threads and processes and frees their memory. Batches that were returned stay valid."""
        self._batches.close()

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def view_loader(
    shards: ShardSet, basis: Eigenbasis, settings: LoaderSettings, views: int = 1, rank: int = 0, ranks: int = 1
) -> Iterator[Batch]:
    """Yields every sample exactly once, in the order of ids and without noise; the last batch may be short.

    With `on_bad_sample="skip"` damaged samples are left out: scores on substitutes would be wrong.

    Every rank gets the same number of batches, and its own rows of each. Of the last batch a rank may get no row.
    Exhaust the iterator or close it.

    Args:
        shards: the shard set.
        basis: the eigenbasis of the training set, whose mean is subtracted.
        settings: how the loader works; the same on all ranks.
        views: 1 for the centre crop, 10 for the corners, the centre and their mirror images (paper section 4.1).
        rank: 0 to ranks - 1.
        ranks: how many ranks share each batch.

    Raises:
        ValueError: `views` is neither 1 nor 10, the CUDA device is missing, or an image cannot be decoded.
    """
    if views not in (1, 10):
        raise ValueError(f"{views} views; choose 1 (the centre) or 10 (corners, centre and their mirror images)")
    shares = [len(ids) for ids in evaluation_batches(len(shards), settings.batch, rank, ranks)]
    nonempty = sum(share > 0 for share in shares)
    if nonempty:
        planner = ViewPlanner(shards, basis, settings, rank, ranks)
        yield from _library(settings).view_batches(shards, basis, settings, planner, views, shares[:nonempty])
    for step in range(nonempty, len(shares)):  # this rank has no row of these, but the other ranks have some
        none = torch.empty(0, dtype=torch.int64, device=settings.device)
        yield Batch(torch.empty(0, views, 3, CROP, CROP, device=settings.device), none, none, 0, step)


def stage_loader(
    shards: ShardSet, basis: Eigenbasis, settings: LoaderSettings, stage: Stage, start_step: int = 0
) -> Iterator[Ids]:
    """Yields the sample ids (N,) of `TrainLoader`'s batches without end, processed up to `stage`. For timing."""
    if stage == "full":
        with TrainLoader(shards, basis, settings, start_step=start_step) as loader:
            while True:
                yield next(loader).ids.numpy(force=True)
    planner = TrainPlanner(shards, basis, settings)
    yield from _library(settings).stage_ids(shards, settings, planner, stage, start_step)


def stage_batch_sizes(
    shards: ShardSet, basis: Eigenbasis, settings: LoaderSettings, stage: Stage, start_step: int = 0
) -> Iterator[int]:
    """Yields the batch sizes of `stage_loader`, which is the kind of iterator that `measure_throughput` needs."""
    return (len(ids) for ids in stage_loader(shards, basis, settings, stage, start_step))


def _library(settings: LoaderSettings) -> ModuleType:
    """The module that makes batches with the library of the settings.

    Raises:
        ValueError: the library is not installed, or the CUDA device is missing.
    """
    check_library(settings.library)
    check_device(settings.device)
    if settings.library == "webdataset":
        from pipeline.loader import webdataset_batches

        return webdataset_batches
    from pipeline.loader import dali_batches

    return dali_batches
