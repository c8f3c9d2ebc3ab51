"""The whole road in one command: sample, shards, eigenbasis, training on as many ranks as the GPUs are good for.

    python tools/run_all.py train                        # a drawn sample of ImageNet
    IMAGENET=/folder python tools/run_all.py train       # the real files, in any layout that make_shards reads
    python tools/run_all.py sample | shards | pca | train | bench | baselines | gpu-check
    python tools/run_all.py health                       # whether the run still writes; for a container's healthcheck

What is there and whole is skipped. Settings are environment variables, the same for make and for .env: IMAGENET; DATA
and RUNS, the folders that are written (data, runs); RUN, the run's name (sample or imagenet); WORKERS (one per core);
SAMPLE_OPTIONS, SHARD_OPTIONS and TRAIN_OPTIONS for make_sample, make_shards and train; HANG_MINUTES (15). Empty is as
good as unset.

SIGTERM goes on to the tool at work: training saves a checkpoint and exits with 0, anything before it stops with 143.
The same command goes on from there. Other exit codes are those of the tool that failed; health has 1 for "it hangs".
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tools.shared.cli import cores, run

TOOLS = Path(__file__).parent
STAGES = ("sample", "shards", "pca", "train", "bench", "baselines", "gpu-check", "health")
ENDS = ("train", "bench", "baselines", "gpu-check")  # each of them after all that come before these
STOPPED = 128 + signal.SIGTERM

# The sample is 1,800 drawn pictures of 12 classes, and the machine may have 2 cores: a net of an eighth of the width,
# and smaller batches, show in two minutes that it learns. Rates are the recipe's, of its first 20 epochs (LOG.md).
SAMPLE_SHARDS = "--shard-samples 256"
SAMPLE_TRAINING = "--width 0.125 --batch 64 --steps 560 --log-every 14"


@dataclass(frozen=True)
class Settings:
    """Where everything lies, and what the tools are told besides.

    Attributes:
        imagenet: folder of the real files; None for the drawn sample.
        data: folder for the sample and the shard sets.
        runs: folder of the runs.
        run: name of the run.
        workers: processes that draw, shard and measure.
        sample_options, shard_options, train_options: further arguments of those tools.
        hang_minutes: how long a run may write nothing and still pass for alive.
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
    def of(cls, environment: Mapping[str, str]) -> Settings:
        """The settings in the environment; ValueError where a number is none."""
        imagenet = environment.get("IMAGENET")

        def setting(name: str, default: str = "") -> str:
            return environment.get(name) or default

        try:
            workers, hang_minutes = int(setting("WORKERS", str(cores()))), float(setting("HANG_MINUTES", "15"))
        except ValueError as error:
            raise ValueError(f"WORKERS or HANG_MINUTES: {error}; expected a number") from error
        return cls(
            Path(imagenet) if imagenet else None,
            Path(setting("DATA", "data")),
            Path(setting("RUNS", "runs")),
            setting("RUN", "imagenet" if imagenet else "sample"),
            workers,
            shlex.split(setting("SAMPLE_OPTIONS")),
            shlex.split(setting("SHARD_OPTIONS", "" if imagenet else SAMPLE_SHARDS)),
            shlex.split(setting("TRAIN_OPTIONS", "" if imagenet else SAMPLE_TRAINING)),
            hang_minutes,
        )

    @property
    def source(self) -> Path:
        """What is sharded."""
        return self.imagenet or self.data / "sample"

    @property
    def shards(self) -> Path:
        """The shard sets `train` and `val`."""
        return self.data / ("imagenet-256" if self.imagenet else "sample-256")


@dataclass(frozen=True)
class Choice:
    """How many ranks train, and the line that says why."""

    ranks: int
    why: str


def choose_ranks(gpus: int, batch: int, device: str | None = None, layout: str = "towers") -> Choice:
    """The ranks for a machine with `gpus` GPUs, where `device` and `layout` are what train.py was told.

    No GPU: one rank on the CPU. One: both towers on it. More: a rank on each, of which every two are a pair with a
    tower each; as many as make pairs and share a batch of `batch` evenly.
    """
    if device == "cpu":
        return Choice(1, "the CPU, as --device says: both towers on it")
    if not gpus:
        return Choice(1, "NO GPU IS VISIBLE HERE: BOTH TOWERS TRAIN ON THE CPU, good for trying things out only")
    group = 2 if layout == "towers" else 1
    ranks = next((ranks for ranks in range(gpus - gpus % group, 1, -group) if batch % ranks == 0), 1)
    found = f"{gpus} GPU{'s' if gpus > 1 else ''}"
    match ranks, layout:
        case 1, _:
            what = "both towers on one"
        case 2, "towers":
            what = "the tower pair, a tower on each"
        case _, "towers":
            what = f"a mesh of {ranks // 2} tower pairs on {ranks} of them"
        case _:
            what = f"both towers on each of {ranks}"
    if ranks < gpus:
        unit = "pairs" if layout == "towers" else "ranks"
        what += f"; {gpus - ranks} STAY IDLE: more {unit} cannot share a batch of {batch} evenly"
    return Choice(ranks, f"{found}: {what}")


