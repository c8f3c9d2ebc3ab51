"""The tools as a user runs them: the whole road on a tiny sample, and one clear line for every wrong input."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from model.parallel.ranks import SINGLE_RANK
from model.shapes import NetSpec
from pipeline import rgb_pca
from tests.support.shard_fixtures import basis_of, sample, write_set
from tools import bench_towers

ROOT = Path(__file__).parents[2]
TINY = ["--width", "0.05", "--batch", "8", "--log-every", "1", "--stall-seconds", "0.2"]


def tool(name: str, *args: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs tools/NAME.py as the README does."""
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def called(
    name: str, *args: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> subprocess.CompletedProcess[str]:
    """The same in this process, which spares the seconds that a process takes to begin."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr()
    return subprocess.CompletedProcess(sys.argv, int(ended.value.code or 0), said.out, said.err)


def ran(done: subprocess.CompletedProcess[str], code: int = 0) -> str:
    """What it printed, if it ended with `code`."""
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def losses(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sample, shards, eigenbasis and a short run (48 images: 6 steps an epoch, 2 epochs), each made by its tool."""
    root = tmp_path_factory.mktemp("road")
    ran(tool("make_sample", root / "sample", "--classes", 3, "--train", 16, "--val", 4, "--workers", 1))
    ran(tool("make_shards", root / "sample", root / "shards", "--workers", 2, "--shard-samples", 20))
    ran(tool("compute_pca", root / "shards" / "train", "--workers", 1, "--json", root / "pca.json"))
    shards = root / "shards"
    out = ran(
        tool(
            "train", shards / "train", "--val", shards / "val", "--runs", root, "--run-name", "a", "--epochs", 2, *TINY
        )
    )
    assert "verdict" in out
    return root


def test_the_road_leaves_what_it_says(road: Path):
    run = road / "a"
    steps = 47 // 8
    assert [step for step, _ in losses(run)] == list(range(1, 2 * steps + 1))
    validations = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum("val_top1" in line for line in validations) == 2
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"step-{n * steps:09d}" for n in (1, 2)]
    config = json.loads((run / "config.json").read_text())
    assert config["must_match"]["recipe"]["name"] == "source2012"
    stall = json.loads((run / "stall.json").read_text())
    assert stall["au"] == pytest.approx(1 - sum(stall["parts"].values()))
    assert stall["fingerprint"]["manifest_sha256"] == config["must_match"]["train_manifest_sha256"]
    assert stall["verdict"] in (run / "report.html").read_text()
    assert json.loads((road / "pca.json").read_text())["pixel_scale"] == 255


def test_a_run_that_sigterm_stops_goes_on_to_the_same_losses(road: Path):
    """SIGTERM while it trains: exit code 0 and a checkpoint; --resume gives the losses of the run never stopped."""
    args = [road / "shards" / "train", "--runs", road, "--run-name", "stopped", "--epochs", 2, *TINY]
    command = [sys.executable, str(ROOT / "tools" / "train.py"), *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = road / "stopped" / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text()) and process.poll() is None:
        os.sched_yield()
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    ran(tool("train", *args, "--resume"))
    assert losses(road / "stopped") == losses(road / "a")


def test_a_run_that_was_killed_goes_on_to_the_same_losses(road: Path):
    """As after SIGKILL: the last checkpoint and metrics that run ahead of it are all that is left."""
    shutil.copytree(road / "a", road / "killed")
    shutil.rmtree(road / "killed" / "checkpoints" / "step-000000010")
    (road / "killed" / "stall.json").unlink()
    shards = road / "shards" / "train"
    args = [shards, "--val", road / "shards" / "val", "--runs", road, "--run-name", "killed", "--epochs", 2, *TINY]
    assert "resumed    after update 5" in ran(tool("train", *args, "--resume"))
    assert losses(road / "killed") == losses(road / "a")
    assert (road / "killed" / "stall.json").is_file()


def test_a_complete_run_resumed_says_so(road: Path):
    args = [road / "shards" / "train", "--runs", road, "--run-name", "a", "--epochs", 2, *TINY, "--resume"]
    assert "this run is complete" in ran(tool("train", *args))


