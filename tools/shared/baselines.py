"""The baselines of `bench_baselines`, each as an endless iterator of batch sizes.

All make float32 (N, 3, 224, 224) batches with random crops, mirroring, mean subtraction and PCA (principal component
analysis) lighting noise, except the bare decoder. The docstring of `bench_baselines` says how they differ.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from pipeline.loader.augment import CROP, POSITIONS, Draws, Floats, Lighting, central_origin, draw
from pipeline.loader.order import Ids, batch_ids, steps_per_epoch
from pipeline.loader.settings import LoaderSettings
from pipeline.loader.webdataset_batches import rgb_image
from pipeline.philox import epoch_order
from pipeline.rgb_pca import Eigenbasis
from pipeline.shards.reader import ShardSet

SHUFFLE_BUFFER = 1000  # samples among which webdataset draws the next one; its usual number
BATCHES_PER_THREAD = 2  # batches that each thread holds or works on
NOT_INSTALLABLE = {
    "FFCV, JPEG mode": "its package builds from source only, against headers of OpenCV and libturbojpeg",
}
BatchSizes = Callable[[], Iterator[int]]
Crops = Callable[[ShardSet, Ids, Draws], NDArray[np.uint8]]


@dataclass(frozen=True)
class Baseline:
    """Another loader to compare with.

    Attributes:
        batch_sizes: makes an endless iterator of batch sizes.
        target_ratio: the throughput that this project's loader should have relative to the baseline; None if none is
            set.
        check: raises ImportError or RuntimeError if something that the baseline needs is missing.
    """

    batch_sizes: BatchSizes
    target_ratio: float | None
    check: Callable[[], object]


def baselines_for(shards: ShardSet, basis: Eigenbasis, settings: LoaderSettings, workers: int) -> dict[str, Baseline]:
    """The baselines by name."""
    own, turbo = (partial(spdl_sizes, shards, basis, settings, crops) for crops in (_ffmpeg_crops, _turbo_crops))
    webdataset = partial(webdataset_sizes, shards, basis, settings, workers)
    return {
        "bare decoder": Baseline(partial(decoder_sizes, shards, settings), 0.85, lambda: None),
        "SPDL, own decoder": Baseline(own, 3.0, _check_spdl_io),
        "SPDL + libjpeg-turbo": Baseline(turbo, None, _check_spdl),
        "webdataset + DataLoader": Baseline(webdataset, 3.0, _check_webdataset),
    }


def reason_missing(baseline: Baseline) -> str | None:
    """Why the baseline cannot run on this machine, in one line; None if it can."""
    try:
        baseline.check()
    except (ImportError, RuntimeError) as error:
        return " ".join(str(error).split())[:160]
    return None


def _check_webdataset() -> None:
    import webdataset  # noqa: F401


def _check_spdl() -> None:
    import spdl.pipeline  # noqa: F401


def _check_spdl_io() -> None:
    import spdl.io.utils

    spdl.io.utils.get_ffmpeg_versions()  # loads the FFmpeg libraries, which the import alone does not


# ---- bare decoder -----------------------------------------------------------------------------------------------


def decoder_sizes(shards: ShardSet, settings: LoaderSettings) -> Iterator[int]:
    """Decodes with libjpeg-turbo, one batch in each thread."""

    def decode(ids: Ids) -> int:
        for jpeg in shards.jpegs(ids):
            assert simplejpeg.decode_jpeg(jpeg).shape[2] == 3
        return len(ids)

    with ThreadPoolExecutor(settings.threads) as pool:
        pending: deque[Future[int]] = deque()
        try:
            for _, ids in _endless_batches(shards, settings):
                pending.append(pool.submit(decode, ids))
                if len(pending) == BATCHES_PER_THREAD * settings.threads:
                    yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _endless_batches(shards: ShardSet, settings: LoaderSettings) -> Iterator[tuple[int, Ids]]:
    """The epoch and the sample ids of each batch of this project's loader."""
    for epoch in count():
        order = epoch_order(len(shards), settings.seed, epoch)
        for step in range(steps_per_epoch(len(shards), settings.batch)):
            yield epoch, batch_ids(order, step, settings.batch)


# ---- SPDL -------------------------------------------------------------------------------------------------------


def spdl_sizes(shards: ShardSet, basis: Eigenbasis, settings: LoaderSettings, crops: Crops) -> Iterator[int]:
    """Runs an SPDL pipeline in which each thread makes whole batches, as in SPDL's own ImageNet example."""
    from spdl.pipeline import PipelineBuilder

    def prepare(epoch_and_ids: tuple[int, Ids]) -> torch.Tensor:
        epoch, ids = epoch_and_ids
        draws = draw(settings.seed, epoch, ids, settings.positions)
        offsets, divisor = settings.lighting.offsets_and_divisor(draws.normals, basis)
        means = basis.mean.astype(np.float32) - offsets
        images = np.empty((len(ids), 3, CROP, CROP), np.float32)
        for image, crop, mean in zip(images, crops(shards, ids, draws), means, strict=True):
            _normalise(crop, mean, divisor, image)
        return torch.from_numpy(images)

    stages = PipelineBuilder().add_source(_endless_batches(shards, settings))
    stages = stages.pipe(prepare, concurrency=settings.threads).add_sink(BATCHES_PER_THREAD)
    pipeline = stages.build(num_threads=settings.threads)
    with pipeline.auto_stop():
        for images in pipeline:
            assert images.shape == (settings.batch, 3, CROP, CROP) and images.dtype == torch.float32
            yield len(images)


