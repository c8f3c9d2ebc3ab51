"""Samples whose image cannot be decoded: how they are found, and which sample replaces each of them.

make_shards quarantines images that cannot be decoded. A shard set therefore holds one only if its bytes were damaged
later, or if another program wrote the set. The header of every image is checked before DALI reads it. The substitute of
a bad sample is a pure function of the shard set and the epoch's order, so it is the same on any number of ranks.
"""

from __future__ import annotations

import zlib
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pipeline.loader.jpeg_headers import FAULTS, header_faults
from pipeline.loader.order import Ids
from pipeline.shards.reader import ShardSet

REMEDY = "run make_shards into a new folder, which quarantines such images"


def broken_headers(shards: ShardSet, ids: Ids, jpegs: list[NDArray[np.uint8]]) -> dict[int, str]:
    """Finds the samples among `ids` (N,) whose JPEG header cannot be parsed or whose end is missing.

    Args:
        shards: their shard set.
        ids: (N,) their ids.
        jpegs: their encoded images.

    Returns:
        For each such sample id, the place (tar, byte offset, key) and the reason.
    """
    rows = shards.index[ids]
    addresses = np.array([jpeg.ctypes.data for jpeg in jpegs], np.uint64)
    faults = header_faults(addresses, rows["size"], rows["width"], rows["height"])
    return {int(ids[row]): f"{shards.where(int(ids[row]))} ({FAULTS[faults[row]]})" for row in np.flatnonzero(faults)}


def broken_images(
    shards: ShardSet, ids: Ids, jpegs: list[NDArray[np.uint8]], check_crc: bool = False
) -> dict[int, str]:
    """Finds the samples that must not reach DALI; arguments and result are those of `broken_headers`.

    With `check_crc` it also finds those whose bytes are not the ones that were written, by the CRC-32 in index.npy.
    """
    found = broken_headers(shards, ids, jpegs)
    if check_crc:
        for sample_id, jpeg, crc32 in zip(ids.tolist(), jpegs, shards.index["crc32"][ids].tolist(), strict=True):
            if sample_id not in found and zlib.crc32(jpeg.data) != crc32:
                found[sample_id] = f"{shards.where(sample_id)} (its CRC-32 is not the one in index.npy)"
    return found


def damaged(shards: ShardSet, ids: Ids) -> dict[int, str]:
    """Finds the samples among `ids` (N,) with a broken header, and those that Pillow cannot decode.

    Returns:
        For each damaged sample id, the place (tar, byte offset, key) and the reason.
    """
    jpegs = shards.jpegs(ids)
    found = broken_headers(shards, ids, jpegs)
    for sample_id, jpeg in zip(ids.tolist(), jpegs, strict=True):
        if sample_id in found:
            continue
        try:
            with Image.open(BytesIO(jpeg.tobytes())) as image:
                image.load()
        except UnidentifiedImageError:  # Pillow's message would name an object in memory
            found[sample_id] = f"{shards.where(sample_id)} (not an image in a known format)"
        except (OSError, ValueError, SyntaxError) as error:
            found[sample_id] = f"{shards.where(sample_id)} ({error})"
    return found


def first_few(places: list[str]) -> str:
    """The first three of `places` for a message, with "..." if there are more."""
    return "; ".join(places[:3]) + ("; ..." if len(places) > 3 else "")


def substitute_for(shards: ShardSet, sample_id: int, order: Ids) -> int:
    """The sample that replaces a bad one: the first intact one from half an epoch after it, cyclically.

    Half an epoch away, a substitute is seldom in the batch already.

    Args:
        shards: the whole shard set.
        sample_id: the bad sample.
        order: (N,) the ids of the whole set in the order of the epoch.

    Raises:
        ValueError: no image of the set can be decoded.
    """
    start = int(np.flatnonzero(order == sample_id)[0]) + len(order) // 2
    for place in range(start, start + len(order)):
        candidate = order[place % len(order)]
        if not damaged(shards, candidate[None]):
            return int(candidate)
    raise ValueError(f"{shards.folder}: no image of this shard set can be decoded; {REMEDY}")
