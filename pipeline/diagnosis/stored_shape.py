"""Would a loader of stored squares be faster? Stores images of a set in both shapes, so that both can be measured.

Both temporary sets are transcoded from the set at hand, so neither has the better JPEGs. Both are small enough to stay
in memory: the comparison is of decoding, and leaves out that squares are fewer bytes to read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from pipeline.diagnosis.tuning import DEMAND_HEADROOM
from pipeline.imagenet.listing import Item, Items, Listing
from pipeline.loader.loader import stage_batch_sizes
from pipeline.loader.settings import LoaderSettings
from pipeline.profiling.stages import STAGE_ROUNDS
from pipeline.profiling.throughput import Throughput, measure_throughput
from pipeline.rgb_pca import Eigenbasis
from pipeline.shards.build import make_split
from pipeline.shards.reader import ShardSet, open_shards
from pipeline.shards.settings import STORED_SHAPES, ResizeSettings, ShardSettings
from pipeline.workers import IN_PROCESS, ignore

COMPARED_IMAGES = 1024  # 40 MB for both sets, which take seconds to make
MIN_SPEEDUP = 1.03  # in every round: for less it is not worth to shard again


@dataclass(frozen=True)
class StoredShapes:
    """Throughput of the loader alone, of the same images in both stored shapes.

    Attributes:
        images: number of images in each set.
        square: img/s of images stored as central squares.
        short_side: img/s of images stored whole, by their short side.
        speedups: square over short side in each round.
    """

    images: int
    square: float
    short_side: float
    speedups: tuple[float, ...]

    @classmethod
    def of(cls, images: int, square: Throughput, short_side: Throughput) -> StoredShapes:
        """From throughputs that were measured in turn."""
        rounds = zip(square.rounds_img_s, short_side.rounds_img_s, strict=True)
        return cls(images, square.img_s, short_side.img_s, tuple(ours / theirs for ours, theirs in rounds))

    def needed(self, demand: float) -> bool:
        """Whether a demand (img/s) requires squares: the short side is too slow, and squares gain in every round."""
        return self.short_side < DEMAND_HEADROOM * demand and min(self.speedups) >= MIN_SPEEDUP

    def __str__(self) -> str:
        gain = self.square / self.short_side - 1
        rounds = f"{min(self.speedups) - 1:+.0%} to {max(self.speedups) - 1:+.0%}"
        return (
            f"stored square: {self.square:,.0f} img/s, short-side {self.short_side:,.0f} ({gain:+.0%}, rounds {rounds})"
            f", the loader alone, {self.images:,} images"
        )


def has_whole_images(shards: ShardSet) -> bool:
    """Whether squares can be cut from the set: make_shards wrote it, with --stored short-side."""
    return shards.manifest.settings.get("stored") == "short-side"


@contextmanager
def both_shapes(
    shards: ShardSet, images: int = COMPARED_IMAGES, progress: Callable[[int], None] = ignore
) -> Iterator[dict[str, ShardSet]]:
    """Temporary sets of the same images in both stored shapes, by shape; the end of the block removes them.

    Args:
        shards: a set that `has_whole_images`. The temporary sets are transcoded with its own settings.
        images: at most this many, evenly spread over the set.
        progress: counts every image twice.
    """
    assert has_whole_images(shards)
    listing, own = spread(shards, images), shards.manifest.settings
    resize = ResizeSettings(**{field.name: own[field.name] for field in fields(ResizeSettings)})
    with TemporaryDirectory(prefix="stored-shape-") as folder:
        sets = {}
        for shape in STORED_SHAPES:
            settings = ShardSettings(replace(resize, stored=shape), own["seed"])
            make_split(listing, Path(folder, shape), settings, IN_PROCESS, len(listing.items), progress)
            sets[shape] = open_shards(Path(folder, shape, listing.split))
        yield sets


def measure_shapes(
    sets: dict[str, ShardSet],
    basis: Eigenbasis,
    settings: LoaderSettings,
    seconds: float,
    progress: Callable[[int], None] = ignore,
) -> StoredShapes:
    """Measures the loader alone on the sets of `both_shapes`, in turn, STAGE_ROUNDS windows of `seconds` each."""
    images = len(sets["square"])
    settings = replace(settings, batch=min(settings.batch, images))
    factories = {shape: partial(stage_batch_sizes, shards, basis, settings, "full") for shape, shards in sets.items()}
    measured = measure_throughput(factories, seconds, STAGE_ROUNDS, progress, settings.prefetched_batches)
    return StoredShapes.of(images, measured["square"], measured["short-side"])


def spread(shards: ShardSet, images: int) -> Listing:
    """At most so many images of the set, evenly spread over its tars, as a source to shard from."""
    number = min(images, len(shards))
    ids, tars = np.arange(number) * len(shards) // number, shards.tars
    rows = shards.index[ids]
    columns = (rows[name].tolist() for name in ("shard", "label", "offset", "size"))
    items = (
        Item(shards.key(sample_id), label, tars[shard], offset, size)
        for sample_id, shard, label, offset, size in zip(ids.tolist(), *columns, strict=True)
    )
    return Listing("shards", shards.manifest.split, shards.manifest.classes, Items.of(items))
