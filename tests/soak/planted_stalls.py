"""Stalls planted on purpose, with real work on real clocks: does the doctor name each, and do its predictions hold?

    PYTHONPATH=. python tests/long_planted_stalls.py SHARDS [--runs N] [--seconds S] [--only NAME ...] [--json FILE]

Every case feeds an emulated trainer (it sleeps, as a GPU would let the host do) from SHARDS with one thing made wrong.
Right is a verdict and a cause that the case allows. Of the changes that the doctor proposes, the first that can be made
here is made and measured again: settings of the feed, the set in memory, square pictures, an idle machine, another
core, a loop without the callback. Prints a Markdown table; exits with 1 below 19 in 20 right, or where half of the
predictions are more than 10 % off. Wants a machine with at least 2 idle cores: neighbours are a cause, and rightly
named as one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
from nvidia.dali import fn
from PIL import Image

from pipeline import rgb_pca
from pipeline.diagnosis.findings import Findings, build_findings, setup_of
from pipeline.diagnosis.predict import Action
from pipeline.loader import graphs
from pipeline.loader.augment import STORED
from pipeline.loader.loader import stage_batch_sizes
from pipeline.loader.settings import LoaderSettings
from pipeline.profiling.machine import memory_use
from pipeline.profiling.stages import measure_stages
from pipeline.profiling.throughput import measure_throughput
from pipeline.profiling.windows import EmulatedTrainer, TrainerUnderTest, WindowMeasurements, measure_windows
from pipeline.shards.format import Sample
from pipeline.shards.reader import ShardSet, open_shards
from tests.support import shard_fixtures

RIGHT, OFF = 0.95, 0.10  # share of runs; of predictions, in the median
CORES = len(os.sched_getaffinity(0))
BATCH = 128
STAGE_ROUNDS, ROUNDS = 2, 3
READ_AHEAD = 4  # batches: what the loader announces to the kernel before it needs them


# ---- ways to go wrong -------------------------------------------------------------------------------------------


class Disk(ShardSet):
    """A shard set on a disk of `img_s`, which reads ahead while nobody asks. Every `every` batches it takes `burst_s`
    longer, as where a shard begins. With `cache` nothing is read from it twice; the set is then 50 times as large, by
    other names for the same pictures."""

    def __init__(self, of: ShardSet, img_s: float, every: int = 0, burst_s: float = 0.0, cache: bool = False) -> None:
        super().__init__(of.folder, of.manifest, np.tile(of.index, 50 if cache else 1), of.manifest_sha256)
        self.img_s, self.every, self.burst_s, self.cache = img_s, every, burst_s, cache
        self.ready_s, self.batches = 0.0, 0
        self.names, self.cached = np.arange(len(self.index)), np.zeros(len(self.index), bool)

    def part(self, ids: np.ndarray) -> ShardSet:
        """These samples, on the same disk, in the same cache."""
        part = super().part(ids)
        assert isinstance(part, Disk)
        part.names = self.names[ids]
        return part

    def jpegs(self, ids: np.ndarray) -> list[np.ndarray]:
        """The bytes, once the disk has read them."""
        self.batches += 1
        names = self.names[ids]
        read = len(ids) - int(self.cached[names].sum())
        self.cached[names] = self.cache
        cost_s = read / self.img_s
        if self.every and self.batches % self.every == 0:
            cost_s += self.burst_s
        now_s = time.perf_counter()
        # The disk worked on while nobody asked, as far as its read-ahead goes.
        self.ready_s = max(self.ready_s, now_s - READ_AHEAD * len(ids) / self.img_s) + cost_s
        time.sleep(max(0.0, self.ready_s - now_s))
        return super().jpegs(ids)


BURN = """
import os, threading
threading.Thread(target=lambda: (os.read({0}, 1), os._exit(0)), daemon=True).start()
while True:
    sum(range(10_000))
"""


@contextmanager
def neighbours() -> Iterator[None]:
    """Other processes on every core, none of them a child of this one, until a pipe closes that they read."""
    ours, theirs = os.pipe()[::-1]
    for _ in range(CORES):
        command = ["sh", "-c", '"$0" -c "$1" &', sys.executable, BURN.format(theirs)]
        subprocess.run(command, pass_fds=[theirs], check=True)
    os.close(theirs)
    time.sleep(1.0)  # they must have started
    try:
        yield
    finally:
        os.close(ours)


@contextmanager
def dear_augmentation() -> Iterator[None]:
    """A blur of every crop, by DALI's own threads, where crops are lit."""
    cheap = graphs.lit

    def dear(crop: Any, *rest: Any) -> Any:
        return cheap(fn.gaussian_blur(crop, window_size=9), *rest)

    graphs.lit = dear
    try:
        yield
    finally:
        graphs.lit = cheap


@contextmanager
def one_core() -> Iterator[None]:
    """Nothing runs on more than the first core, DALI's threads neither."""
    all_of_them = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(all_of_them)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, all_of_them)


