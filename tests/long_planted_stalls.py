"""Stalls planted on purpose, with real work on real clocks: does the doctor name each, and do its predictions hold?

    PYTHONPATH=. python tests/long_planted_stalls.py SHARDS [--runs N] [--seconds S] [--only NAME ...] [--json FILE]

Every case feeds an emulated trainer (it sleeps, as a GPU would let the host do) from SHARDS with one thing made wrong.
Right is a verdict and a cause that the case allows. Where the doctor proposes a change that takes settings only, it is
made and measured again. Prints a Markdown table; exits with 1 below 19 in 20 right, or where half of the predictions
are more than 10 % off. Wants a machine with at least 2 idle cores: neighbours are a cause, and rightly named as one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import numpy as np
import shard_fixtures
from nvidia.dali import fn
from PIL import Image

from pipeline import eigenbasis, graphs
from pipeline.augment import STORED
from pipeline.causes import Evidence, cause_of
from pipeline.doctor import EmulatedTrainer, Subject, observe
from pipeline.findings import Findings, Setup, find
from pipeline.graphs import Stage
from pipeline.loader import FeedSettings, stage_sizes
from pipeline.rates import measure_rates
from pipeline.shards import Sample, ShardSet, open_shards

RIGHT, OFF = 0.95, 0.10  # share of runs; of predictions, in the median
CORES = len(os.sched_getaffinity(0))
BATCH = 64
READ_AHEAD = 4  # batches: what the loader announces to the kernel before it needs them


# ---- ways to go wrong -------------------------------------------------------------------------------------------


class Disk(ShardSet):
    """A shard set on a disk of `img_s`, which reads ahead while nobody asks. Every `every` batches it takes `burst_s`
    longer, as where a shard begins."""

    def __init__(self, of: ShardSet, img_s: float, every: int = 0, burst_s: float = 0.0) -> None:
        super().__init__(of.folder, of.manifest, of.index, of.manifest_sha256)
        self.img_s, self.every, self.burst_s = img_s, every, burst_s
        self.ready_s, self.batches = 0.0, 0

    def jpegs(self, ids: np.ndarray) -> list[np.ndarray]:
        """The bytes, once the disk has read them."""
        self.batches += 1
        cost_s = len(ids) / self.img_s
        if self.every and self.batches % self.every == 0:
            cost_s += self.burst_s
        now_s = time.perf_counter()
        # The disk worked on while nobody asked, as far as its read-ahead goes.
        self.ready_s = max(self.ready_s, now_s - READ_AHEAD * len(ids) / self.img_s) + cost_s
        time.sleep(max(0.0, self.ready_s - now_s))
        return super().jpegs(ids)


def _burn(until: Any) -> None:
    while not until.is_set():
        sum(range(10_000))


@contextmanager
def neighbours() -> Iterator[None]:
    """Other processes on every core."""
    context = multiprocessing.get_context("spawn")
    until = context.Event()
    burning = [context.Process(target=_burn, args=(until,)) for _ in range(CORES)]
    for process in burning:
        process.start()
    time.sleep(1.5)  # they must have started
    try:
        yield
    finally:
        until.set()
        for process in burning:
            process.join()


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


def huge(folder: Path) -> ShardSet:
    """A set of pictures of 1,400 x 1,100 pixels."""
    rng = np.random.default_rng(0)
    samples = []
    for number in range(2 * BATCH):
        coarse = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((1400, 1100), Image.Resampling.BICUBIC)
        samples.append(Sample(f"huge_{number:04d}", 0, shard_fixtures.jpeg_of(picture), 1400, 1100))
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
    again: Literal["", "slow", "fast"] = ""  # what reading the same again is: a disk without a cache, or with one
    ranks: tuple[float, ...] = ()  # shares of the healthy supply that the other ranks get


FEW = {"threads": 1}
CASES: dict[str, Case] = {
    "none": Case(0.5, (("compute-bound", ""),)),
    "slow trainer": Case(0.1, (("compute-bound", ""),)),
    "slow storage": Case(
        0.8, (("input-bound: storage", "slow storage"),), lambda s, rate: Disk(s, 0.3 * rate), again="slow"
    ),
    "cold cache": Case(
        0.8, (("input-bound: storage", "cold cache"),), lambda s, rate: Disk(s, 0.3 * rate), again="fast"
    ),
    "bursts at shard edges": Case(
        0.8, (("input-bound: storage", "bursts"),), lambda s, rate: Disk(s, 20 * rate, 16, 24 * BATCH / rate)
    ),
    "few threads": Case(0.9, (("input-bound: decode", "few threads"),), settings=FEW),
    "neighbours": Case(0.9, (("input-bound: decode", "neighbours"), ("contention", "neighbours")), around=neighbours),
    "slow callback": Case(0.4, (("unexplained", "callback"),), after_s=0.02),
    "short queue": Case(0.7, (("contention", "short queue"),), settings={"queue_depth": 1}, jitter=0.9),
    "large pictures": Case(0.9, (("input-bound: decode", "large pictures"),)),
    "dear augmentation": Case(0.9, (("input-bound: augment", "augmentation"),), around=dear_augmentation),
    "slow rank": Case(0.9, (("input-bound: decode", "slow rank"),), settings=FEW, ranks=(1.0, 1.0, 1.0)),
    "few cores": Case(2.5, (("input-bound: decode", "few cores"),)),
}


@dataclass(frozen=True)
class Outcome:
    """Of one run of one case; `off` is the prediction's error where there was a change to make and measure."""

    case: str
    verdict: str
    cause: str
    right: bool
    au: float
    change: str
    predicted: float | None
    measured: float | None

    @property
    def off(self) -> float | None:
        """Measured over predicted, minus 1."""
        return None if self.predicted is None or self.measured is None else self.measured / self.predicted - 1


