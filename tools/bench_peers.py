"""The feed against torch's DataLoader over the webdataset package, on the CPU, doing the same work on the same shards.

    python tools/bench_peers.py SHARDS [--batch N] [--threads N] [--workers N] [--seconds S] [--rounds N] [--json FILE]

Both decode whole pictures, crop 224 from the central 256, mirror, subtract the channel means, light as in 2012 and give
float32 (N, 3, 224, 224). Prints a table with ratios, then one line of JSON. Wants SHARDS/eigenbasis.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import webdataset
from bench_loader import table
from cli import Progress, run, write_json
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader

from pipeline import eigenbasis
from pipeline.augment import CROP, POSITIONS, STORED, Lighting
from pipeline.eigenbasis import Eigenbasis
from pipeline.loader import FeedSettings, stage_sizes
from pipeline.rates import measure_rates
from pipeline.shards import ShardSet, open_shards

FEED, PEER = "this feed", "webdataset + DataLoader"
SHUFFLED = 1000  # samples among which the peer draws the next one, webdataset's usual number


def main() -> int:
    """Measures and prints; returns the exit code."""
    arguments = _arguments()
    shards = open_shards(arguments.shards)
    basis = eigenbasis.load(arguments.eigenbasis or arguments.shards / "eigenbasis.json", shards)
    if len(shards.tars) < arguments.workers:
        raise ValueError(f"{len(shards.tars)} tars for {arguments.workers} workers; webdataset wants one each at least")
    changes = {} if arguments.threads is None else {"threads": arguments.threads}
    settings = FeedSettings(batch=arguments.batch, mean="channel", **changes)
    rivals = {
        FEED: lambda: stage_sizes(shards, basis, settings, "full"),
        PEER: lambda: peer_sizes(shards, basis, settings, arguments.workers),
    }
    with Progress("measuring", arguments.rounds * len(rivals), "windows") as progress:
        # The DataLoader's workers may each hold two batches that were ready before the clock started.
        rates = measure_rates(rivals, arguments.seconds, arguments.rounds, progress, 2 * arguments.workers + 1)
    by_round = [feed / peer for feed, peer in zip(rates[FEED].rounds_img_s, rates[PEER].rounds_img_s, strict=True)]
    ratio, cpu_share = median(by_round), rates[FEED].cpu_ms_per_img / rates[PEER].cpu_ms_per_img
    print(
        f"{arguments.shards}: {len(shards):,} samples, batch {settings.batch}, {settings.threads} threads against "
        f"{arguments.workers} workers, {arguments.rounds} rounds of {arguments.seconds:g} s each"
    )
    print(table(rates))
    print(
        f"the feed is {ratio:.2f} times as fast (rounds: {min(by_round):.2f} to {max(by_round):.2f}), "
        f"on {cpu_share:.2f} of the CPU time per image"
    )
    record = {
        "shards": str(arguments.shards),
        "manifest_sha256": shards.manifest_sha256,
        "settings": asdict(settings),
        "workers": arguments.workers,
        "seconds": arguments.seconds,
        "rounds": arguments.rounds,
        "rates": {name: asdict(rate) for name, rate in rates.items()},
        "ratio": ratio,
        "ratio_by_round": by_round,
        "cpu_share": cpu_share,
    }
    print(json.dumps(record))
    write_json(arguments.json, record)
    return 0


def peer_sizes(shards: ShardSet, basis: Eigenbasis, settings: FeedSettings, workers: int) -> Iterator[int]:
    """Batch sizes of the peer."""
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
    image = np.ascontiguousarray(crop.transpose(2, 0, 1)).astype(np.float32)
    image -= (mean - offsets[0])[:, None, None]
    image *= np.float32(1 / divisor)
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
    parser.add_argument("--batch", type=int, default=FeedSettings.batch)
    parser.add_argument("--threads", type=int, help="the feed's; default: cores + 1, at most 8")
    parser.add_argument("--workers", type=int, default=2, help="the peer's processes (default 2); one a core is best")
    parser.add_argument("--seconds", type=float, default=5.0, help="of one window (default 5)")
    parser.add_argument("--rounds", type=int, default=3, help="windows of each (default 3)")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
