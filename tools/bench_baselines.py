"""The feed's peers, on the CPU, in one interleaved run: the same shards, the same number of threads, float32 NCHW out.

    python tools/bench_baselines.py SHARDS [--batch N] [--threads N] [--workers N] [--seconds S] [--rounds N] [--json FILE]

This feed decodes, crops 224 from the central 256, mirrors, subtracts the channel means and lights as in 2012. So do its
peers, in batches of shuffled samples, but for what is said here, all of it in their favour:

- bare decoder: libjpeg-turbo (simplejpeg) decodes the whole stored picture in threads, and nothing else is done.
- SPDL, own decoder: spdl.pipeline's threads, spdl.io (FFmpeg) for decoding, crop and mirror, NumPy for the rest. It
  gets the bytes by this project's index instead of reading tars. FFmpeg enlarges chroma in a plainer way.
- SPDL + libjpeg-turbo: the same with simplejpeg for decoding, which is no part of SPDL.
- webdataset + DataLoader: Pillow and NumPy in processes. It shuffles within a buffer, and its threads are --workers.

Prints a table with ratios, then one line of JSON. A peer that is not installed is named with the reason. Wants
SHARDS/eigenbasis.json, and the extra `peers`; SPDL's own decoder wants the system's FFmpeg libraries.
"""

from __future__ import annotations

import argparse
import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from io import BytesIO
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader

from pipeline import rgb_pca
from pipeline.loader.augment import CROP, POSITIONS, STORED, Draws, Lighting, central_origin, draw
from pipeline.loader.inputs import Ids
from pipeline.loader.loader import stage_batch_sizes
from pipeline.loader.order import batch_ids, steps_per_epoch
from pipeline.loader.settings import LoaderSettings
from pipeline.philox import epoch_order
from pipeline.profiling.throughput import Throughput, measure_throughput
from pipeline.rgb_pca import Eigenbasis
from pipeline.shards.reader import ShardSet, open_shards
from tools.shared.cli import Progress, run, write_json

FEED = "this feed"
SHUFFLED = 1000  # samples among which webdataset draws the next one, its usual number
QUEUED = 2  # batches in work for each thread
Sizes = Callable[[], Iterator[int]]


@dataclass(frozen=True)
class Peer:
    """A rival: its endless iterators of batch sizes, the speed of the feed relative to it that is wanted (None: none),
    and what it needs, tried by a call that raises ImportError or RuntimeError where it is not there."""

    sizes: Sizes
    wanted: float | None
    needs: Callable[[], object]


def main() -> int:
    """Measures and prints; returns the exit code."""
    arguments = _arguments()
    shards = open_shards(arguments.shards)
    basis = rgb_pca.load(arguments.eigenbasis or arguments.shards / "eigenbasis.json", shards)
    if len(shards.tars) < arguments.workers:
        raise ValueError(f"{len(shards.tars)} tars for {arguments.workers} workers; webdataset wants one each at least")
    changes = {} if arguments.threads is None else {"threads": arguments.threads}
    settings = LoaderSettings(batch=arguments.batch, mean="channel", **changes)
    peers = peers_of(shards, basis, settings, arguments.workers)
    absent = {name: reason for name, peer in peers.items() if (reason := _missing(peer))} | {
        "FFCV, JPEG mode": "its package builds from source only, against headers of OpenCV and libturbojpeg",
    }
    rivals: dict[str, Sizes] = {FEED: lambda: stage_batch_sizes(shards, basis, settings, "full")}
    rivals |= {name: peer.sizes for name, peer in peers.items() if name not in absent}
    with Progress("measuring", arguments.rounds * len(rivals), "windows") as progress:
        # Threads and workers may each hold batches that were ready before the clock started.
        ready = QUEUED * max(arguments.workers, settings.threads) + 1
        rates = measure_throughput(rivals, arguments.seconds, arguments.rounds, progress, ready)
    print(
        f"{arguments.shards}: {len(shards):,} samples, batch {settings.batch}, {settings.threads} threads, "
        f"{arguments.workers} DataLoader workers, {arguments.rounds} rounds of {arguments.seconds:g} s each"
    )
    ratios = {name: _ratios(rates, name) for name in rates if name != FEED}
    print(_table(rates, ratios, {name: peer.wanted for name, peer in peers.items()}))
    for name, reason in absent.items():
        print(f"{name:26}not measured: {reason}")
    record = {
        "shards": str(arguments.shards),
        "manifest_sha256": shards.manifest_sha256,
        "settings": asdict(settings),
        "workers": arguments.workers,
        "seconds": arguments.seconds,
        "rounds": arguments.rounds,
        "rates": {name: asdict(rate) for name, rate in rates.items()},
        "ratios": ratios,
        "wanted": {name: peer.wanted for name, peer in peers.items()},
        "absent": absent,
    }
    print(json.dumps(record))
    write_json(arguments.json, record)
    return 0