def test_a_damaged_picture_stops_training_or_is_skipped_and_named(tmp_path: Path):
    """By default one line names it; with --on-bad-sample skip the run is completed, and its end names it."""
    for name in ("hurt", "whole"):
        (tmp_path / name).mkdir()
    hurt = write_set(tmp_path / "hurt", [sample(n, b"garbage" * 9 if n == 5 else None) for n in range(17)])
    whole = basis_of(write_set(tmp_path / "whole", [sample(n) for n in range(17)]))
    rgb_pca.save(replace(whole, manifest_sha256=hurt.manifest_sha256), tmp_path / "hurt" / "eigenbasis.json")
    args = [tmp_path / "hurt", "--runs", tmp_path, "--epochs", 1, *TINY, "--stall-seconds", 0]
    stopped = tool("train", *args, "--run-name", "stopped")
    assert stopped.returncode == 2 and "drawn_0005 (no picture)" in stopped.stderr
    out = ran(tool("train", *args, "--run-name", "skipped", "--order", "windowed", "--on-bad-sample", "skip"))
    assert "skipped 1 damaged picture:" in out and "drawn_0005 (no picture)" in out
    assert [step for step, _ in losses(tmp_path / "skipped")] == [1, 2]
    config = json.loads((tmp_path / "skipped" / "config.json").read_text())
    assert config["must_match"]["order"] == ["windowed", 16] and config["feed"]["order"] == "windowed"


def test_evaluate_agrees_with_the_run_s_own_validation(road: Path, tmp_path: Path):
    path = road / "a" / "checkpoints" / "step-000000010"
    ran(tool("evaluate", road / "shards" / "val", path, "--json", tmp_path / "scores.json"))
    scores = json.loads((tmp_path / "scores.json").read_text())["checkpoints"][str(path)]
    last = json.loads((road / "a" / "metrics.jsonl").read_text().splitlines()[-1])
    assert scores["loss"] == pytest.approx(last["val_loss"], rel=1e-6)
    assert (scores["top1"], scores["images"]) == (last["val_top1"], 12)
    assert "top-5" in ran(tool("evaluate", road / "shards" / "val", path, "--views", 10))


def test_bench_loader_prints_a_table_and_a_json_line(road: Path, tmp_path: Path):
    out = ran(
        tool("bench_loader", road / "shards" / "train", "--batch", 8, "--seconds", 0.2, "--json", tmp_path / "b.json")
    )
    printed = json.loads(out.splitlines()[-1])
    assert printed == json.loads((tmp_path / "b.json").read_text())


def test_bench_towers_measures_steps_by_what_they_went_to():
    """A step is the sum of its parts; only the layouts that wait have something to wait for; the slowest says why."""
    work = bench_towers.Work(NetSpec(width=0.05), batch=4, steps=2, device="cpu", precision="float32")
    pair, alone = bench_towers.measure(bench_towers.RIVALS[1], work), [bench_towers.steps(SINGLE_RANK, work)]
    found = {name: bench_towers.summary([ranks]) for name, ranks in (("one rank", alone), ("tower pair", pair))}
    for name, each in found.items():
        assert each["step_s"] == pytest.approx(sum(each[f"{part}_s"] for part in bench_towers.PARTS))
        assert (each["exchange_s"] > 0, each["swap_s"] > 0, each["sums_s"]) == (*2 * (name == "tower pair",), 0)
    slow, fast = {**found["one rank"], "step_s": 0.3, "sums_s": 0.2}, {**found["one rank"], "step_s": 0.1}
    assert bench_towers.why({"slow": slow, "fast": fast}).splitlines() == [
        "fastest    fast",
        "           slow takes 3.00 times as long, most of it for sums (+200.0 ms)",
    ]
    assert len(bench_towers.table(found).splitlines()) == 3


def test_a_truncated_image_over_the_limit_ends_with_1(road: Path, tmp_path: Path):
    done = tool("make_shards", road / "sample", tmp_path / "out", "--split", "train", "--max-quarantine", 0)
    ran(done, code=1)
    assert "1 of 48 images cannot be decoded, at most 0 are allowed" in done.stderr
    assert not (tmp_path / "out" / "train").exists()


