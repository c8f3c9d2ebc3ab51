"""All that wants a GPU to be checked and measured, in one go: tests, the feed's pixels, rates, the stall report.

    python tools/gpu_check.py SHARDS [--square SHARDS] [--only CHECK ...] [--out DIR]
    python tools/gpu_check.py SHARDS --device cpu --quick      # the same code, small, to try it without a GPU

Writes benchmarks/gpu-NAME-DATE.json (NAME is the GPU's), anew after every check, so that a crash loses one alone.
Failed checks are in it with their error, skipped ones with the reason; exits with 1 where one failed. SHARDS wants its
eigenbasis.json; --square is the same pictures sharded with --stored square.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch

from model.alexnet import AlexNet
from model.batch import Batch
from model.dropout import DropoutDraws
from model.optim import Momentum2012
from model.parallel.half_batches import PairBatch
from model.recipe import SOURCE2012, learning_rates
from model.shapes import TOWERS, NetSpec
from model.step_profile import step_shares
from model.trainer import PRECISIONS, train_step, wait_for
from pipeline import rgb_pca
from pipeline.loader.loader import stage_batch_sizes
from pipeline.loader.reference import compared
from pipeline.loader.settings import Device, LoaderSettings
from pipeline.profiling.machine import describe_machine
from pipeline.profiling.throughput import measure_throughput
from pipeline.profiling.windows import TrainerUnderTest, measure_demand
from pipeline.shards.reader import ShardSet, open_shards
from tools.shared.cli import run, write_json
from tools.train import git_commit

ROOT = Path(__file__).parent.parent
GREY_LEVELS = {"cpu": 1e-3, "cuda": 1.0}  # from the reference in the mean: a GPU's decoder rounds otherwise
SAME_LOSS = 1e-4  # relative, of a pair and of one process
PACKAGES = ("torch", "nvidia-dali-cuda120", "nvidia-nvimgcodec-cu12", "numpy")  # torch's names its CUDA
GENTLE = 0.1  # of the recipe's rates: weights stay finite on made-up images, and losses do not magnify a last bit


@dataclass(frozen=True)
class Scale:
    """How much is measured: width of the net, batch of the feed and of runs, batches of replayed steps and how many of
    each, settings of the feed, seconds and rounds of windows, steps of a run."""

    width: float = 1.0
    batch: int = 128
    batches: tuple[int, ...] = (128, 512)
    replayed: int = 4
    hw_decoder_loads: tuple[float, ...] = (0.0, 0.25, 0.5, 0.65, 0.8, 0.9)
    threads: tuple[int, ...] = (2, 4, 8, 16)
    window_s: float = 2.0
    rounds: int = 3
    steps: int = 100


QUICK = Scale(0.05, 8, (2,), 1, (0.65,), (1, 2), 0.02, 2, 6)


@dataclass(frozen=True)
class Bench:
    """What is checked, and on what: shard sets with their eigenbasis by the shape they are stored in."""

    sets: dict[str, tuple[ShardSet, rgb_pca.Eigenbasis]]
    feed: LoaderSettings
    scale: Scale

    def net(self) -> tuple[AlexNet, Momentum2012]:
        """A fresh network and its update rule."""
        rules = replace(SOURCE2012, learning_rate_scale=GENTLE)
        model = AlexNet(NetSpec(width=self.scale.width), rules).to(self.feed.device)
        return model, Momentum2012(model.named_parameters(), rules, learning_rates(rules, 0, 1))

    def made_up(self, rows: int) -> list[Batch]:
        """Batches that are on the device already."""
        images = 60 * torch.randn(self.scale.replayed, rows, 3, 224, 224, device=self.feed.device)
        return [PairBatch(each, torch.arange(rows, device=self.feed.device), 0, n) for n, each in enumerate(images)]

    def python(self, *args: object, **environment: str) -> str:
        """Runs Python on `args` in a process of its own; what it said. ChildProcessError where it failed."""
        where = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", **environment}
        command = [sys.executable, *map(str, args)]
        done = subprocess.run(command, cwd=ROOT, env=where, timeout=600, capture_output=True, text=True)
        if done.returncode:
            raise ChildProcessError(f"exit code {done.returncode}: ... {(done.stdout + done.stderr)[-3000:]}")
        return done.stdout

    def train(self, folder: Path, *options: object, by: Sequence[str] = (), **environment: str) -> None:
        """Runs tools/train.py into a run's folder, started `by` torchrun or alone."""
        where = [self.sets["short-side"][0].folder.resolve(), "--runs", folder.parent, "--run-name", folder.name]
        size = ["--batch", self.scale.batch, "--width", self.scale.width, "--device", self.feed.device]
        self.python(*by, ROOT / "tools" / "train.py", *where, *size, *options, **environment)


