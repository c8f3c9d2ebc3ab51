"""Would a feed of stored squares be faster? Pictures of a set, stored either way once more, and measured in turn.

Both sets are made alike, of the set at hand, so that neither has the better JPEGs, and both are small enough to stay in
memory: this compares decoding, and leaves out that squares are fewer bytes to read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from pipeline.diagnosis.tuning import HEADROOM
from pipeline.imagenet.listing import Item, Items, Listing
from pipeline.profiling.throughput import Throughput
from pipeline.shards.build import ShardSettings, make_split
from pipeline.shards.reader import ShardSet, open_shards
from pipeline.shards.transcode import STORED_SHAPES, ResizeSettings
from pipeline.workers import IN_PROCESS, ignore

PICTURES = 1024  # 40 MB for both sets, and seconds to make them
WORTH = 1.03  # times as fast: for less nobody should shard again


@dataclass(frozen=True)
class StoredShapes:
    """img/s of the feed alone, of the same `pictures` stored as squares and by their short side; how many times as fast
    squares were in each round."""

    pictures: int
    square: float
    short_side: float
    times: tuple[float, ...]

    @classmethod
    def of(cls, pictures: int, square: Throughput, short_side: Throughput) -> StoredShapes:
        """From rates that were measured in turn."""
        rounds = zip(square.rounds_img_s, short_side.rounds_img_s, strict=True)
        return cls(pictures, square.img_s, short_side.img_s, tuple(ours / theirs for ours, theirs in rounds))

    def needed(self, demand: float) -> bool:
        """Whether the demand (img/s) asks for squares: the short side does not do, and they gain in every round."""
        return self.short_side < HEADROOM * demand and min(self.times) >= WORTH

    def __str__(self) -> str:
        gain = self.square / self.short_side - 1
        return (
            f"stored square: {self.square:,.0f} img/s, short-side {self.short_side:,.0f} ({gain:+.0%}, rounds"
            f" {min(self.times) - 1:+.0%} to {max(self.times) - 1:+.0%}), the feed alone, {self.pictures:,} pictures"
        )


def has_whole_images(shards: ShardSet) -> bool:
    """Whether squares can be cut from the set: it is one of make_shards, and stored by the short side."""
    return shards.manifest.settings.get("stored") == "short-side"


@contextmanager
def both_shapes(
    shards: ShardSet, pictures: int = PICTURES, progress: Callable[[int], None] = ignore
) -> Iterator[dict[str, ShardSet]]:
    """`pictures` of the set at most, spread over it, as temporary sets by stored shape, which the block's end removes.
    They are transcoded with the set's own settings; `progress` counts every picture twice."""
    assert has_whole_images(shards)
    listing, own = spread(shards, pictures), shards.manifest.settings
    resize = ResizeSettings(**{field.name: own[field.name] for field in fields(ResizeSettings)})
    with TemporaryDirectory(prefix="stored-shape-") as folder:
        sets = {}
        for shape in STORED_SHAPES:
            settings = ShardSettings(replace(resize, stored=shape), own["seed"])
            make_split(listing, Path(folder, shape), settings, IN_PROCESS, len(listing.items), progress)
            sets[shape] = open_shards(Path(folder, shape, listing.split))
        yield sets


def spread(shards: ShardSet, pictures: int) -> Listing:
    """`pictures` of the set, or all of fewer, evenly over its tars, as a source for the sharder."""
    number = min(pictures, len(shards))
    ids, tars = np.arange(number) * len(shards) // number, shards.tars
    rows = shards.index[ids]
    columns = (rows[name].tolist() for name in ("shard", "label", "offset", "size"))
    items = (
        Item(shards.key(sample_id), label, tars[shard], offset, size)
        for sample_id, shard, label, offset, size in zip(ids.tolist(), *columns, strict=True)
    )
    return Listing("shards", shards.manifest.split, shards.manifest.classes, Items.of(items))
