"""tools/bench_*.py on a tiny sample: their tables, judgements and files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from model.parallel.ranks import SINGLE_RANK
from model.shapes import NetSpec
from pipeline.shards.settings import ResizeSettings
from tests.support.shard_fixtures import drawn_jpeg
from tests.support.tool_runs import TINY, printed, tool
from tools import bench_towers
from tools.shared import pca_benchmark, pillow_loop

pytestmark = pytest.mark.slow


def test_bench_loader_prints_a_table_and_a_json_line(end_to_end: Path, tmp_path: Path):
    args = [end_to_end / "shards" / "train", "--batch", 8, "--seconds", 0.2, "--json", tmp_path / "b.json"]
    out = printed(tool("bench_loader", *args))
    record = json.loads((tmp_path / "b.json").read_text())
    assert json.loads(out.splitlines()[-1]) == record
    check = record["header_check"]
    assert check["share_of_batch"] == pytest.approx(check["s_per_image"] * record["supply"]) and "header check: " in out


def test_bench_loader_judges_a_demand(end_to_end: Path, tmp_path: Path):
    """Exit code 0 for a trainer that any loader keeps up with, 1 for one that no loader can; the report is printed."""
    args = [end_to_end / "shards" / "train", "--batch", 8, "--seconds", 0.2, "--au-threshold", 0.5]
    page, chart = tmp_path / "report.html", tmp_path / "report.svg"
    assert "compute-bound" in printed(tool("bench_loader", *args, "--demand", 200, "--plot", chart))
    assert "compute-bound" in chart.read_text()
    slow = ["--demand", 1e7, "--json", tmp_path / "b.json", "--plot", page]
    assert "input-bound" in printed(tool("bench_loader", *args, *slow), code=1)
    stall = json.loads((tmp_path / "b.json").read_text())
    assert min(1, stall["au"]) == pytest.approx(1 - sum(stall["parts"].values()))
    assert stall["au"] < stall["au_threshold"] == 0.5
    assert stall["verdict"] in page.read_text()


def test_tuned_settings_reach_training(end_to_end: Path, tmp_path: Path):
    """bench_loader --tune writes settings that train.py --tuned uses; --verify prints what it measured again."""
    shards, tuned = end_to_end / "shards" / "train", tmp_path / "tuned.json"
    args = ["--batch", 8, "--seconds", 0.05, "--demand", 1e5, "--threads", 1, "--verify", "--tune", tuned]
    out = printed(tool("bench_loader", shards, *args), code=1)
    assert "verify  " in out and "stored square: " in out
    found = json.loads(tuned.read_text())
    settings, shapes = found["settings"], found["stored_shape"]
    assert 47 in shapes.values() and min(shapes["square"], shapes["short_side"], *shapes["speedups"]) > 0
    run = ["--runs", tmp_path, "--run-name", "t", "--steps", 1, *TINY, "--stall-seconds", 0]
    printed(tool("train", shards, *run, "--tuned", tuned))
    loader = json.loads((tmp_path / "t" / "config.json").read_text())["loader"]
    assert {name: loader[name] for name in settings} == settings


def test_bench_pca_compares_passes_with_the_same_result(
    end_to_end: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A pass with another result is an error."""
    args = [end_to_end / "shards" / "train", "--workers", 1, "--seconds", 0.01, "--rounds", 2]
    out = printed(tool("bench_pca", *args, "--json", tmp_path / "b.json"))
    found = json.loads((tmp_path / "b.json").read_text())
    assert "results are identical" in out and set(found["ratios"]) == set(found["throughput"]) - {"compute_pca"}
    pass_of = pca_benchmark.pillow_moments
    monkeypatch.setattr(pca_benchmark, "pillow_moments", lambda *given: replace(pass_of(*given), pixels=1))
    printed(tool("bench_pca", *args), code=1)


def test_bench_sharding_compares_whole_runs(tmp_path: Path):
    """With more images than photographs, which are repeated; the Pillow loop makes images as make_shards does."""
    (tmp_path / "photos").mkdir()
    for number in range(2):
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(drawn_jpeg(number, 300, 280))
    out = printed(tool("bench_sharding", tmp_path / "photos", "--images", 3, "--rounds", 1, "--json", tmp_path / "j"))
    assert "3 images, 2 of them different" in out
    runs = json.loads((tmp_path / "j").read_text())["runs"]
    assert {"make_shards", "compute_pca", "Pillow loop"} <= set(runs)
    settings = ResizeSettings()
    assert (
        settings.short_side,
        settings.quality,
        settings.subsampling,
    ) == (pillow_loop.SHORT_SIDE, pillow_loop.QUALITY, pillow_loop.SUBSAMPLING)


def test_bench_towers_splits_a_step_into_its_parts():
    """A step is the sum of its parts; only layouts with several ranks wait; the slowest layout has its reason."""
    work = bench_towers.Work(NetSpec(width=0.05), batch=4, steps=2, device="cpu", precision="float32")
    pair, alone = bench_towers.measure(bench_towers.CANDIDATES[1], work), [bench_towers.take_steps(SINGLE_RANK, work)]
    found = {name: bench_towers.summary([ranks]) for name, ranks in (("one rank", alone), ("tower pair", pair))}
    for name, each in found.items():
        assert each["step_s"] == pytest.approx(sum(each[f"{part}_s"] for part in bench_towers.PARTS))
        assert (each["exchange_s"] > 0, each["swap_s"] > 0, each["sums_s"]) == (*2 * (name == "tower pair",), 0)
    slow, fast = {**found["one rank"], "step_s": 0.3, "sums_s": 0.2}, {**found["one rank"], "step_s": 0.1}
    assert bench_towers.compare({"slow": slow, "fast": fast}).splitlines() == [
        "fastest    fast",
        "           slow takes 3.00 times as long, most of it for sums (+200.0 ms)",
    ]
    assert len(bench_towers.table(found).splitlines()) == 3
