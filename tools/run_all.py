"""Runs all stages in one command: sample, shards, eigenbasis, training on all GPUs that can be used, stall report.

    python tools/run_all.py train                        # a synthetic sample of ImageNet
    IMAGENET=/folder python tools/run_all.py train       # the real files, in any layout that make_shards reads
    python tools/run_all.py sample | shards | pca | train | bench | baselines | gpu-check
    python tools/run_all.py health                       # whether the run still writes; for a container's health check

A stage runs the stages before it first. Results that are complete are kept and their stages are skipped.

Settings are environment variables, the same for make and for .env; an empty one counts as unset:
    IMAGENET          folder of the real files; unset: a synthetic sample
    DATA, RUNS        folders to write shard sets and runs to; default: data and runs
    RUN               name of the run; default: sample, or imagenet with IMAGENET
    WORKERS           processes that draw, shard and measure; default: one per core
    SAMPLE_OPTIONS, SHARD_OPTIONS, TRAIN_OPTIONS      further options of make_sample, make_shards and train
    HANG_MINUTES      health fails if the run has not written for this long; default: 15

SIGTERM is passed on to the running tool: training saves a checkpoint and exits with 0, earlier stages stop with 143.
The same command continues from there.

Exit codes: those of the tool that failed; 2 wrong input; health: 1 if the run does not write.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tools import train
from tools.shared.cli import cores, parser_of, run
from tools.shared.rank_choice import gpus_announced, ranks_for
from tools.shared.tool_runner import ToolRunner

PREPARATION = ("sample", "shards", "pca")  # each stage after those before it
ENDS = ("train", "bench", "baselines", "gpu-check")  # each of them directly after the preparation
STAGES = (*PREPARATION, *ENDS, "health")

# The sample has 1,800 synthetic images of 12 classes, and the machine may have only 2 cores. An eighth of the width and
# half of the batch show within two minutes that the network learns. 560 steps are 20 epochs of the recipe.
SAMPLE_SHARDS = "--shard-samples 256"
SAMPLE_TRAINING = "--width 0.125 --batch 64 --steps 560 --log-every 14"


@dataclass(frozen=True)
class RunAllSettings:
    """The folders of all stages, and further options of the tools.

    Attributes:
        imagenet: folder of the real files; None for the synthetic sample.
        data: folder of the sample and of the shard sets.
        runs: folder of the runs.
        run: name of the run.
        workers: processes that draw, shard and measure.
        sample_options: further options of make_sample.
        shard_options: further options of make_shards.
        train_options: further options of train.
        hang_minutes: minutes without a new line of metrics after which a run counts as hanging.
    """

    imagenet: Path | None
    data: Path
    runs: Path
    run: str
    workers: int
    sample_options: list[str]
    shard_options: list[str]
    train_options: list[str]
    hang_minutes: float

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> RunAllSettings:
        """Reads the settings from environment variables. Raises ValueError that names a variable with a wrong value."""
        imagenet = environment.get("IMAGENET")

        def setting(name: str, default: str = "") -> str:
            return environment.get(name) or default

        return cls(
            imagenet=Path(imagenet) if imagenet else None,
            data=Path(setting("DATA", "data")),
            runs=Path(setting("RUNS", "runs")),
            run=setting("RUN", "imagenet" if imagenet else "sample"),
            workers=int(_number("WORKERS", setting("WORKERS", str(cores())), "a whole number of at least 1", int)),
            sample_options=_words("SAMPLE_OPTIONS", setting("SAMPLE_OPTIONS")),
            shard_options=_words("SHARD_OPTIONS", setting("SHARD_OPTIONS", "" if imagenet else SAMPLE_SHARDS)),
            train_options=_words("TRAIN_OPTIONS", setting("TRAIN_OPTIONS", "" if imagenet else SAMPLE_TRAINING)),
            hang_minutes=_number("HANG_MINUTES", setting("HANG_MINUTES", "15"), "a number above 0", float),
        )

    @property
    def source(self) -> Path:
        """The files that are sharded."""
        return self.imagenet or self.data / "sample"

    @property
    def shards(self) -> Path:
        """The folder of the shard sets `train` and `val`."""
        return self.data / ("imagenet-256" if self.imagenet else "sample-256")


def _words(name: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{name}={text}: {error}") from error


def _number(name: str, text: str, expected: str, kind: type[int] | type[float]) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}={text}: expected {expected}")
    return value


def main() -> int:
    """Runs the stages up to the one that is named and returns the exit code."""
    parser = parser_of(__doc__)
    parser.add_argument("stage", choices=STAGES, metavar="STAGE", help=f"one of {', '.join(STAGES)}")
    stage = parser.parse_args().stage
    settings = RunAllSettings.of(os.environ)
    if stage == "train":
        check_train_options(settings)
    if stage == "health":
        return health(settings.runs / settings.run / "metrics.jsonl", settings.hang_minutes)
    for folder in [settings.data, *([settings.runs] if stage == "train" else [])]:
        make_writable(folder)
    runner = ToolRunner()
    before = PREPARATION if stage in ENDS else PREPARATION[: PREPARATION.index(stage)]
    for part in (*before, stage):
        if code := run_stage(part, settings, runner):
            return code
    return 0


def check_train_options(settings: RunAllSettings) -> None:
    """Checks TRAIN_OPTIONS before the first stage: otherwise a typing mistake would show after hours of sharding.

    Raises:
        ValueError: train.py would not accept them.
    """
    parser = train.arguments()

    def refuse(message: str) -> NoReturn:
        raise ValueError(f"TRAIN_OPTIONS: {message}; python tools/train.py --help lists the options")

    parser.error = refuse  # type: ignore[method-assign]
    try:
        train.check(parser.parse_args(["SHARDS", "--run-name", settings.run, *settings.train_options]))
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith("TRAIN_OPTIONS") else f"TRAIN_OPTIONS: {text}") from error


def run_stage(stage: str, settings: RunAllSettings, runner: ToolRunner) -> int:
    """Runs one stage and returns the exit code of its tool, or 0 if there is nothing to do."""
    shards, workers = settings.shards / "train", ["--workers", settings.workers]
    match stage:
        case "sample":
            if settings.imagenet:
                return 0
            return runner.run("make_sample", settings.source, *workers, *settings.sample_options)
        case "shards":
            return runner.run("make_shards", settings.source, settings.shards, *workers, *settings.shard_options)
        case "pca":
            return 0 if has_eigenbasis(shards) else runner.run("compute_pca", shards, *workers)
        case "train":
            return _train(settings, runner)
        case "bench":
            device = ["--device", "cuda"] if gpus_announced() else []  # as in training
            return runner.run("bench_loader", shards, *device) or runner.run("bench_baselines", shards)
        case "baselines":
            return runner.run("bench_baselines", shards)
        case "gpu-check":
            return _gpu_check(settings, runner)
    raise AssertionError(stage)


def _train(settings: RunAllSettings, runner: ToolRunner) -> int:
    choice = ranks_for(settings.train_options)
    print(f"ranks: {choice.why}", flush=True)
    run_folder = ["--runs", settings.runs, "--run-name", settings.run, "--resume"]
    sets = [settings.shards / "train", "--val", settings.shards / "val"]
    # With --device cuda a GPU that torch cannot use is an error. Otherwise training would silently use the CPU.
    device = ["--device", "cuda"] if gpus_announced() else []  # a --device in train_options comes later and wins
    return runner.run("train", *sets, *run_folder, *device, *settings.train_options, ranks=choice.ranks)


def _gpu_check(settings: RunAllSettings, runner: ToolRunner) -> int:
    """Makes a second shard set of the same images in stored shape "square", then runs gpu_check on both."""
    square, workers = settings.shards.with_name(f"{settings.shards.name}-square"), ["--workers", settings.workers]
    options = ["--stored", "square", "--split", "train", *workers, *settings.shard_options]
    code = runner.run("make_shards", settings.source, square, *options)
    if not code and not has_eigenbasis(square / "train"):
        code = runner.run("compute_pca", square / "train", *workers)
    return code or runner.run("gpu_check", settings.shards / "train", "--square", square / "train")


def has_eigenbasis(shards: Path) -> bool:
    """Returns whether a shard set has its own eigenbasis. Raises ValueError if the folder is not a shard set."""
    from pipeline import rgb_pca
    from pipeline.shards.reader import open_shards

    opened = open_shards(shards)
    try:
        rgb_pca.load_for(opened)
    except ValueError:
        return False
    return True


def make_writable(folder: Path) -> None:
    """Makes the folder. Raises ValueError if this user may not write to it."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        found = f"it belongs to user {folder.stat().st_uid}, and user {os.getuid()} may not write there"
        raise ValueError(f"{folder}: {found}; change its owner, or set USER_ID and GROUP_ID in .env for a container")


def health(metrics: Path, hang_minutes: float) -> int:
    """Returns 0 if the run has written a line of metrics within `hang_minutes`, otherwise 1; prints what it found."""
    if not metrics.is_file():
        print(f"{metrics}: does not exist yet; training has not started")
        return 1
    quiet_minutes = (time.time() - metrics.stat().st_mtime) / 60
    print(f"{metrics}: written {quiet_minutes:.1f} minutes ago; the limit is {hang_minutes:g}")
    return int(quiet_minutes > hang_minutes)


if __name__ == "__main__":
    run(main)