def peers_of(shards: ShardSet, basis: Eigenbasis, settings: LoaderSettings, workers: int) -> dict[str, Peer]:
    """The peers by name, as the module's docstring describes them."""
    turbo, own = (partial(spdl_sizes, shards, basis, settings, crops) for crops in (_turbo_crops, _spdl_crops))
    return {
        "bare decoder": Peer(partial(decoder_sizes, shards, settings), 0.85, lambda: None),
        "SPDL, own decoder": Peer(own, 3.0, _import_spdl_io),
        "SPDL + libjpeg-turbo": Peer(turbo, None, _import_spdl),
        "webdataset + DataLoader": Peer(
            partial(webdataset_sizes, shards, basis, settings, workers), 3.0, _import_webdataset
        ),
    }


def _missing(peer: Peer) -> str | None:
    """Why the peer cannot run here, in one line; None where it can."""
    try:
        peer.needs()
    except (ImportError, RuntimeError) as error:
        return " ".join(str(error).split())[:160]
    return None


def _import_webdataset() -> None:
    import webdataset  # noqa: F401


def _import_spdl() -> None:
    import spdl.pipeline  # noqa: F401


def _import_spdl_io() -> None:
    import spdl.io.utils

    spdl.io.utils.get_ffmpeg_versions()  # loads FFmpeg's libraries, which importing alone does not


def _ratios(rates: dict[str, Throughput], name: str) -> dict[str, Any]:
    """How many times as fast as peer `name` the feed is, in each round, and how many times as sparing of CPU time."""
    feed, peer = rates[FEED], rates[name]
    by_round = [mine / its for mine, its in zip(feed.rounds_img_s, peer.rounds_img_s, strict=True)]
    return {"speed": median(by_round), "speed_by_round": by_round, "cpu": peer.cpu_ms_per_img / feed.cpu_ms_per_img}


def _table(rates: dict[str, Throughput], ratios: dict[str, dict[str, Any]], wanted: dict[str, float | None]) -> str:
    """Lines for people: the rates, then the feed's relative to each peer's."""
    lines = [
        f"{'':26}{'img/s':>8}{'min':>8}{'max':>8}{'CPU ms/img':>12}{'cores':>7}  "
        f"{'feed / peer':>12}{'(rounds)':>18}{'by CPU':>8}{'wanted':>8}"
    ]
    for name, rate in rates.items():
        line = f"{name:26}{rate.img_s:8,.0f}{rate.img_s_min:8,.0f}{rate.img_s_max:8,.0f}{rate.cpu_ms_per_img:12.3f}"
        line += f"{rate.cores_used:7.2f}"
        if name in ratios:
            found, target = ratios[name], wanted[name]
            rounds = f"({min(found['speed_by_round']):.2f} to {max(found['speed_by_round']):.2f})"
            line += f"  {found['speed']:12.2f}{rounds:>18}{found['cpu']:8.2f}{f'{target:g}' if target else '-':>8}"
        lines.append(line)
    return "\n".join(lines)