def broken(what: str, road: Path, tmp: Path) -> list[object]:
    """Arguments of a call that must fail, and the wrong input that they name."""
    shards = tmp / "train"
    if what.startswith(("shard", "basis")):
        shutil.copytree(road / "shards" / "train", shards)
    match what:
        case "no source":
            return ["make_shards", tmp / "nowhere", tmp / "out"]
        case "empty source":
            return ["make_shards", tmp, tmp / "out"]
        case "empty class":
            (tmp / "train" / "n1").mkdir(parents=True)
            return ["make_shards", tmp, tmp / "out"]
        case "no such split":
            (tmp / "train" / "n1").mkdir(parents=True)
            Image.new("RGB", (300, 300)).save(tmp / "train" / "n1" / "a.JPEG")
            return ["make_shards", tmp, tmp / "out", "--split", "val"]
        case "quality":
            return ["make_shards", road / "sample", tmp / "out", "--quality", 101]
        case "shard set without manifest":
            (shards / "manifest.json").unlink()
            return ["compute_pca", shards]
        case "shard set with a changed tar":
            with (shards / "train-000000.tar").open("r+b") as file:
                file.seek(5000)
                file.write(b"\0changed")
            return ["train", shards, "--runs", tmp, *TINY]
        case "basis missing":
            (shards / "eigenbasis.json").unlink()
            return ["train", shards, "--runs", tmp, *TINY]
        case "basis of another set":
            text = (shards / "eigenbasis.json").read_text()
            manifest = json.loads(text)["manifest_sha256"]
            (shards / "eigenbasis.json").write_text(text.replace(manifest, "0" * 64))
            return ["train", shards, "--runs", tmp, *TINY]
        case "run is there":
            return ["train", road / "shards" / "train", "--runs", road, "--run-name", "a", *TINY]
        case "other recipe":
            shutil.copytree(road / "a", tmp / "a")
            sets = road / "shards"
            more = ["--recipe", "paper", "--val", sets / "val", "--resume", "--epochs", 2, *TINY]
            return ["train", sets / "train", "--runs", tmp, "--run-name", "a", *more]
        case "plateau without validation":
            return ["train", road / "shards" / "train", "--runs", tmp, "--recipe", "paper", *TINY]
        case "batch too large":
            return ["train", road / "shards" / "train", "--runs", tmp, *TINY, "--batch", 64]
        case "zero epochs":
            return ["train", road / "shards" / "train", "--runs", tmp, *TINY, "--epochs", 0]
        case "zero steps":
            return ["train", road / "shards" / "train", "--runs", tmp, *TINY, "--steps", 0]
        case "zero batch":
            return ["train", road / "shards" / "train", "--runs", tmp, *TINY, "--batch", 0]
        case "zero threads":
            return ["bench_loader", road / "shards" / "train", "--threads", 0]
        case "zero demand":
            return ["bench_loader", road / "shards" / "train", "--demand", 0]
        case "bar above 1":
            return ["bench_loader", road / "shards" / "train", "--demand", 10, "--au-threshold", 95]
        case "plot of another kind":
            return ["bench_loader", road / "shards" / "train", "--demand", 10, "--plot", tmp / "report.png"]
        case "tuned is another file":
            return ["train", road / "shards" / "train", "--runs", tmp, *TINY, "--tuned", road / "pca.json"]
        case "source missing":
            return ["make_shards", tmp / "out"]
        case "nothing to verify":
            return ["make_shards", tmp, "--verify"]
        case "no checkpoint":
            return ["evaluate", road / "shards" / "val", tmp]
        case "no cuda to train on":
            return ["train", road / "shards" / "train", "--runs", tmp, *TINY, "--device", "cuda"]
        case "no cuda":
            return ["bench_loader", road / "shards" / "train", "--device", "cuda"]
    raise AssertionError(what)