def tests(bench: Bench) -> dict[str, Any]:
    """The tests that are marked gpu."""
    if bench.feed.device == "cpu":
        return {"skipped": "they need a CUDA device"}
    return {"summary": bench.python("-m", "pytest", "-m", "gpu", "-q").strip().splitlines()[-1]}


def pixels(bench: Bench) -> dict[str, Any]:
    """Batches against those of NumPy and Pillow, and against the same feed's once more."""
    seen, bar = compared(*bench.sets["short-side"], bench.feed), GREY_LEVELS[bench.feed.device]
    failed = {"failed": f"expected right labels, the same again, and less than {bar:g} grey levels"}
    return asdict(seen) | ({} if seen.within(bar) else failed)


def supply(bench: Bench) -> dict[str, Any]:
    """img/s of the feed alone and the host's CPU time, by stored shape, share of the decoder engines, and threads."""
    rivals = {f"hw_decoder_load {s:g}": replace(bench.feed, hw_decoder_load=s) for s in bench.scale.hw_decoder_loads}
    rivals |= {f"{threads} threads": replace(bench.feed, threads=threads) for threads in bench.scale.threads}
    found: dict[str, Any] = {"square": {"skipped": "no --square SHARDS"}, "else": asdict(bench.feed)}
    for stored, (shards, basis) in bench.sets.items():
        feeds = {name: partial(stage_batch_sizes, shards, basis, how, "full") for name, how in rivals.items()}
        windows = measure_throughput(
            feeds, bench.scale.window_s, bench.scale.rounds, discard=bench.feed.prefetched_batches
        )
        found[stored] = {name: asdict(rate) for name, rate in windows.items()}
    return found


def demand(bench: Bench) -> dict[str, Any]:
    """img/s of the training step on replayed batches, window by window, by batch and precision, in eager mode, which is
    all that the trainer has; torchvision's AlexNet, another and easier net, beside it where there is one."""
    nets: dict[str, Any] = {"": Bench.net}
    found: dict[str, Any] = {"torchvision": {"skipped": "it is not installed"}}
    if importlib.util.find_spec("torchvision"):
        nets["torchvision, "], found["torchvision"] = torchvision_net, version("torchvision")
    for rows in bench.scale.batches:
        kept = bench.made_up(rows)
        for (name, make), precision in product(nets.items(), PRECISIONS):
            model, optimizer = make(bench)
            window = partial(replay_rate, model, optimizer, kept, bench.scale.window_s, precision)
            found[f"{name}batch {rows}, {precision}"] = [window() for _ in range(bench.scale.rounds)]
    return found


def replay_rate(model: Any, optimizer: Any, kept: list[Batch], seconds: float, precision: str) -> float:
    """img/s of steps on batches that are there."""

    def step(batch: Batch) -> None:
        train_step(model, optimizer, batch, DropoutDraws(0, 0), precision)

    settle = partial(wait_for, kept[0].images.device)
    return measure_demand(TrainerUnderTest[Batch](lambda batch: len(batch.labels), step, settle), kept, seconds)


def torchvision_net(bench: Bench) -> tuple[Any, Any]:
    """torchvision's network, to be called as ours is, and torch's update rule."""
    net = importlib.import_module("torchvision.models").alexnet().to(bench.feed.device)
    net.towers, forward = TOWERS, net.forward
    net.forward = lambda images, *_: forward(images / 60)  # it is made for images of unit spread
    return net, torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4)