# ---- bare decoding ----------------------------------------------------------------------------------------------


def decoder_sizes(shards: ShardSet, settings: LoaderSettings) -> Iterator[int]:
    """Batch sizes of libjpeg-turbo in threads, a batch to each."""

    def decode(ids: Ids) -> int:
        for jpeg in shards.jpegs(ids):
            assert simplejpeg.decode_jpeg(jpeg).shape[2] == 3
        return len(ids)

    with ThreadPoolExecutor(settings.threads) as pool:
        in_work: deque[Future[int]] = deque()
        try:
            for _, ids in _endless_batches(shards, settings):
                in_work.append(pool.submit(decode, ids))
                if len(in_work) == QUEUED * settings.threads:
                    yield in_work.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _endless_batches(shards: ShardSet, settings: LoaderSettings) -> Iterator[tuple[int, Ids]]:
    """The epoch and sample ids of the feed's own batches."""
    for epoch in count():
        order = epoch_order(len(shards), settings.seed, epoch)
        for step in range(steps_per_epoch(len(shards), settings.batch)):
            yield epoch, batch_ids(order, step, settings.batch)


# ---- SPDL -------------------------------------------------------------------------------------------------------

Crops = Callable[[ShardSet, Ids, Draws], NDArray[np.uint8]]


def spdl_sizes(shards: ShardSet, basis: Eigenbasis, settings: LoaderSettings, crops: Crops) -> Iterator[int]:
    """Batch sizes of an SPDL pipeline whose stage makes a batch in each thread, as its own ImageNet example does."""
    from spdl.pipeline import PipelineBuilder

    def prepare(work: tuple[int, Ids]) -> torch.Tensor:
        epoch, ids = work
        draws = draw(settings.seed, epoch, ids, settings.positions)
        offsets, divisor = settings.lighting.colour(draws.normals, basis)
        means = basis.mean.astype(np.float32) - offsets
        images = np.empty((len(ids), 3, CROP, CROP), np.float32)
        for image, crop, mean in zip(images, crops(shards, ids, draws), means, strict=True):
            _light(crop, mean, divisor, image)
        return torch.from_numpy(images)

    stages = PipelineBuilder().add_source(_endless_batches(shards, settings))
    stages = stages.pipe(prepare, concurrency=settings.threads).add_sink(QUEUED)
    pipeline = stages.build(num_threads=settings.threads)
    with pipeline.auto_stop():
        for images in pipeline:
            assert images.shape == (settings.batch, 3, CROP, CROP) and images.dtype == torch.float32
            yield len(images)


def _spdl_crops(shards: ShardSet, ids: Ids, draws: Draws) -> NDArray[np.uint8]:
    """Mirrored crops (N, 224, 224, 3) by SPDL: FFmpeg crops and mirrors before it makes RGB of what is left."""
    from spdl import io

    frames = []
    for jpeg, left, top, mirror in zip(shards.jpegs(ids), *_origins(shards, ids, draws), draws.mirror, strict=True):
        steps = f"crop=w={CROP}:h={CROP}:x={left}:y={top}:exact=1,{'hflip,' if mirror else ''}format=pix_fmts=rgb24"
        frames.append(io.decode_packets(io.demux_image(jpeg.tobytes()), filter_desc=steps))
    crops: NDArray[np.uint8] = io.to_numpy(io.convert_frames(frames))
    return crops


def _turbo_crops(shards: ShardSet, ids: Ids, draws: Draws) -> NDArray[np.uint8]:
    """Mirrored crops (N, 224, 224, 3) of whole pictures that libjpeg-turbo decodes."""
    crops = np.empty((len(ids), CROP, CROP, 3), np.uint8)
    rows = zip(crops, shards.jpegs(ids), *_origins(shards, ids, draws), draws.mirror, strict=True)
    for crop, jpeg, left, top, mirror in rows:
        window = simplejpeg.decode_jpeg(jpeg)[top : top + CROP, left : left + CROP]
        crop[:] = window[:, ::-1] if mirror else window
    return crops


