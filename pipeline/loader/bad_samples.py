"""Pictures that cannot be decoded: which they are, and what a batch shows instead of them.

make_shards quarantines such pictures, so a set has them only where its bytes were damaged later, or where something
else wrote it. What stands in for one is a pure function of the set and its epoch's order, on any number of ranks.
"""

from __future__ import annotations

from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pipeline.shards.reader import ShardSet

Ids = NDArray[np.int64]
END_OF_JPEG = b"\xff\xd9"
REMEDY = "run make_shards again into a new folder, which quarantines such pictures"


def damaged(shards: ShardSet, ids: Ids) -> dict[int, str]:
    """The samples among `ids` that Pillow cannot decode: by id, where they are, and why."""
    found = {}
    for sample_id, jpeg in zip(ids.tolist(), shards.jpegs(ids), strict=True):
        try:
            with Image.open(BytesIO(jpeg.tobytes())) as picture:
                picture.load()
            if not jpeg.tobytes().endswith(END_OF_JPEG):
                raise ValueError("the end is missing")
        except UnidentifiedImageError:  # its own words name an object in memory
            found[sample_id] = f"{shards.where(sample_id)} (no picture)"
        except (OSError, ValueError, SyntaxError) as error:
            found[sample_id] = f"{shards.where(sample_id)} ({error})"
    return found


def several(places: list[str]) -> str:
    """The first few of many."""
    return "; ".join(places[:3]) + ("; ..." if len(places) > 3 else "")


def substitute_for(shards: ShardSet, sample_id: int, order: Ids) -> int:
    """The sample shown instead of a bad one: the first sound one in the epoch's `order` of the whole set, from half an
    epoch away on, so that a batch seldom shows one twice. ValueError where the set has none."""
    start = int(np.flatnonzero(order == sample_id)[0]) + len(order) // 2
    for place in range(start, start + len(order)):
        candidate = order[place % len(order)]
        if not damaged(shards, candidate[None]):
            return int(candidate)
    raise ValueError(f"{shards.folder}: no picture of this set can be decoded; {REMEDY}")
