"""The timeouts of the process groups."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed import distributed_c10d

from model.parallel.ranks import Ranks
from tests.support.rank_jobs import Job, run_ranks


def timeouts_s(ranks: Ranks) -> list[float]:
    """The timeout of every process group of this rank."""
    groups = list(distributed_c10d._world.pg_map)
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def test_every_group_of_a_pair_has_the_timeout_of_the_job(tmp_path: Path):
    """The job, the pair's activations, the pair's images and the parts of the batch."""
    [by_rank] = run_ranks(tmp_path, 2, Job(timeouts_s))
    for found in by_rank:
        assert len(found) >= 4
        assert set(found) == {60}  # as run_ranks asks for
