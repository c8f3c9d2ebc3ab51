"""Checks and measures everything that needs a GPU in one run: tests, pixels of the loader, speed, the stall report.

    python tools/gpu_check.py SHARDS [--square SHARDS] [--only CHECK ...] [--out DIR]
    python tools/gpu_check.py SHARDS --device cpu --quick      # the same code, small, to try it without a GPU

Writes benchmarks/gpu-NAME-DATE.json (NAME is that of the GPU). The file is written again after every check, so that a
crash loses only the check that crashed. A failed check is recorded with its error, a skipped one with the reason. Exits
with 1 if a check failed. SHARDS needs its eigenbasis.json; --square names the same images, sharded with
--stored square. The plan is printed first: all checks together take less than --minutes, and a check for which no time
is left is skipped and named.
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
from typing import TYPE_CHECKING, Any

from model.recipe import PRECISIONS, PRECISIONS_OF, SOURCE2012, learning_rates
from model.shapes import NetSpec
from tools.shared.cli import require_positive, run, write_json
from tools.shared.gpu_plan import TimePlan, planned_s

if TYPE_CHECKING:
    from model.alexnet import AlexNet
    from model.batch import Batch
    from model.optim import Momentum2012
    from pipeline.loader.settings import LoaderSettings
    from pipeline.rgb_pca import Eigenbasis
    from pipeline.shards.reader import ShardSet

# Heavy modules (torch, DALI, numba) are imported inside functions, so that --help does not wait for them.

ROOT = Path(__file__).parent.parent
# Largest mean difference from the reference, in pixel values 0-255. A GPU's JPEG decoder rounds differently.
PIXEL_VALUE_THRESHOLDS = {"cpu": 1e-3, "cuda": 1.0}
PROCESS_LIMIT_S = 240  # of one process that a check starts
SAME_LOSS = 1e-4  # relative difference between a tower pair and one rank
GENTLE = 0.1  # factor on the learning rates: weights stay finite on random images, and rounding is not magnified


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        width: width of the network.
        batch: images of a batch of the loader and of training runs.
        replay_batches: batch sizes of replayed steps.
        replayed: number of batches that are replayed in turn.
        hw_decoder_loads: settings of the loader that are compared: share of the GPU's JPEG engines.
        threads: settings of the loader that are compared: threads.
        window_s: seconds of a measurement window.
        switches_s: seconds of all windows of the switches, for each batch size, of the trainer and of the loader.
        rounds: measurement windows for each setting.
        steps: optimizer steps of a training run.
        precisions: those that are measured.
    """

    width: float = 1.0
    batch: int = 128
    replay_batches: tuple[int, ...] = (128, 512)
    replayed: int = 4
    hw_decoder_loads: tuple[float, ...] = (0.0, 0.25, 0.5, 0.65, 0.8, 0.9)
    threads: tuple[int, ...] = (2, 4, 8, 16)
    window_s: float = 0.6
    rounds: int = 3
    steps: int = 100
    switches_s: float = 20.0
    precisions: tuple[str, ...] = PRECISIONS


QUICK = Scale(0.05, 8, (2,), 1, (0.65,), (1, 2), 0.02, 2, 6, 0.1)


@dataclass(frozen=True)
class Subject:
    """What is checked.

    Attributes:
        sets: a shard set with its eigenbasis for each stored shape, "short-side" or "square".
        settings: of the loader.
        scale: how much is measured.
    """

    sets: dict[str, tuple[ShardSet, Eigenbasis]]
    settings: LoaderSettings
    scale: Scale

    def net(self, precision: str) -> tuple[AlexNet, Momentum2012]:
        """A new network and its optimizer, arranged in memory for a precision."""
        from model.alexnet import AlexNet
        from model.optim import Momentum2012
        from model.precision import prepare

        recipe = replace(SOURCE2012, learning_rate_scale=GENTLE)
        model = AlexNet(NetSpec(width=self.scale.width), recipe).to(self.settings.device)
        prepare(model, self.settings.device, precision)
        return model, Momentum2012(model.named_parameters(), recipe, learning_rates(recipe, 0, 1))

    def random_batches(self, rows: int) -> list[Batch]:
        """Random batches that are on the device already."""
        import torch

        from model.parallel.half_batches import PairBatch

        device = self.settings.device
        images = 60 * torch.randn(self.scale.replayed, rows, 3, 224, 224, device=device)
        return [PairBatch(each, torch.arange(rows, device=device), 0, number) for number, each in enumerate(images)]

    def python(self, *args: object) -> str:
        """Runs Python on `args` in a new process and returns its output.

        Raises:
            ChildProcessError: if the process fails; the message has the end of its output.
        """
        variables = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        command = [sys.executable, *map(str, args)]
        done = subprocess.run(command, cwd=ROOT, env=variables, timeout=PROCESS_LIMIT_S, capture_output=True, text=True)
        if done.returncode:
            raise ChildProcessError(f"exit code {done.returncode}: ... {(done.stdout + done.stderr)[-3000:]}")
        return done.stdout

    def train(self, folder: Path, *options: object, launcher: Sequence[str] = ()) -> None:
        """Runs tools/train.py into a run folder, on one rank or by a `launcher` such as torchrun."""
        shards = self.sets["short-side"][0].folder.resolve()
        size = ["--batch", self.scale.batch, "--width", self.scale.width, "--device", self.settings.device]
        run_folder = ["--runs", folder.parent, "--run-name", folder.name]
        self.python(*launcher, ROOT / "tools" / "train.py", shards, *run_folder, *size, *options)