def shares(bench: Bench) -> dict[str, Any]:
    """What the step's time on the device goes to, by precision."""
    found, kept = {}, bench.made_up(bench.scale.batch)
    for precision in PRECISIONS:
        replay = partial(replay_rate, *bench.net(), kept, bench.scale.window_s / 20, precision)
        replay()  # first use
        found[precision] = step_shares(replay, torch.device(bench.feed.device))
    return found


def together(bench: Bench) -> dict[str, Any]:
    """The stall report of a run of train.py, by precision: AU, parts, overlap, and the gaps on the device."""
    found = {}
    with TemporaryDirectory() as runs:
        for name in PRECISIONS:
            how = ["--precision", name, "--steps", bench.scale.steps, "--stall-seconds", 5 * bench.scale.window_s]
            bench.train(Path(runs) / name, *how)
            found[name] = json.loads((Path(runs) / name / "stall.json").read_text())
    return found


def pair(bench: Bench) -> dict[str, Any]:
    """Losses of a few steps without TF32, a tower on each of two ranks (which share a lone GPU), and on one."""
    if not torch.distributed.is_available():
        return {"skipped": "this torch has no torch.distributed"}
    losses = {}
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--")
    with TemporaryDirectory() as runs:
        for name, by in (("alone", ()), ("pair", torchrun)):
            options = ["--steps", 4, "--lr-scale", GENTLE, "--log-every", 1, "--stall-seconds", 0]
            bench.train(Path(runs) / name, *options, by=by, NVIDIA_TF32_OVERRIDE="0")
            lines = (Path(runs) / name / "metrics.jsonl").read_text().splitlines()
            losses[name] = [json.loads(line)["loss"] for line in lines]
    off = max(abs(a / b - 1) for a, b in zip(losses["pair"], losses["alone"], strict=True))
    found = {"losses": losses, "relative_difference": off}
    return found if off <= SAME_LOSS else {**found, "failed": f"losses are {off:.2g} apart, want {SAME_LOSS:g}"}


CHECKS = {check.__name__: check for check in (tests, pixels, supply, demand, shares, together, pair)}


def main() -> int:
    """Runs the checks; returns the exit code."""
    args = arguments()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA device here; to try the checks without one, add --device cpu --quick")
    opened = {"short-side": open_shards(args.shards)} | ({"square": open_shards(args.square)} if args.square else {})
    sets = {name: (each, rgb_pca.load(each.folder / "eigenbasis.json", each)) for name, each in opened.items()}
    scale = QUICK if args.quick else Scale()
    bench = Bench(sets, LoaderSettings(batch=scale.batch, device=args.device), scale)
    checks = dict[str, dict[str, Any]]()
    now, device = datetime.now(UTC), torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    record = {
        "date": now.isoformat(timespec="seconds"),
        "device": device,
        "machine": describe_machine(),  # with the driver
        "versions": {name: version(name) for name in PACKAGES},
        "git_commit": git_commit(),
        "scale": asdict(scale),
        "checks": checks,
    }
    path = args.out / f"gpu-{'-'.join(device.lower().split())}-{now:%Y%m%d-%H%M%S}.json"
    for name in args.only or CHECKS:
        started_s = time.perf_counter()
        try:
            found = CHECKS[name](bench)
        except Exception as error:  # whatever it is, the others go on
            found = {"failed": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        checks[name] = {**found, "seconds": time.perf_counter() - started_s}
        word = next((f"{word}: {found[word]}" for word in ("failed", "skipped") if word in found), "done")
        print(f"{name:10}{checks[name]['seconds']:8.1f} s  {word}", flush=True)
        write_json(path, record)
    print(f"written to {path}")
    return int(any("failed" in found for found in checks.values()))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="a train shard set")
    parser.add_argument("--square", type=Path, metavar="SHARDS", help="the same, sharded with --stored square")
    parser.add_argument("--device", choices=get_args(Device), default="cuda", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="a small net and short windows, to try the checks")
    parser.add_argument("--only", nargs="+", choices=CHECKS, metavar="CHECK", help=f"some of {', '.join(CHECKS)}")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), metavar="DIR", help="default: %(default)s")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