WRONG: dict[str, str] = {
    "no source": "no such folder; expected one with ILSVRC2012_img_train.tar",
    "empty source": "no ImageNet layout here (found nothing)",
    "empty class": "a class folder with no image; add its images or remove the folder",
    "no such split": "layout folders without split 'val', found ['train']",
    "quality": "JPEG quality 101, expected 1 to 100",
    "shard set without manifest": "no manifest.json here, so not a shard set; make_shards writes it last",
    "shard set with a changed tar": "it was changed, run make_shards again",
    "basis missing": "no eigenbasis here; run: python tools/compute_pca.py",
    "basis of another set": "made of another shard set",
    "run is there": "this run is there already; add --resume, or choose another --run",
    "other recipe": "begun with recipe",
    "plateau without validation": "lowers its rates by the validation error; add --val SHARDS",
    "batch too large": "47 samples do not fill one batch of 64",
    "zero epochs": "epochs 0, expected at least 1",
    "zero steps": "max_optimizer_steps 0, expected at least 1",
    "zero batch": "batch is 0; it must be at least 1",
    "zero threads": "threads is 0; it must be at least 1",
    "zero demand": "demand is 0 img/s; it must be above 0",
    "bar above 1": "--au-threshold 95; AU is a share, above 0 and at most 1",
    "plot of another kind": "report.png; expected a file name that ends in .html or .svg",
    "tuned is another file": "no settings of bench_loader --tune FILE here; run that first",
    "source missing": "one folder given, expected SOURCE and OUT",
    "nothing to verify": "no train or val folder here",
    "no checkpoint": "no checkpoint here (no state.json)",
    "no cuda": "torch sees no CUDA device here",
    "no cuda to train on": "torch sees no CUDA device here",
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_gets_one_line_and_code_2(
    what: str, road: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    if what.startswith("no cuda") and __import__("torch").cuda.is_available():
        pytest.skip("there is a CUDA device")
    args = broken(what, road, tmp_path)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    done = called(str(args[0]), *args[1:], monkeypatch=monkeypatch, capsys=capsys)
    ran(done, code=2)
    errors = [line for line in done.stderr.splitlines() if line.startswith(f"{args[0]}.py: ")]
    assert len(errors) == 1
    assert WRONG[what] in errors[0]
    assert "Traceback" not in done.stderr
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before, "something was left behind"


def test_verify_names_a_fault_and_repair_mends_it(road: Path, tmp_path: Path):
    """Without a fault 0, with one 1; after --repair from the source 0 again."""
    shards = shutil.copytree(road / "shards", tmp_path / "shards")
    assert ran(tool("make_shards", shards, "--verify", "--deep")).count("as it was written") == 2
    with (shards / "train" / "train-000001.tar").open("r+b") as file:
        file.seek(4000)
        file.write(b"changed")
    out = ran(tool("make_shards", shards, "--verify", "--json", tmp_path / "v.json"), code=1)
    assert "the picture's bytes changed" in out
    assert len(json.loads((tmp_path / "v.json").read_text())["train"]) == 1
    ran(tool("make_shards", road / "sample", shards, "--repair", "--shard-samples", 20))
    ran(tool("make_shards", shards, "--verify"))


def test_bench_loader_judges_a_demand(road: Path, tmp_path: Path):
    """Exit code 0 for a trainer that any feed keeps up with, 1 for one that no feed does; the report is printed."""
    args = [road / "shards" / "train", "--batch", 8, "--seconds", 0.2, "--au-threshold", 0.5]
    page, picture = tmp_path / "report.html", tmp_path / "report.svg"
    assert "compute-bound" in ran(tool("bench_loader", *args, "--demand", 200, "--plot", picture))
    assert "compute-bound" in picture.read_text()
    out = ran(tool("bench_loader", *args, "--demand", 1e7, "--json", tmp_path / "b.json", "--plot", page), code=1)
    assert "input-bound" in out
    record = json.loads((tmp_path / "b.json").read_text())
    assert record["stall"]["au"] == pytest.approx(1 - sum(record["stall"]["parts"].values()))
    assert record["stall"]["au"] < record["stall"]["au_threshold"] == 0.5
    assert record["stall"]["verdict"] in page.read_text()


def test_tuned_settings_reach_training(road: Path, tmp_path: Path):
    """bench_loader --tune writes settings that train.py --tuned takes; --verify says what it measured again."""
    shards, tuned = road / "shards" / "train", tmp_path / "tuned.json"
    args = ["--batch", 8, "--seconds", 0.05, "--demand", 1e5, "--threads", 1, "--verify", "--tune", tuned]
    out = ran(tool("bench_loader", shards, *args), code=1)
    assert "verify  " in out and "stored square: " in out
    found = json.loads(tuned.read_text())
    settings, shapes = found["settings"], found["stored_shape"]
    assert shapes["pictures"] == 47 and min(shapes["square"], shapes["short_side"], *shapes["times"]) > 0
    ran(tool("train", shards, "--runs", tmp_path, "--run-name", "t", "--steps", 1, *TINY, "--tuned", tuned))
    feed = json.loads((tmp_path / "t" / "config.json").read_text())["feed"]
    assert {name: feed[name] for name in settings} == settings