def tests(subject: Subject) -> dict[str, Any]:
    """Runs the tests with the marker gpu."""
    if subject.settings.device == "cpu":
        return {"skipped": "they need a CUDA device"}
    return {"summary": subject.python("-m", "pytest", "-m", "gpu", "-q").strip().splitlines()[-1]}


def pixels(subject: Subject) -> dict[str, Any]:
    """Compares batches of the loader with the NumPy and Pillow reference, and with a second run of the loader."""
    from pipeline.loader.reference import compared

    found = compared(*subject.sets["short-side"], subject.settings)
    threshold = PIXEL_VALUE_THRESHOLDS[subject.settings.device]
    expected = f"expected right labels, the same batches again, and a mean difference below {threshold:g} pixel values"
    return asdict(found) | ({} if found.within(threshold) else {"failed": expected})


def supply(subject: Subject) -> dict[str, Any]:
    """Measures img/s of the loader alone and the CPU time of the host, by stored shape, share of the GPU's JPEG engines
    and number of threads."""
    from pipeline.loader.loader import stage_batch_sizes
    from pipeline.profiling.throughput import measure_throughput

    scale, base = subject.scale, subject.settings
    candidates = {f"hw_decoder_load {s:g}": replace(base, hw_decoder_load=s) for s in scale.hw_decoder_loads}
    candidates |= {f"{threads} threads": replace(base, threads=threads) for threads in scale.threads}
    found: dict[str, Any] = {"square": {"skipped": "no --square SHARDS"}, "else": asdict(base)}
    for stored, (shards, basis) in subject.sets.items():
        loaders = {name: partial(stage_batch_sizes, shards, basis, how, "full") for name, how in candidates.items()}
        measured = measure_throughput(loaders, scale.window_s, scale.rounds, discard=base.prefetched_batches)
        found[stored] = {name: asdict(throughput) for name, throughput in measured.items()}
    return found


def demand(subject: Subject) -> dict[str, Any]:
    """Measures img/s of the training step on replayed batches, for each window, by batch size and precision.

    Steps run in eager mode, as in training. torchvision's AlexNet, a different and cheaper network, is measured for
    comparison if torchvision is installed.
    """
    from tools.shared.step_switches import replay_img_s, torchvision_net

    networks: dict[str, Any] = {"": Subject.net}
    found: dict[str, Any] = {"torchvision": {"skipped": "it is not installed"}}
    if importlib.util.find_spec("torchvision"):
        networks["torchvision, "], found["torchvision"] = torchvision_net, version("torchvision")
    for rows in subject.scale.replay_batches:
        batches = subject.random_batches(rows)
        for (name, make), precision in product(networks.items(), subject.scale.precisions):
            model, optimizer = make(subject, precision)
            window = partial(replay_img_s, model, optimizer, batches, subject.scale.window_s, precision)
            found[f"{name}batch {rows}, {precision}"] = [window() for _ in range(subject.scale.rounds)]
    return found


def shares(subject: Subject) -> dict[str, Any]:
    """Measures the shares of a step's time on the device by kind of work, for each precision."""
    import torch

    from model.step_profile import step_shares
    from tools.shared.step_switches import replay_img_s

    found, batches = {}, subject.random_batches(subject.scale.batch)
    for precision in subject.scale.precisions:
        replay = partial(replay_img_s, *subject.net(precision), batches, subject.scale.window_s / 20, precision)
        replay()  # warm-up
        found[precision] = step_shares(replay, torch.device(subject.settings.device))
    return found


def together(subject: Subject) -> dict[str, Any]:
    """Runs train.py for each precision and keeps its stall report: accelerator utilisation (AU), the parts of the
    stall, overlap, and gaps on the device."""
    found = {}
    with TemporaryDirectory() as runs:
        for precision in subject.scale.precisions:
            length = ["--steps", subject.scale.steps, "--stall-seconds", 5 * subject.scale.window_s]
            subject.train(Path(runs) / precision, "--precision", precision, *length)
            found[precision] = json.loads((Path(runs) / precision / "stall.json").read_text())
    return found


