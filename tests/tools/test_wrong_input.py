"""Wrong input to the tools: exit code 2, one clear line on stderr, and nothing left behind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.support.tool_runs import TINY, printed, tool

Command = list[object]


@dataclass(frozen=True)
class Folders:
    """What a command may use: the end-to-end run (never changed) and a folder of its own."""

    made: Path
    tmp: Path

    @property
    def train(self) -> Path:
        """The intact train shard set."""
        return self.made / "shards" / "train"

    @property
    def val(self) -> Path:
        """The intact validation shard set."""
        return self.made / "shards" / "val"

    def copy(self) -> Path:
        """A copy of the train shard set that may be changed."""
        return Path(shutil.copytree(self.train, self.tmp / "train"))


def train(folders: Folders, *options: object) -> Command:
    """Training on the intact shard set."""
    return ["train", folders.train, "--runs", folders.tmp, *TINY, *options]


def train_on(shards: Path, folders: Folders) -> Command:
    return ["train", shards, "--runs", folders.tmp, *TINY]


def bench_loader(folders: Folders, *options: object) -> Command:
    return ["bench_loader", folders.train, *options]


# ---- commands that prepare a wrong input first ----------------------------------------------------------------------


def empty_class(folders: Folders) -> Command:
    (folders.tmp / "train" / "n1").mkdir(parents=True)
    return ["make_shards", folders.tmp, folders.tmp / "out"]


def absent_split(folders: Folders) -> Command:
    (folders.tmp / "train" / "n1").mkdir(parents=True)
    Image.new("RGB", (300, 300)).save(folders.tmp / "train" / "n1" / "a.JPEG")
    return ["make_shards", folders.tmp, folders.tmp / "out", "--split", "val"]


def no_manifest(folders: Folders) -> Command:
    shards = folders.copy()
    (shards / "manifest.json").unlink()
    return ["compute_pca", shards]


def changed_tar(folders: Folders) -> Command:
    shards = folders.copy()
    with (shards / "train-000000.tar").open("r+b") as file:
        file.seek(5000)
        file.write(b"\0changed")
    return train_on(shards, folders)


def no_eigenbasis(folders: Folders) -> Command:
    shards = folders.copy()
    (shards / "eigenbasis.json").unlink()
    return train_on(shards, folders)


def eigenbasis_of_another_set(folders: Folders) -> Command:
    shards = folders.copy()
    text = (shards / "eigenbasis.json").read_text()
    (shards / "eigenbasis.json").write_text(text.replace(json.loads(text)["manifest_sha256"], "0" * 64))
    return train_on(shards, folders)


def another_recipe(folders: Folders) -> Command:
    shutil.copytree(folders.made / "a", folders.tmp / "a")
    options = ["--recipe", "paper", "--val", folders.val, "--resume", "--run-name", "a", "--epochs", 2]
    return train(folders, *options)


# For each wrong input: a command with it, and a regular expression for the line on stderr.
WRONG: dict[str, tuple[Callable[[Folders], Command], str]] = {
    "no source": (
        lambda f: ["make_shards", f.tmp / "nowhere", f.tmp / "out"],
        r"no such folder; expected one with ILSVRC2012_img_train.tar",
    ),
    "empty source": (lambda f: ["make_shards", f.tmp, f.tmp / "out"], r"no ImageNet layout here \(found nothing\)"),
    "empty class": (empty_class, r"no image in it or its folders \(found n1\); expected class folders with images"),
    "absent split": (absent_split, r"layout folders without split 'val', found \['train'\]"),
    "quality": (
        lambda f: ["make_shards", f.made / "sample", f.tmp / "out", "--quality", 101],
        r"quality 101.* 1 to 100",
    ),
    "no manifest": (no_manifest, r"no manifest.json here, so not a shard set; .*make_shards"),
    "changed tar": (changed_tar, r"it was changed, repair it: python tools/make_shards"),
    "no eigenbasis": (no_eigenbasis, r"no eigenbasis here; run: python tools/compute_pca.py"),
    "eigenbasis of another set": (eigenbasis_of_another_set, r"another shard set"),
    "run exists": (
        lambda f: ["train", f.train, "--runs", f.made, "--run-name", "a", *TINY],
        r"; add --resume, or choose another --run",
    ),
    "another recipe": (another_recipe, r"with recipe .*; .*--run"),
    "plateau without validation": (
        lambda f: train(f, "--recipe", "paper"),
        r"lowers its learning rates by the validation error; add --val SHARDS",
    ),
    "batch too large": (lambda f: train(f, "--batch", 64), r"47 samples do not fill one batch of 64"),
    "zero epochs": (lambda f: train(f, "--epochs", 0), r"--epochs 0: expected at least 1$"),
    "zero steps": (lambda f: train(f, "--steps", 0), r"--steps 0: expected at least 1$"),
    "zero batch": (lambda f: train(f, "--batch", 0), r"--batch 0: expected at least 1$"),
    "negative seed": (lambda f: train(f, "--seed", -1), r"--seed -1: expected at least 0$"),
    "huge seed": (lambda f: train(f, "--seed", 2**64), r"--seed 18446744073709551616: expected at most"),
    "zero width": (lambda f: train(f, "--width", 0), r"--width 0: expected a number above 0$"),
    "share of the engines above 1": (
        lambda f: train(f, "--hw-decoder-load", 2),
        r"--hw-decoder-load 2: expected a share",
    ),
    "engines on the CPU": (
        lambda f: train(f, "--device", "cpu", "--hw-decoder-load", 0.5),
        r"--hw-decoder-load 0.5 has no effect on device cpu.*use --device cuda",
    ),
    "engines of a loader on the CPU": (
        lambda f: bench_loader(f, "--hw-decoder-load", 0.5),
        r"--hw-decoder-load 0.5 has no effect on device cpu",
    ),
    "no number": (lambda f: train(f, "--lr-scale", "nan"), r"--lr-scale nan: expected a number above 0$"),
    "negative time": (lambda f: train(f, "--stall-seconds", -1), r"--stall-seconds -1: expected at least 0$"),
    "time that is no number": (lambda f: train(f, "--stall-seconds", "nan"), r"--stall-seconds nan: expected at least"),
    "negative batch": (lambda f: ["evaluate", f.val, f.tmp, "--batch", -5], r"--batch -5: expected at least 1$"),
    "JSON is a folder": (lambda f: ["evaluate", f.val, f.tmp, "--json", f.tmp], r"argument --json: .*is a folder"),
    "run name that leaves the folder": (
        lambda f: train(f, "--run-name", "../a"),
        r"--run-name '../a': expected a folder",
    ),
    "absolute run name": (lambda f: train(f, "--run-name", "/a"), r"--run-name '/a': expected a folder in --runs"),
    "empty run name": (lambda f: train(f, "--run-name", ""), r"--run-name '': expected a folder in --runs"),
    "run name of two lines": (
        lambda f: train(f, "--run-name", "a\nb"),
        r"--run-name 'a.nb': expected a folder in --runs",
    ),
    "no checkpoint to resume from": (
        lambda f: train(f, "--resume-from", f.tmp / "step-000000001"),
        r"no checkpoint here \(no state.json\)",
    ),
    "layers of no checkpoint": (lambda f: train(f, "--init-from", f.tmp), r"no checkpoint here \(no state.json\)"),
    "layers of another width": (
        lambda f: train(f, "--width", 0.1, "--init-from", f.made / "a" / "checkpoints" / "step-000000010"),
        r"a network of width 0.05, expected 0.1; add --width 0.05$",
    ),
    "frozen random layers": (
        lambda f: train(f, "--freeze", "convolutions"),
        r"--freeze convolutions: the layers would stay random; add --init-from CHECKPOINT$",
    ),
    "frozen layers that are not taken": (
        lambda f: train(f, "--init-from", f.tmp, "--freeze", "all-but-fc8", "--init-layers", "convolutions"),
        r"fc6 and fc7 would stay random; add --init-layers all-but-fc8$",
    ),
    "weights of one checkpoint": (
        lambda f: ["evaluate", f.val, f.tmp, "--fit-weights", f.train],
        r"--fit-weights: one checkpoint given, expected at least two",
    ),
    "confusion of another kind": (
        lambda f: ["evaluate", f.val, f.tmp, "--confusion", f.tmp / "c.pdf"],
        r"--confusion .*c.pdf: expected a name that ends with .svg or .png$",
    ),
    "file to resume from": (
        lambda f: train(f, "--resume-from", f.made / "a/checkpoints/step-000000010/weights.safetensors"),
        r"weights.safetensors: no checkpoint here \(no state.json\)",
    ),
    "zero threads": (lambda f: bench_loader(f, "--threads", 0), r"threads.* 0.*at least 1"),
    "zero demand": (lambda f: bench_loader(f, "--demand", 0), r"demand.* 0.*above 0"),
    "threshold above 1": (lambda f: bench_loader(f, "--demand", 10, "--au-threshold", 95), r"--au-threshold 95"),
    "plot of another kind": (
        lambda f: bench_loader(f, "--demand", 10, "--plot", f.tmp / "report.png"),
        r"report.png.*\.html or \.svg",
    ),
    "tuned is another file": (lambda f: train(f, "--tuned", f.made / "pca.json"), r"bench_loader --tune FILE"),
    "one folder": (lambda f: ["make_shards", f.tmp / "out"], r"one folder given, expected SOURCE and OUT"),
    "nothing to verify": (lambda f: ["make_shards", f.tmp, "--verify"], r"no train or val folder here"),
    "no checkpoint": (lambda f: ["evaluate", f.val, f.tmp], r"no checkpoint here \(no state.json\)"),
    "no CUDA device to train on": (lambda f: train(f, "--device", "cuda"), r"no CUDA device"),
    "no CUDA device to load on": (lambda f: bench_loader(f, "--device", "cuda"), r"no CUDA device"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_gets_one_line_and_code_2(what: str, end_to_end: Path, tmp_path: Path):
    if "no CUDA device" in what and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    command, expected = WRONG[what]
    name, *args = command(Folders(end_to_end, tmp_path))
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    done = tool(str(name), *args)
    printed(done, code=2)
    (error,) = [line for line in done.stderr.splitlines() if line.startswith(f"{name}.py: ")]
    assert re.search(expected, error), error
    assert "Traceback" not in done.stderr
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before, "something was left behind"