def huge(folder: Path) -> ShardSet:
    """A set of pictures of 1,400 x 1,100 pixels."""
    rng = np.random.default_rng(0)
    samples = []
    for number in range(2 * BATCH):
        coarse = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((1400, 1100), Image.Resampling.BICUBIC)
        samples.append(Sample(f"huge_{number:04d}", 0, shard_fixtures.jpeg_of(picture), 1400, 1100))
    return shard_fixtures.write_set(folder, samples, BATCH)


def square(folder: Path, shards: ShardSet) -> ShardSet:
    """The same pictures, cut to their central 256 x 256."""
    samples = []
    for number in range(len(shards)):
        pixels = shard_fixtures.decoded(shards, number)
        top, left = ((side - STORED) // 2 for side in pixels.shape[:2])
        picture = Image.fromarray(pixels[top : top + STORED, left : left + STORED])
        samples.append(Sample(f"square_{number:04d}", 0, shard_fixtures.jpeg_of(picture), STORED, STORED))
    folder.mkdir()
    return shard_fixtures.write_set(folder, samples, BATCH)


# ---- cases ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One thing made wrong. `demand` is a share of the healthy supply; `right` are pairs of verdict and cause, where an
    empty word allows any."""

    demand: float
    right: tuple[tuple[str, str], ...]
    shards: Callable[[ShardSet, float], ShardSet] = lambda shards, supply: shards
    settings: dict[str, Any] = field(default_factory=dict)
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    after_s: float = 0.0  # of a callback after every step
    jitter: float = 0.0  # of the trainer's step: some take so much longer, others shorter
    ranks: tuple[float, ...] = ()  # shares of the healthy supply that the other ranks get

    def cured(self, action: Action) -> Case | None:
        """Without what the doctor advises against; None where that cannot be made here."""
        match action.change:
            case "threads" | "queue":
                return replace(self, settings={**self.settings, **action.settings})
            case "memory" | "disk":
                return replace(self, shards=Case.shards)
            case "neighbours":
                return replace(self, around=nullcontext)
            case "cores" if self.around is one_core:
                return replace(self, around=nullcontext, settings={"threads": 1 + CORES})
            case "callback":
                return replace(self, after_s=0.0)
            case "square":
                return self
        return None


FEW = {"threads": 1}
CASES: dict[str, Case] = {
    "none": Case(0.25, (("compute-bound", ""),)),
    "slow trainer": Case(0.1, (("compute-bound", ""),)),
    "slow storage": Case(0.8, (("input-bound: storage", "slow storage"),), lambda s, rate: Disk(s, 0.3 * rate)),
    "cold cache": Case(0.8, (("input-bound: storage", "cold cache"),), lambda s, rate: Disk(s, 0.3 * rate, cache=True)),
    "bursts at shard edges": Case(
        0.8, (("input-bound: storage", "bursts"),), lambda s, rate: Disk(s, 20 * rate, 4, 6 * BATCH / rate)
    ),
    "few threads": Case(1.2, (("input-bound: decode", "few threads"),), settings=FEW),
    "neighbours": Case(1.2, (("input-bound: decode", "neighbours"), ("contention", "neighbours")), around=neighbours),
    "slow callback": Case(0.4, (("unexplained", "callback"),), after_s=0.02),
    "short queue": Case(0.7, (("contention", "short queue"),), settings={"queue_depth": 1}, jitter=0.9),
    "large pictures": Case(0.9, (("input-bound: decode", "large pictures"),)),
    "dear augmentation": Case(0.9, (("input-bound: augment", "augmentation"),), around=dear_augmentation),
    "slow rank": Case(0.9, (("input-bound: decode", "slow rank"),), settings=FEW, ranks=(1.0, 1.0, 1.0)),
    "few cores": Case(1.2, (("input-bound: decode", "few cores"),), around=one_core, settings={"threads": 2}),
}


@dataclass(frozen=True)
class Outcome:
    """Of one run of one case; `neighbours`: cores that other processes took; `off` is the prediction's error where
    there was a change to make and measure."""

    case: str
    verdict: str
    cause: str
    right: bool
    au: float
    neighbours: float
    change: str
    together: float
    predicted: float | None
    measured: float | None

    def __str__(self) -> str:
        found = f"{self.case}: {self.verdict}, {self.cause}, {'right' if self.right else 'WRONG'}, AU {self.au:.1%}"
        off = "" if self.off is None else f"; {self.change}: {self.predicted:,.0f}, measured {self.off:+.1%}"
        return f"{found}, neighbours {self.neighbours:.2f}{off}"

    @property
    def off(self) -> float | None:
        """Measured over predicted, minus 1."""
        return None if self.predicted is None or self.measured is None else self.measured / self.predicted - 1


class Bench:
    """The shard set, its twin of square pictures, and how long to measure."""

    def __init__(self, shards: ShardSet, seconds: float, folder: Path) -> None:
        self.shards, self.seconds, self.folder = shards, seconds, folder
        self.square, self.huge = square(folder / "square", shards), huge(folder)
        self.basis = rgb_pca.load(shards.folder / "eigenbasis.json", shards)

    def healthy(self) -> float:
        """img/s of the feed with nothing wrong, right now."""
        feed = partial(stage_batch_sizes, self.shards, self.basis, LoaderSettings(batch=BATCH), "full")
        return measure_throughput({"full": feed}, self.seconds, 1, discard=READ_AHEAD)["full"].img_s

    def run(self, name: str, case: Case) -> Outcome:
        """Plants, measures, diagnoses; then makes the first change that can be made, and measures again."""
        supply = self.healthy()
        plain = self.huge if name == "large pictures" else self.shards
        with case.around():
            found = self.examine(plain, case, supply)
        right = any(
            found.report.verdict == verdict and cause in ("", found.cause.name) for verdict, cause in case.right
        )
        cures = ((action, cure) for action in found.actions if (cure := case.cured(action)))
        action, cure = next(cures, (None, None))
        measured = None
        if action is not None and cure is not None:
            with cure.around():
                again = self.fed(self.square if action.change == "square" else plain, cure, supply)
                measured = again.clocks.images / again.clocks.elapsed_s
        return Outcome(
            name,
            found.report.verdict,
            found.cause.name,
            right,
            found.report.au,
            found.load.neighbours,
            action.text if action else "",
            found.report.together,
            action.together if action else None,
            measured,
        )

    def settings(self, case: Case) -> LoaderSettings:
        """The case's."""
        return replace(LoaderSettings(batch=BATCH), **case.settings)

    def examine(self, plain: ShardSet, case: Case, supply: float) -> Findings:
        """What the doctor finds."""
        shards, settings = case.shards(plain, supply), self.settings(case)
        stages = measure_stages(shards, self.basis, settings, self.seconds, STAGE_ROUNDS)
        observed = self.fed(plain, case, supply)
        setup = setup_of(shards, settings, len(os.sched_getaffinity(0)))
        rates = (observed.supply, *(share * supply for share in case.ranks)) if case.ranks else ()
        return build_findings(stages, observed, setup, memory_use(), {}, rank_supplies=rates)

    def fed(self, plain: ShardSet, case: Case, supply: float) -> WindowMeasurements:
        """The trainer's windows."""
        trainer, rng = EmulatedTrainer(case.demand * supply), np.random.default_rng(0)

        def step(images: int) -> None:
            trainer(round(images * (1 + case.jitter * rng.choice([-1, 1]))))

        settings = self.settings(case)
        subject = TrainerUnderTest[int](size=int, step=step, after=lambda images: time.sleep(case.after_s))
        shards = case.shards(plain, supply)
        feed = cast(Generator[int], stage_batch_sizes(shards, self.basis, settings, "full"))
        discard = settings.prefetched_batches + READ_AHEAD * isinstance(shards, Disk)
        kept = [settings.batch] * (8 if case.jitter else 1)
        with closing(feed):
            return measure_windows(feed, subject, kept, self.seconds, discard, ROUNDS)


def table(outcomes: list[Outcome]) -> str:
    """Markdown: a row for every case."""
    rows = [
        "| planted | right | verdicts | causes | AU | img/s | change: predicted | measured | off |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(outcome.case for outcome in outcomes):
        those = [outcome for outcome in outcomes if outcome.case == name]
        changed = [o for o in those if o.off is not None]
        cells = [
            name,
            f"{sum(o.right for o in those)} of {len(those)}",
            ", ".join(sorted({o.verdict for o in those})),
            ", ".join(sorted({o.cause for o in those})),
            f"{median(o.au for o in those):.1%}",
            f"{median(o.together for o in those):,.0f}",
            f"{changed[0].change}: {median(o.predicted or 0 for o in changed):,.0f}" if changed else "",
            f"{median(o.measured or 0 for o in changed):,.0f}" if changed else "",
            f"{median(o.off or 0 for o in changed):+.1%}" if changed else "",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> int:
    """Runs the cases in turn, `--runs` times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.5, help="of one window (default 0.5)")
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    outcomes = list[Outcome]()
    with TemporaryDirectory() as folder:
        bench = Bench(open_shards(args.shards), args.seconds, Path(folder))
        for _ in range(args.runs):
            for name in args.only:
                outcomes.append(bench.run(name, CASES[name]))
                print(outcomes[-1], file=sys.stderr)
                if args.json:
                    args.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    print(table(outcomes))
    right = sum(outcome.right for outcome in outcomes) / len(outcomes)
    off = [abs(outcome.off) for outcome in outcomes if outcome.off is not None]
    print(f"\n{right:.0%} right; predictions {median(off):.1%} off in the median" if off else f"\n{right:.0%} right")
    return int(right < RIGHT or (bool(off) and median(off) > OFF))


if __name__ == "__main__":
    sys.exit(main())
