"""tools/gpu_check.py on the CPU, small; and the profile of a training step."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from model.dropout import DropoutDraws
from model.parallel.ranks import SINGLE_RANK, Ranks
from model.recipe import PRECISIONS_OF
from model.step_profile import KINDS, REST, step_shares
from model.train_step import train_step
from model.trainer import wait_for
from pipeline import rgb_pca
from pipeline.profiling.machine import describe_gpus
from tests.support.rank_jobs import global_batch, make, part
from tests.support.shard_fixtures import basis_of, sample, write_set
from tools import gpu_check


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard set of two batches of the quick checks, with its eigenbasis."""
    path = tmp_path_factory.mktemp("shards")
    rgb_pca.save(basis_of(write_set(path, [sample(n) for n in range(17)])), rgb_pca.eigenbasis_path(path))
    return path


@dataclass(frozen=True)
class Check:
    """Runs the tool in this process; returns its exit code and its record."""

    out: Path
    monkeypatch: pytest.MonkeyPatch

    def __call__(self, *args: object) -> tuple[int, dict[str, Any]]:
        """With --device cpu --quick and the given arguments."""
        given = ["gpu_check.py", *args, "--device", "cpu", "--quick", "--out", self.out]
        self.monkeypatch.setattr(sys, "argv", list(map(str, given)))
        code = gpu_check.main()
        (path,) = self.out.glob("gpu-cpu-*.json")
        return code, json.loads(path.read_text())


def mean_and_worst(pixels: dict[str, Any]) -> list[float]:
    """Differences from the reference in pixel values: mean over all images, and of the worst image."""
    return list(pixels.values())[:2]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    return Check(tmp_path / "benchmarks", monkeypatch)


def test_the_checks_run_small_on_the_cpu(check: Check, folder: Path):
    """Pixels, supply for every setting and stored shape, demand for every precision; a skipped check says why."""
    code, record = check(folder, "--square", folder, "--only", "tests", "pixels", "supply", "demand")
    checks, scale = record["checks"], gpu_check.QUICK
    assert (code, list(checks)) == (0, ["tests", "pixels", "supply", "demand"])
    assert "CUDA" in checks["tests"]["skipped"]
    assert mean_and_worst(checks["pixels"])[0] < 1e-3 and checks["pixels"]["same_again"]
    for stored in ("short-side", "square"):
        assert len(checks["supply"][stored]) == len(scale.hw_decoder_loads) + len(scale.threads)
        assert all(throughput["img_s"] > 0 for throughput in checks["supply"][stored].values())
    for precision in PRECISIONS_OF["cpu"]:
        assert len(checks["demand"][f"batch {scale.replay_batches[0]}, {precision}"]) == scale.rounds
    assert record["versions"]["torch"] == torch.__version__ and record["device"] == "cpu"


def test_a_broken_check_does_not_stop_the_others(check: Check, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_check, "QUICK", replace(gpu_check.QUICK, batch=18))
    code, record = check(folder, "--only", "pixels", "supply", "tests")
    assert code == 1 and "skipped" in record["checks"]["tests"]
    for name in ("pixels", "supply"):
        assert "17 samples do not fill one batch of 18" in record["checks"][name]["failed"]


def test_a_failed_check_keeps_its_figures(check: Check, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(gpu_check.PIXEL_VALUE_THRESHOLDS, "cpu", 0.0)
    code, record = check(folder, "--only", "pixels")
    found = record["checks"]["pixels"]
    assert code == 1 and "below 0 pixel values" in found["failed"]
    mean, worst = mean_and_worst(found)
    assert found["labels_right"] and found["same_again"] and 0 < mean <= worst


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_it_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", str(folder)])
    with pytest.raises(ValueError, match="no CUDA device"):
        gpu_check.main()


X, W, ROWS = torch.ones(2, 8, 9, 9), torch.ones(8, 8, 3, 3), torch.ones(5, 9)
ONE_KIND: dict[str, Callable[[], object]] = {
    "convolutions": lambda: F.conv2d(X, W),
    "fully connected": lambda: F.linear(X, ROWS),
    "pooling": lambda: F.max_pool2d(X, 3),
    REST: lambda: X.relu(),
}


@pytest.mark.parametrize("kind", ONE_KIND)
def test_work_of_one_kind_is_all_of_that_kind(kind: str):
    assert step_shares(ONE_KIND[kind], torch.device("cpu")) == {**dict.fromkeys((*KINDS, REST), 0.0), kind: 1.0}


ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_a_step_is_the_sum_of_its_kinds(device: str):
    """In forward pass, backward pass and optimizer step every kind of work has a share."""
    ranks = SINGLE_RANK if device == "cpu" else Ranks(device=torch.device(device))
    model, optimizer, _ = make(ranks)
    batch = part(global_batch(0, 0, 2), ranks)

    def step() -> None:
        train_step(model, optimizer, batch, DropoutDraws(0, 0))
        wait_for(ranks.device)

    found = step_shares(step, ranks.device)
    assert list(found) == [*KINDS, REST] and sum(found.values()) == pytest.approx(1)
    assert all(share > 0 for share in found.values())


def test_gpus_are_those_that_the_driver_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """There are none without nvidia-smi, and none if it fails."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe_gpus() == []
    tool = tmp_path / "nvidia-smi"
    for code, expected in ((0, ["a, 8 MiB, 1.2", "b, 9 MiB, 1.2"]), (9, [])):
        tool.write_text(f"#!/bin/sh\necho 'a, 8 MiB, 1.2'\necho 'b, 9 MiB, 1.2'\nexit {code}\n")
        tool.chmod(0o755)
        assert describe_gpus() == expected