def _origins(shards: ShardSet, ids: Ids, draws: Draws) -> tuple[Ids, Ids]:
    """Left and top of each crop in its stored picture."""
    rows = shards.index[ids]
    width, height = rows["width"].astype(np.int64), rows["height"].astype(np.int64)
    return central_origin(width) + draws.left, central_origin(height) + draws.top


def _light(crop: NDArray[np.uint8], mean: NDArray[np.float32], divisor: float, image: NDArray[np.float32]) -> None:
    """Fills `image` (3, 224, 224) with (crop - mean) / divisor; to cast last is NumPy's fastest way."""
    image[:] = np.ascontiguousarray(crop.transpose(2, 0, 1))
    image -= mean[:, None, None]
    image *= np.float32(1 / divisor)


# ---- webdataset -------------------------------------------------------------------------------------------------


def webdataset_sizes(shards: ShardSet, basis: Eigenbasis, settings: LoaderSettings, workers: int) -> Iterator[int]:
    """Batch sizes of torch's DataLoader over webdataset."""
    import webdataset

    pipeline = webdataset.WebDataset([str(tar) for tar in shards.tars], shardshuffle=len(shards.tars))
    prepare = partial(_prepare, mean=basis.mean.astype(np.float32), basis=basis, lighting=settings.lighting)
    samples = pipeline.shuffle(SHUFFLED).to_tuple("jpg", "cls").map(prepare).repeat()
    # The DataLoader makes the batch: its workers stack right into shared memory, as webdataset's own batching does not.
    loader = DataLoader(samples, batch_size=settings.batch, num_workers=workers, drop_last=True)
    for images, labels in loader:
        assert images.shape == (settings.batch, 3, CROP, CROP) and images.dtype == torch.float32
        yield len(labels)


def _prepare(
    sample: tuple[bytes, bytes], mean: NDArray[np.float32], basis: Eigenbasis, lighting: Lighting
) -> tuple[torch.Tensor, int]:
    """What the feed does to one picture, in Pillow and NumPy: arithmetic on the crop only, in float32, in place."""
    jpeg, label = sample
    rng = _generator()
    with Image.open(BytesIO(jpeg)) as encoded:
        picture = encoded.convert("RGB")
    left, top = (
        (side - STORED) // 2 + int(offset)
        for side, offset in zip(picture.size, rng.integers(0, POSITIONS, 2), strict=True)
    )
    crop = np.asarray(picture.crop((left, top, left + CROP, top + CROP)))
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    offsets, divisor = lighting.colour(rng.standard_normal((1, 3), dtype=np.float32), basis)
    image = np.empty((3, CROP, CROP), np.float32)
    _light(crop, mean - offsets[0], divisor, image)
    return torch.from_numpy(image), int(label)


_generators: dict[int, np.random.Generator] = {}


def _generator() -> np.random.Generator:
    """This worker's random generator."""
    worker: Any = torch.utils.data.get_worker_info()
    return _generators.setdefault(worker.id, np.random.default_rng(worker.seed))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, help="folder of a shard set")
    parser.add_argument("--eigenbasis", type=Path, help="default: SHARDS/eigenbasis.json")
    parser.add_argument("--batch", type=int, default=LoaderSettings.batch)
    parser.add_argument("--threads", type=int, help="of the feed and its peers; default: cores + 1, at most 8")
    parser.add_argument("--workers", type=int, default=2, help="webdataset's processes (default 2); one a core is best")
    parser.add_argument("--seconds", type=float, default=5.0, help="of one window (default 5)")
    parser.add_argument("--rounds", type=int, default=3, help="windows of each (default 3)")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
