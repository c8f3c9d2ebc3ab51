"""The switches of tools/gpu_check.py: what is counted, how variants alternate, and the plan of its time."""

from __future__ import annotations

import json
import sys
from itertools import groupby
from pathlib import Path

import pytest
import torch

from model.batch import Batch
from model.recipe import PRECISIONS
from pipeline import rgb_pca
from pipeline.loader.settings import LoaderSettings
from pipeline.shards.reader import open_shards
from tests.support.shard_fixtures import basis_of, sample, write_set
from tools import gpu_check
from tools.shared import loader_switches
from tools.shared.gpu_plan import TimePlan, planned_s
from tools.shared.operator_counts import StepCounts, count_step
from tools.shared.step_switches import VARIANTS, Rig, Step, eager, format_switches, measure_switches

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards")
    rgb_pca.save(basis_of(write_set(path, [sample(n) for n in range(17)])), rgb_pca.eigenbasis_path(path))
    return path


# ---- counting -------------------------------------------------------------------------------------------------------


def test_operators_and_bytes_are_those_of_a_count_by_hand():
    """Views and allocations cost nothing; an operator in place reads and writes."""
    x, y = torch.ones(4, 8), torch.ones(8)  # 128 and 32 bytes
    assert count_step(lambda: x.t().reshape(2, 16)[0]).bytes == 256  # the copy that `reshape` has to make
    assert count_step(lambda: (x.view(32), torch.empty(9), x[1:].t())) == StepCounts(0, 0)
    assert count_step(lambda: x + y) == StepCounts(1, 128 + 32 + 128)
    assert count_step(lambda: x.mul_(2)) == StepCounts(1, 128 + 128)
    assert count_step(lambda: torch.sub(x, y, out=torch.empty(4, 8))).launches == 1
    assert count_step(lambda: (x * y).sum()) == StepCounts(2, 288 + 132)
    assert count_step(lambda: torch._foreach_add_([x, y], 1)) == StepCounts(1, 2 * (128 + 32))  # a list in place


def test_the_bounds_are_bytes_and_launches_alone():
    assert StepCounts(launches=10, bytes=1000).bounds_img_s(5, 2000, 0.1) == {"memory": 10.0, "launches": 5.0}


# ---- the training step ------------------------------------------------------------------------------------------


def test_variants_alternate_and_a_broken_one_does_not_stop_the_others():
    """Each variant has a window in every round. One fails when it is made, one in its last window."""
    calls = list[str]()

    def variant(name: str, fails_at: int = 10**9) -> Step:
        weight = torch.ones(3)

        def step(batch: Batch) -> None:
            calls.append(name)
            if calls.count(name) >= fails_at:
                raise RuntimeError("out of memory")
            weight.add_(1)

        return step

    def impossible(rig: Rig) -> Step:
        raise ValueError("needs Triton")

    table = {
        "default": lambda rig: variant("default"),
        "impossible": impossible,
        "breaks": lambda rig: variant("breaks", fails_at=8),
        "other": lambda rig: variant("other"),
    }
    found = measure_switches(Rig(CPU), rows=2, budget_s=1e-6, rounds=3, variants=table)
    one = found["variants"]
    assert one["impossible"]["failed"] == "ValueError: needs Triton" and "Traceback" in one["impossible"]["traceback"]
    assert one["breaks"]["failed"] == "RuntimeError: out of memory"
    for name in ("default", "other"):
        assert len(one[name]["img_s"]) == 3 and one[name]["launches"] == 1 and one[name]["bytes"] == 24
        assert one[name]["estimated_img_s"] == min(one[name]["bounds_img_s"].values()) > 0
    assert one["default"]["over_default"] == 1
    turns = [name for name, _ in groupby(calls) if name != "breaks"]
    assert [name for name, _ in groupby(turns)] == ["default", "other"] * 4  # warm-up, then three rounds
    text = format_switches(2, found).splitlines()
    assert len(text) == 5 and "needs Triton" in text[2] and max(map(len, text)) <= 120


def test_a_real_step_is_measured_beside_its_estimate():
    """A small network on the CPU, with a variant that changes the new network."""
    arranged = list[object]()
    table = {"default": eager, "arranged": lambda rig: eager(rig, arrange=arranged.append)}
    found = measure_switches(Rig(CPU, 0.05), rows=2, budget_s=0.01, rounds=1, variants=table)
    assert found["device"]["bytes_per_s"] > 0 and found["device"]["launch_s"] > 0
    for name in table:
        one = found["variants"][name]
        assert one["img_s"][0] > 0 and one["launches"] > 100 and one["bytes"] > 1e6
    assert len(arranged) == 1


def test_the_first_variant_is_the_one_that_others_are_compared_with():
    assert next(iter(VARIANTS)) == next(iter(loader_switches.VARIANTS)) == "default"
    assert loader_switches.VARIANTS["default"] == {}


# ---- the loader -------------------------------------------------------------------------------------------------


def test_loader_switches_on_the_cpu(folder: Path):
    """Each variant is measured. A set that does not fill a batch is named."""
    shards = open_shards(folder)
    basis, settings = rgb_pca.load_for(shards), LoaderSettings(batch=8, threads=1)
    found = loader_switches.measure_loader_switches(shards, basis, settings, 0.06, 2)
    assert list(found) == list(loader_switches.VARIANTS)
    assert all(len(one["rounds_img_s"]) == 2 and one["img_s"] > 0 for one in found.values())
    large = LoaderSettings(batch=18, threads=1)
    assert "17 images" in loader_switches.measure_loader_switches(shards, basis, large, 0.06, 2)["skipped"]
    assert "CUDA" in loader_switches.measure_engines(shards, basis, settings, 0.1)["skipped"]


# ---- the plan ---------------------------------------------------------------------------------------------------


def test_all_checks_are_planned_and_end_within_eight_minutes():
    """With both stored shapes and every precision."""
    plan = planned_s(gpu_check.Scale(), sets=2, precisions=max(3, len(PRECISIONS)))
    assert set(plan) == set(gpu_check.CHECKS) and sum(plan.values()) < 8 * 60


def test_a_check_for_which_no_time_is_left_is_named_with_the_command():
    now_s = [100.0]
    plan = TimePlan.begun({"a": 30.0, "b": 40.0}, 60.0, lambda: now_s[0])
    assert plan.no_time_for("a") is None and plan.no_time_for("b") is None
    now_s[0] += 25
    assert plan.no_time_for("a") is None and "35 s are left; run it with --only b" in str(plan.no_time_for("b"))
    assert str(plan) == "planned seconds: a 30, b 40; 70 of 60"


def test_the_tool_prints_its_plan_and_skips_what_would_be_late(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    args = [folder, "--device", "cpu", "--quick", "--out", tmp_path, "--only", "engines", "pair", "--minutes", 0.1]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *map(str, args)])
    assert gpu_check.main() == 0
    (path,) = tmp_path.glob("gpu-cpu-*.json")
    checks = json.loads(path.read_text())["checks"]
    assert "CUDA" in checks["engines"]["skipped"] and "run it with --only pair" in checks["pair"]["skipped"]
    assert capsys.readouterr().out.startswith("planned seconds: engines 0, pair 40; 40 of 6\n")
