"""A pair that swaps uint8 crops gets the images of a pair that swaps float32 images, for a quarter of the bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from model.parallel.half_batches import swaps_crops, whole_batches
from model.parallel.mesh import Place
from model.parallel.ranks import Ranks
from pipeline import rgb_pca
from tests.support import crop_jobs
from tests.support.loader_fixtures import settings, take
from tests.support.rank_jobs import Job, run_ranks
from tests.support.shard_fixtures import basis_of, sample, write_set


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("crop_swap")
    shards = write_set(path, [sample(number) for number in range(27)])
    rgb_pca.save(basis_of(shards), rgb_pca.eigenbasis_path(path))
    return path


@pytest.fixture(scope="module")
def swaps(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    (ranks,) = run_ranks(tmp_path_factory.mktemp("ranks"), 2, Job(crop_jobs.both_swaps, (folder,)))
    return ranks


def test_images_are_bit_identical_to_those_of_a_swap_of_images_and_of_one_rank(swaps: Any, folder: Path):
    from pipeline.shards.reader import open_shards

    shards = open_shards(folder)
    whole = take(shards, rgb_pca.load_for(shards), crop_jobs.BATCHES, settings(batch=crop_jobs.BATCH))
    for as_images, as_crops in swaps:
        for batch, images, crops in zip(whole, as_images["batches"], as_crops["batches"], strict=True):
            for found in (images, crops):
                assert torch.equal(found[0], batch.images) and torch.equal(found[1], batch.labels)
                assert found[2:] == (batch.epoch, batch.step)


def test_a_quarter_of_the_bytes_crosses(swaps: Any):
    for as_images, as_crops in swaps:
        for swap in (as_images, as_crops):
            assert swap["bytes"] == swap["calculated"]
        assert as_crops["bytes"] == pytest.approx(as_images["bytes"] / 4, rel=2e-4)


def test_pairs_of_gpus_swap_crops():
    """On the CPU one compiled operator makes images while it decodes; a rank without a partner swaps nothing."""
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert swaps_crops(Ranks(Place(0, 2, 2), gpu))
    assert not swaps_crops(Ranks(Place(0, 2, 2), cpu)) and not swaps_crops(Ranks(Place(0, 1, 1), gpu))
    with pytest.raises(AssertionError):  # nothing would make images of the crops
        next(whole_batches(iter([]), Ranks(), finish=lambda crops, rows: crops))