def pair(subject: Subject) -> dict[str, Any]:
    """Compares losses of a few steps in IEEE float32, with one decoder for all images (train.py's default): a tower on
    each of two ranks (which share the GPU if there is only one), and both towers on one rank."""
    import torch

    if not torch.distributed.is_available():
        return {"skipped": "this torch has no torch.distributed"}
    losses = {}
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    options = ["--precision", "float32", "--steps", 4, "--lr-scale", GENTLE, "--log-every", 1, "--stall-seconds", 0]
    with TemporaryDirectory() as runs:
        for name, launcher in (("alone", ()), ("pair", torchrun)):
            subject.train(Path(runs) / name, *options, launcher=launcher)
            lines = (Path(runs) / name / "metrics.jsonl").read_text().splitlines()
            losses[name] = [json.loads(line)["loss"] for line in lines]
    difference = max(abs(a / b - 1) for a, b in zip(losses["pair"], losses["alone"], strict=True))
    found = {"losses": losses, "relative_difference": difference}
    if difference > SAME_LOSS:
        found["failed"] = f"losses differ by {difference:.2g} (relative), expected at most {SAME_LOSS:g}"
    return found


def engines(subject: Subject) -> dict[str, Any]:
    """Says whether the JPEG engines decode if they get a share of the images."""
    from tools.shared.loader_switches import measure_engines

    return measure_engines(*subject.sets["short-side"], subject.settings, 3 * subject.scale.window_s)


def switches(subject: Subject) -> dict[str, Any]:
    """Measures each switch of the training step and of the loader on and off, at every batch size."""
    from tools.shared.loader_switches import measure_all_switches

    scale = subject.scale
    return measure_all_switches(
        *subject.sets["short-side"],
        subject.settings,
        batches=scale.replay_batches,
        width=scale.width,
        budget_s=scale.switches_s,
        rounds=scale.rounds,
    )


# In the order of their worth: if the time is not enough, the last ones are left out.
ALL = (pixels, engines, switches, tests, together, supply, pair, demand, shares)
CHECKS = {check.__name__: check for check in ALL}


def main() -> int:
    """Runs the checks; returns the exit code."""
    args = parse()
    import torch

    from pipeline.loader.settings import check_device
    from tools.shared.gpu_record import describe

    check_device(args.device)
    subject = open_subject(args)
    checks = dict[str, dict[str, Any]]()
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    now = datetime.now(UTC)
    record = {**describe(device, now), "scale": asdict(subject.scale), "checks": checks}
    path = args.out / f"gpu-{'-'.join(device.lower().split())}-{now:%Y%m%d-%H%M%S}.json"
    everything = planned_s(subject.scale, len(subject.sets), len(PRECISIONS))
    plan = TimePlan.begun({name: everything[name] for name in args.only or CHECKS}, 60 * args.minutes)
    print(plan, flush=True)
    for name in plan.planned_s:
        started_s = time.perf_counter()
        try:
            late = plan.no_time_for(name)
            found = {"skipped": late} if late else CHECKS[name](subject)
        except Exception as error:  # one broken check must not stop the others
            found = {"failed": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        checks[name] = {**found, "seconds": time.perf_counter() - started_s}
        outcome = next((f"{key}: {found[key]}" for key in ("failed", "skipped") if key in found), "done")
        print(f"{name:10}{checks[name]['seconds']:8.1f} s  {outcome}", flush=True)
        write_json(path, record)
    print(f"written to {path}")
    return int(any("failed" in found for found in checks.values()))


def open_subject(args: argparse.Namespace) -> Subject:
    """Opens the shard sets with their eigenbasis."""
    from pipeline import rgb_pca
    from pipeline.loader.settings import LoaderSettings
    from pipeline.shards.reader import open_shards

    folders = {"short-side": args.shards} | ({"square": args.square} if args.square else {})
    sets = {}
    for stored, folder in folders.items():
        shards = open_shards(folder)
        sets[stored] = (shards, rgb_pca.load_for(shards))
    scale = replace(QUICK if args.quick else Scale(), precisions=PRECISIONS_OF[args.device])
    return Subject(sets, LoaderSettings(batch=scale.batch, device=args.device), scale)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("shards", type=Path, metavar="SHARDS", help="a train shard set")
    add("--square", type=Path, metavar="SHARDS", help="the same images, sharded with --stored square")
    add("--device", choices=("cpu", "cuda"), default="cuda", help="cpu: to try the checks; default: %(default)s")
    add("--quick", action="store_true", help="a small network and short windows, to try the checks")
    add("--only", nargs="+", choices=CHECKS, metavar="CHECK", help=f"run only some of {', '.join(CHECKS)}")
    add("--minutes", type=float, default=8.0, metavar="M", help="skip what would end later; default: %(default)g")
    add("--out", type=Path, default=Path("benchmarks"), metavar="DIR", help="default: %(default)s")
    args = parser.parse_args()
    require_positive(minutes=args.minutes)
    return args


if __name__ == "__main__":
    run(main)