class Steps:
    """Runs one tool after another. SIGTERM goes on to the one at work; Ctrl-C reaches it by itself."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._ranks = 1
        self._stopping = False
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, lambda signum, frame: None)  # a handler, not SIG_IGN: tools would inherit that

    def tool(self, name: str, *args: object, ranks: int = 1) -> int:
        """Runs tools/NAME.py, on several ranks by torchrun; returns its exit code, 143 where it was stopped."""
        if self._stopping:
            return STOPPED
        how = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--"] if ranks > 1 else []
        self._ranks = ranks
        self._child = subprocess.Popen([sys.executable, *how, str(TOOLS / f"{name}.py"), *map(str, args)])
        if self._stopping:  # it came while the process started
            self._pass_on()
        code = self._child.wait()
        return 128 - code if code < 0 else code

    def _stop(self, signum: int, frame: object) -> None:
        self._stopping = True
        self._pass_on()

    def _pass_on(self) -> None:
        """To the ranks where there are any: torchrun itself would give them 30 s and then fail."""
        if self._child is None or self._child.poll() is not None:
            return
        tool = psutil.Process(self._child.pid)
        for process in (tool.children() if self._ranks > 1 else []) or [tool]:
            with suppress(psutil.NoSuchProcess):
                process.terminate()


def main() -> int:
    """Goes as far as the stage that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    stage = parser.parse_args().stage
    road = Settings.of(os.environ)
    if stage == "health":
        return health(road.runs / road.run / "metrics.jsonl", road.hang_minutes)
    for folder in [road.data, *([road.runs] if stage == "train" else [])]:
        writable(folder)
    steps = Steps()
    for part in STAGES[: STAGES.index(stage) + 1]:
        if part == stage or part not in ENDS:
            code = take(part, road, steps)
            if code:
                return code
    return 0


def take(part: str, road: Settings, steps: Steps) -> int:
    """One part of the road; returns the exit code of its tool, 0 where there is nothing to do."""
    train, workers = road.shards / "train", ["--workers", road.workers]
    match part:
        case "sample":
            return 0 if road.imagenet else steps.tool("make_sample", road.source, *workers, *road.sample_options)
        case "shards":
            return steps.tool("make_shards", road.source, road.shards, *workers, *road.shard_options)
        case "pca":
            return 0 if has_eigenbasis(train) else steps.tool("compute_pca", train, *workers)
        case "bench":
            device = ["--device", "cuda"] if gpus_here() else []
            return steps.tool("bench_loader", train, *device) or steps.tool("bench_baselines", train)
        case "baselines":
            return steps.tool("bench_baselines", train)
        case "gpu-check":
            return gpu_check(road, steps)
    choice = ranks_for(road.train_options)
    print(f"ranks: {choice.why}", flush=True)
    where = ["--val", road.shards / "val", "--runs", road.runs, "--run-name", road.run, "--resume"]
    return steps.tool("train", train, *where, *road.train_options, ranks=choice.ranks)


def gpu_check(road: Settings, steps: Steps) -> int:
    """Shards the same pictures square, too, and has everything checked that wants a GPU."""
    square, workers = road.shards.with_name(f"{road.shards.name}-square"), ["--workers", road.workers]
    how = ["--stored", "square", "--split", "train", *workers, *road.shard_options]
    code = steps.tool("make_shards", road.source, square, *how)
    if not code and not has_eigenbasis(square / "train"):
        code = steps.tool("compute_pca", square / "train", *workers)
    return code or steps.tool("gpu_check", road.shards / "train", "--square", square / "train")


def ranks_for(train_options: list[str]) -> Choice:
    """The choice for this machine's GPUs."""
    from model.recipe import SOURCE2012, recipe

    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--recipe", default=SOURCE2012.name)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--device")
    parser.add_argument("--layout", default="towers")
    told, _ = parser.parse_known_args(train_options)
    batch = recipe(told.recipe).batch if told.batch is None else told.batch
    return choose_ranks(gpus_here(), batch, told.device, told.layout)


def gpus_here() -> int:
    """The GPUs that torch sees."""
    import torch  # takes seconds, which the healthcheck need not pay

    return torch.cuda.device_count()


def has_eigenbasis(shards: Path) -> bool:
    """Whether the shard set has its eigenbasis, and not one of another set. ValueError where it is no shard set."""
    from pipeline import rgb_pca
    from pipeline.shards.reader import open_shards

    opened = open_shards(shards)
    try:
        rgb_pca.load(shards / "eigenbasis.json", opened)
    except ValueError:
        return False
    return True


def writable(folder: Path) -> None:
    """Makes the folder; ValueError where this user may not write there."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        found = f"belongs to user {folder.stat().st_uid}, user {os.getuid()} may not write there"
        raise ValueError(f"{folder}: {found}; change that, or (Docker) USER_ID and GROUP_ID in .env")


def health(metrics: Path, hang_minutes: float) -> int:
    """0 where the run has written within `hang_minutes`, else 1."""
    if not metrics.is_file():
        print(f"{metrics}: not there yet, training has not begun")
        return 1
    quiet_minutes = (time.time() - metrics.stat().st_mtime) / 60
    print(f"{metrics}: written {quiet_minutes:.1f} minutes ago, {hang_minutes:g} are allowed")
    return int(quiet_minutes > hang_minutes)


if __name__ == "__main__":
    run(main)