class Bench:
    """The shard set, and how long to measure."""

    def __init__(self, shards: ShardSet, seconds: float) -> None:
        self.shards, self.seconds = shards, seconds
        self.bases = {shards.folder: eigenbasis.load(shards.folder / "eigenbasis.json", shards)}

    def stages(self, shards: ShardSet, settings: FeedSettings) -> dict[str, Any]:
        """Rates by stage."""
        if shards.folder not in self.bases:
            self.bases[shards.folder] = shard_fixtures.basis_of(shards)
        basis = self.bases[shards.folder]
        feeds = {stage: partial(stage_sizes, shards, basis, settings, stage) for stage in get_args(Stage)}
        return measure_rates(feeds, self.seconds, 2, discard=settings.queue_depth + READ_AHEAD + 1)

    def healthy(self) -> float:
        """img/s of the feed with nothing wrong, right now."""
        return float(self.stages(self.shards, FeedSettings(batch=BATCH))["full"].img_s)

    def run(self, name: str, case: Case, folder: Path) -> Outcome:
        """Plants, measures, diagnoses; then makes the first change that takes settings, and measures again."""
        supply = self.healthy()
        shards = huge(folder) if name == "large pictures" else case.shards(self.shards, supply)
        settings = replace(FeedSettings(batch=BATCH), **case.settings)
        with case.around():
            found = self.examine(shards, settings, case, case.demand * supply, supply)
            right = any(
                found.report.verdict == verdict and cause in ("", found.cause.name) for verdict, cause in case.right
            )
            action = next((action for action in found.actions if action.settings), None)
            again = None
            if action is not None:
                changed = replace(settings, **action.settings)
                again = self.examine(shards, changed, case, case.demand * supply, supply)
        return Outcome(
            name,
            found.report.verdict,
            found.cause.name,
            right,
            found.report.au,
            action.text if action else "",
            action.together if action else None,
            again.report.together if again else None,
        )

    def examine(self, shards: ShardSet, settings: FeedSettings, case: Case, demand: float, supply: float) -> Findings:
        """What the doctor finds."""
        stages = self.stages(shards, settings)
        trainer, rng = EmulatedTrainer(demand), np.random.default_rng(0)

        def step(images: int) -> None:
            trainer(round(images * (1 + case.jitter * rng.choice([-1, 1]))))

        subject = Subject[int](size=int, step=step, after=lambda images: time.sleep(case.after_s))
        feed = stage_sizes(shards, self.bases[shards.folder], settings, "full")
        discard = settings.queue_depth + READ_AHEAD + 1
        observed = observe(feed, subject, [settings.batch] * (8 if case.jitter else 1), self.seconds, discard)
        del feed
        area = float((shards.index["width"].astype(float) * shards.index["height"]).mean()) / STORED**2
        setup = Setup(settings.threads, settings.queue_depth, CORES, area)
        cached = {"": None, "slow": shards, "fast": self.shards}[case.again]
        warm = None if cached is None else self.stages(cached, settings)["read"].img_s
        found = find(stages, observed, setup, {"resident": 0, "shared": 0}, {}, warm_read=warm)
        if case.ranks:
            rates = (observed.supply, *(share * supply for share in case.ranks))
            found = replace(found, cause=cause_of(Evidence(found.report.verdict, found.load, rank_supplies=rates)))
        return found


def table(outcomes: list[Outcome]) -> str:
    """Markdown: a row for every case."""
    rows = [
        "| planted | right | verdicts | causes | AU | predicted | measured | off |",
        "|---|---|---|---|---|---|---|---|",
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
    parser.add_argument("--seconds", type=float, default=1.0, help="of one window (default 1)")
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bench, outcomes = Bench(open_shards(args.shards), args.seconds), list[Outcome]()
    for _ in range(args.runs):
        for name in args.only:
            with TemporaryDirectory() as folder:
                outcomes.append(bench.run(name, CASES[name], Path(folder)))
            last = outcomes[-1]
            print(f"{name}: {last.verdict}, {last.cause}, {'right' if last.right else 'WRONG'}", file=sys.stderr)
    print(table(outcomes))
    right = sum(outcome.right for outcome in outcomes) / len(outcomes)
    off = [abs(outcome.off) for outcome in outcomes if outcome.off is not None]
    print(f"\n{right:.0%} right; predictions {median(off):.1%} off in the median" if off else f"\n{right:.0%} right")
    if args.json:
        args.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    return int(right < RIGHT or (bool(off) and median(off) > OFF))


if __name__ == "__main__":
    sys.exit(main())
