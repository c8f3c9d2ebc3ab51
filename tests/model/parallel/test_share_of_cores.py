"""Each rank of a machine gets its share of the cores that the job may use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from model.parallel.ranks import cores_of_rank, share_cores


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Torch has four threads before the test."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("ranks", "cores", "omp", "share"),
    [
        (1, 8, None, 4),  # torch's own choice stays
        (1, 1, None, 1),  # a CPU quota of one core
        (2, 16, "1", 8),  # torchrun's default says nothing
        (4, 2, None, 1),
        (2, 16, "3", 4),  # the user has chosen
        (2, None, None, 4),
    ],
)
def test_ranks_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, ranks: int, cores: int | None, omp: str | None, share: int
):
    if ranks > 1:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    if omp:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    share_cores(cores)
    assert torch.get_num_threads() == share
    assert cores is None or cores_of_rank(cores) == max(1, cores // ranks)
