"""What two ranks do to compare a swap of uint8 crops with a swap of float32 images."""

from __future__ import annotations

from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from model.parallel.exchange import step_bytes
from model.parallel.half_batches import whole_batches
from model.parallel.ranks import Ranks
from model.recipe import SOURCE2012
from model.shapes import NetSpec

BATCHES, BATCH = 5, 8  # with 27 samples the fourth batch begins another epoch


def both_swaps(ranks: Ranks, folder: Path) -> list[dict[str, Any]]:
    """The batches of a pair, and the bytes that this rank sent for each: images swapped, then crops."""
    from pipeline.loader.loader import TrainLoader
    from pipeline.loader.settings import LoaderSettings
    from pipeline.rgb_pca import load_for
    from pipeline.shards.reader import open_shards

    shards = open_shards(folder)
    settings, place = LoaderSettings(batch=BATCH, threads=1), ranks.place
    found = []
    for crops in (False, True):
        ranks.sent.clear()
        with (
            TrainLoader(shards, load_for(shards), settings, rank=place.rank, ranks=2, crops_only=crops) as loader,
            closing(whole_batches(islice(loader, BATCHES), ranks, finish=loader.finish)) as batches,
        ):
            taken = [(torch.clone(b.images), torch.clone(b.labels), b.epoch, b.step) for b in batches]
        calculated = step_bytes(place, NetSpec(5), SOURCE2012, BATCH, crops=crops)["images"]
        found.append({"batches": taken, "bytes": ranks.sent["images"] / BATCHES, "calculated": calculated})
    return found
