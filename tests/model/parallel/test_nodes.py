"""Training on two nodes, each with a torchrun of its own, here on the loopback interface of one machine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from model.parallel.mesh import Place
from tests.support.rank_tools import ended, losses, start_nodes, start_ranks, wait_for_step, workers
from tools.shared import run_description

STEPS = 6  # an epoch has 5
CROSSING = "the ranks of a pair are on two nodes, and all these bytes cross the network in every step"


def test_a_node_that_dies_and_comes_back_resumes_to_the_losses_of_one_node(shard_root: Path, tmp_path: Path):
    """Two pairs, one on each node. The first node ends by itself when the other one dies."""
    options = ["--runs", tmp_path, "--steps", STEPS, "--device", "cpu", "--save-every", 2]
    for rank in start_ranks(4, shard_root / "train", *options, "--run-name", "one"):
        ended(rank)
    args = [shard_root / "train", *options, "--run-name", "two"]
    nodes = start_nodes(2, 2, *args)
    wait_for_step(tmp_path / "two", 3, nodes[0])
    ranks = workers(nodes[1])
    for process in (nodes[1], *ranks.values()):
        process.kill()
    nodes[1].communicate()
    out, _ = nodes[0].communicate(timeout=120)
    assert nodes[0].returncode != 0
    assert "ranks      4 over gloo: 2 parts of the batch" in out and CROSSING not in out
    again = [ended(node) for node in start_nodes(2, 2, *args, "--resume")]
    assert "resumed    after optimizer step" in "".join(again)
    assert [step for step, _ in losses(tmp_path / "two")] == list(range(1, STEPS + 1))
    assert losses(tmp_path / "two") == losses(tmp_path / "one")


@pytest.mark.parametrize(
    ("world", "node_ranks", "layout", "crosses"),
    [(4, 2, "towers", 0), (2, 1, "towers", 1), (6, 3, "towers", 1), (6, 3, "data", 0), (2, 2, "towers", 0)],
)
def test_a_pair_on_two_nodes_is_described_with_its_cost(
    world: int, node_ranks: int, layout: Any, crosses: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(node_ranks))
    monkeypatch.setattr(run_description, "step_bytes", lambda *_: {"sums": 4})
    monkeypatch.setattr(run_description, "swaps_crops", lambda _: False)
    ranks = SimpleNamespace(place=Place.of(0, world, layout), backend="gloo", shared_gpu=False)
    settings = {"loop": SimpleNamespace(precision="float32"), "loader": SimpleNamespace(batch=8)}
    job: Any = SimpleNamespace(ranks=ranks, spec=None, recipe=None, **settings)
    assert "\n".join(run_description._describe_ranks(job)).count(CROSSING) == crosses