def _ffmpeg_crops(shards: ShardSet, ids: Ids, draws: Draws) -> NDArray[np.uint8]:
    """Mirrored crops (N, 224, 224, 3) from SPDL: FFmpeg crops and mirrors before it converts to RGB."""
    from spdl import io

    frames = []
    for jpeg, left, top, mirror in zip(shards.jpegs(ids), *_origins(shards, ids, draws), draws.mirror, strict=True):
        steps = f"crop=w={CROP}:h={CROP}:x={left}:y={top}:exact=1,{'hflip,' if mirror else ''}format=pix_fmts=rgb24"
        frames.append(io.decode_packets(io.demux_image(jpeg.tobytes()), filter_desc=steps))
    crops: NDArray[np.uint8] = io.to_numpy(io.convert_frames(frames))
    return crops


def _turbo_crops(shards: ShardSet, ids: Ids, draws: Draws) -> NDArray[np.uint8]:
    """Mirrored crops (N, 224, 224, 3) of whole images that libjpeg-turbo decodes."""
    crops = np.empty((len(ids), CROP, CROP, 3), np.uint8)
    rows = zip(crops, shards.jpegs(ids), *_origins(shards, ids, draws), draws.mirror, strict=True)
    for crop, jpeg, left, top, mirror in rows:
        window = simplejpeg.decode_jpeg(jpeg)[top : top + CROP, left : left + CROP]
        crop[:] = window[:, ::-1] if mirror else window
    return crops


def _origins(shards: ShardSet, ids: Ids, draws: Draws) -> tuple[Ids, Ids]:
    """The left (N,) and top (N,) of each crop in its stored image."""
    rows = shards.index[ids]
    width, height = rows["width"].astype(np.int64), rows["height"].astype(np.int64)
    return central_origin(width) + draws.left, central_origin(height) + draws.top


def _normalise(crop: NDArray[np.uint8], mean: Floats, divisor: float, image: Floats) -> None:
    """Fills `image` (3, 224, 224) with (crop - mean) / divisor; transposing before the cast is fastest in NumPy."""
    image[:] = np.ascontiguousarray(crop.transpose(2, 0, 1))
    image -= mean[:, None, None]
    image *= np.float32(1 / divisor)


# ---- webdataset -------------------------------------------------------------------------------------------------


def webdataset_sizes(shards: ShardSet, basis: Eigenbasis, settings: LoaderSettings, workers: int) -> Iterator[int]:
    """Runs torch's DataLoader over webdataset."""
    import webdataset

    pipeline = webdataset.WebDataset([str(tar) for tar in shards.tars], shardshuffle=len(shards.tars))
    prepare = partial(_prepare, mean=basis.mean.astype(np.float32), basis=basis, lighting=settings.lighting)
    samples = pipeline.shuffle(SHUFFLE_BUFFER).to_tuple("jpg", "cls").map(prepare).repeat()
    # The DataLoader makes the batches: its workers stack samples directly in shared memory. webdataset's own batching
    # would copy them once more.
    loader = DataLoader(samples, batch_size=settings.batch, num_workers=workers, drop_last=True)
    for images, labels in loader:
        assert images.shape == (settings.batch, 3, CROP, CROP) and images.dtype == torch.float32
        yield len(labels)


def _prepare(
    sample: tuple[bytes, bytes], mean: Floats, basis: Eigenbasis, lighting: Lighting
) -> tuple[torch.Tensor, int]:
    """Makes an image and a label of one sample with Pillow and NumPy: arithmetic on the crop only, in place."""
    jpeg, label = sample
    rng = _generator()
    image = rgb_image(jpeg)
    left, top = (
        central_origin(side) + int(offset)
        for side, offset in zip(image.size, rng.integers(0, POSITIONS, 2), strict=True)
    )
    crop = np.asarray(image.crop((left, top, left + CROP, top + CROP)))
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    offsets, divisor = lighting.offsets_and_divisor(rng.standard_normal((1, 3), dtype=np.float32), basis)
    normalised = np.empty((3, CROP, CROP), np.float32)
    _normalise(crop, mean - offsets[0], divisor, normalised)
    return torch.from_numpy(normalised), int(label)


_generators: dict[int, np.random.Generator] = {}


def _generator() -> np.random.Generator:
    """The random generator of this DataLoader worker."""
    worker: Any = torch.utils.data.get_worker_info()
    return _generators.setdefault(worker.id, np.random.default_rng(worker.seed))
