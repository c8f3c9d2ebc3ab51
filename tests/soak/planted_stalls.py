"""Plants stalls on purpose, with real work on real clocks, and checks diagnosis and predictions of the stall report.

    python -m tests.soak.planted_stalls SHARDS [--runs N] [--seconds S] [--only NAME ...] [--json FILE]

Every case trains an emulated trainer (it sleeps, as the host does while a GPU works) from SHARDS with one thing wrong.
A diagnosis is right if the case allows its verdict and cause. Of the actions that the report ranks, the first that can
be made here is made and measured again: loader settings, the set in memory, square images, no neighbours, another core,
no callback. Prints a Markdown table. Exits with 1 if fewer than 19 of 20 diagnoses are right, or if half of the
predictions are more than 10% off. Requires at least 2 idle cores: other processes are a cause, and are named as one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np

from pipeline import rgb_pca
from pipeline.diagnosis.accounting import INDISTINCT
from pipeline.diagnosis.findings import Findings, build_findings
from pipeline.diagnosis.predict import Action
from pipeline.diagnosis.workload import setup_of
from pipeline.host import read_host
from pipeline.loader.loader import stage_batch_sizes
from pipeline.loader.settings import LoaderSettings
from pipeline.profiling.machine import memory_use
from pipeline.profiling.stages import measure_stages
from pipeline.profiling.throughput import measure_throughput
from pipeline.profiling.windows import EmulatedTrainer, TrainerUnderTest, WindowMeasurements, measure_windows
from pipeline.shards.reader import ShardSet, open_shards
from tests.soak.faults import (
    CORES,
    READ_AHEAD_BATCHES,
    Disk,
    bursty_disk,
    expensive_augmentation,
    large_images,
    noisy_neighbours,
    one_core,
    slow_disk,
    slow_disk_with_cache,
    square_images,
)

MIN_RIGHT_SHARE = 0.95  # of runs
MAX_MEDIAN_ERROR = 0.10  # of predictions
BATCH = 128
SUITE_STAGE_ROUNDS, SUITE_ROUNDS = 2, 5


@dataclass(frozen=True)
class Case:
    """One thing made wrong.

    Attributes:
        demand_ratio: demand over the supply of a healthy loader.
        right: allowed pairs of verdict and cause; an empty cause allows any.
        shards: makes the set to read, of a set and the healthy supply.
        settings: changed loader settings.
        around: what is wrong while the case runs.
        after_s: seconds of a callback after every step.
        jitter: share by which a step of the trainer is longer or shorter at random.
        other_ranks: supplies of other ranks, over the healthy supply.
    """

    demand_ratio: float
    right: tuple[tuple[str, str], ...]
    shards: Callable[[ShardSet, float], ShardSet] = lambda shards, supply: shards
    settings: dict[str, Any] = field(default_factory=dict)
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    after_s: float = 0.0
    jitter: float = 0.0
    other_ranks: tuple[float, ...] = ()

    def changed(self, action: Action) -> Case | None:
        """The case after the action; None if the action cannot be made here."""
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


ONE_THREAD = {"threads": 1}
NEIGHBOURS = (("input-bound: decode", "noisy neighbours"), ("contention", "noisy neighbours"))
CASES: dict[str, Case] = {
    "none": Case(0.25, (("compute-bound", ""), (INDISTINCT, ""))),
    "slow trainer": Case(0.1, (("compute-bound", ""),)),
    "slow storage": Case(0.8, (("input-bound: storage", "slow storage"),), slow_disk),
    "cold cache": Case(0.8, (("input-bound: storage", "cold cache"),), slow_disk_with_cache),
    "bursts at shard edges": Case(0.8, (("input-bound: storage", "bursts"),), bursty_disk),
    "few threads": Case(1.2, (("input-bound: decode", "few threads"),), settings=ONE_THREAD),
    "noisy neighbours": Case(1.2, NEIGHBOURS, around=noisy_neighbours),
    "slow callback": Case(0.4, (("unexplained", "slow callback"),), after_s=0.02),
    "short queue": Case(
        0.7, (("contention", "short queue"), (INDISTINCT, "short queue")), settings={"queue_depth": 1}, jitter=0.9
    ),
    "large images": Case(0.9, (("input-bound: decode", "large images"),)),
    "expensive augmentation": Case(
        0.9, (("input-bound: augment", "expensive augmentation"),), around=expensive_augmentation
    ),
    "slow rank": Case(0.9, (("input-bound: decode", "slow rank"),), settings=ONE_THREAD, other_ranks=(1.0, 1.0, 1.0)),
    "few cores": Case(1.2, (("input-bound: decode", "few cores"),), around=one_core, settings={"threads": 2}),
}


@dataclass(frozen=True)
class CaseOutcome:
    """One run of one case.

    Attributes:
        case: its name.
        verdict: of the report.
        cause: of the report.
        right: whether the case allows them.
        au: accelerator utilisation.
        neighbour_cores: cores that other processes used.
        change: the first action that can be made here, or an empty text.
        together: img/s of the real steps.
        predicted: img/s predicted for the change; None without one.
        measured: img/s measured after the change; None without one.
    """

    case: str
    verdict: str
    cause: str
    right: bool
    au: float
    neighbour_cores: float
    change: str
    together: float
    predicted: float | None
    measured: float | None

    def __str__(self) -> str:
        found = f"{self.case}: {self.verdict}, {self.cause}, {'right' if self.right else 'WRONG'}, AU {self.au:.1%}"
        error = "" if self.error is None else f"; {self.change}: {self.predicted:,.0f}, measured {self.error:+.1%}"
        return f"{found}, neighbours {self.neighbour_cores:.2f}{error}"

    @property
    def error(self) -> float | None:
        """Measured over predicted, minus 1."""
        return None if self.predicted is None or self.measured is None else self.measured / self.predicted - 1


class PlantedSuite:
    """The shard set, the same images as squares, a set of large images, and the length of a window."""

    def __init__(self, shards: ShardSet, seconds: float, folder: Path) -> None:
        self.shards, self.seconds = shards, seconds
        self.square, self.large = square_images(folder / "square", shards), large_images(folder)
        self.basis = rgb_pca.load_for(shards)

    def healthy_supply(self) -> float:
        """img/s of the loader with nothing wrong, at this moment."""
        sizes = partial(stage_batch_sizes, self.shards, self.basis, LoaderSettings(batch=BATCH), "full")
        return measure_throughput({"full": sizes}, self.seconds, 1, discard=READ_AHEAD_BATCHES)["full"].img_s

    def run(self, name: str, case: Case) -> CaseOutcome:
        """Plants, measures and diagnoses; then makes the first change that can be made, and measures again."""
        supply = self.healthy_supply()
        plain = self.large if name == "large images" else self.shards
        with case.around():
            found = self.diagnose(plain, case, supply)
        verdict, cause = found.account.verdict, found.cause.name
        right = any(verdict.startswith(allowed) and of in ("", cause) for allowed, of in case.right)
        changes = ((action, after) for action in found.actions if (after := case.changed(action)))
        action, after = next(changes, (None, None))
        measured = None
        if action is not None and after is not None:
            with after.around():
                clocks = self.windows(self.square if action.change == "square" else plain, after, supply).clocks
                measured = clocks.images / clocks.elapsed_s
        return CaseOutcome(
            name,
            verdict,
            cause,
            right,
            found.account.au,
            found.workload.neighbour_cores,
            action.text if action else "",
            found.account.together,
            action.together if action else None,
            measured,
        )

    def settings(self, case: Case) -> LoaderSettings:
        """The loader settings of the case."""
        return replace(LoaderSettings(batch=BATCH), **case.settings)

    def diagnose(self, plain: ShardSet, case: Case, supply: float) -> Findings:
        """The stall report of the case."""
        shards, settings = case.shards(plain, supply), self.settings(case)
        stages = measure_stages(shards, self.basis, settings, self.seconds, SUITE_STAGE_ROUNDS)
        measured = self.windows(plain, case, supply)
        setup = setup_of(shards, settings, read_host())
        others = [ratio * supply for ratio in case.other_ranks]
        ranks = (measured.supply, *others) if others else ()
        return build_findings(stages, measured, setup, memory_use(), {}, rank_supplies=ranks)

    def windows(self, plain: ShardSet, case: Case, supply: float) -> WindowMeasurements:
        """The windows of loader, trainer and both."""
        trainer, rng = EmulatedTrainer(case.demand_ratio * supply), np.random.default_rng(0)

        def step(images: int) -> None:
            trainer(round(images * (1 + case.jitter * rng.choice([-1, 1]))))

        settings, shards = self.settings(case), case.shards(plain, supply)
        subject = TrainerUnderTest[int](size=int, step=step, after=lambda images: time.sleep(case.after_s))
        sizes = cast(Generator[int], stage_batch_sizes(shards, self.basis, settings, "full"))
        discard = settings.prefetched_batches + READ_AHEAD_BATCHES * isinstance(shards, Disk)
        replayed = [settings.batch] * (8 if case.jitter else 1)
        with closing(sizes):
            return measure_windows(sizes, subject, replayed, self.seconds, discard, SUITE_ROUNDS)


def markdown_table(outcomes: list[CaseOutcome]) -> str:
    """A Markdown table with a row for every case."""
    rows = [
        "| planted | right | verdicts | causes | AU | img/s | change: predicted | measured | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(outcome.case for outcome in outcomes):
        those = [outcome for outcome in outcomes if outcome.case == name]
        changed = [o for o in those if o.error is not None]
        cells = [
            name,
            f"{sum(o.right for o in those)} of {len(those)}",
            ", ".join(sorted({o.verdict for o in those})),
            ", ".join(sorted({o.cause for o in those})),
            f"{median(o.au for o in those):.1%}",
            f"{median(o.together for o in those):,.0f}",
            f"{changed[0].change}: {median(o.predicted or 0 for o in changed):,.0f}" if changed else "",
            f"{median(o.measured or 0 for o in changed):,.0f}" if changed else "",
            f"{median(o.error or 0 for o in changed):+.1%}" if changed else "",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> int:
    """Runs the cases in turn, `--runs` times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="folder of a shard set with its eigenbasis")
    parser.add_argument("--runs", type=int, default=3, help="of every case (default 3)")
    parser.add_argument("--seconds", type=float, default=0.5, help="length of a window (default 0.5)")
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES), metavar="NAME", help="run these cases")
    parser.add_argument("--json", type=Path, help="write every outcome to this file")
    args = parser.parse_args()
    outcomes = list[CaseOutcome]()
    with TemporaryDirectory() as folder:
        suite = PlantedSuite(open_shards(args.shards), args.seconds, Path(folder))
        for _ in range(args.runs):
            for name in args.only:
                outcomes.append(suite.run(name, CASES[name]))
                print(outcomes[-1], file=sys.stderr)
                if args.json:
                    args.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    print(markdown_table(outcomes))
    right = sum(outcome.right for outcome in outcomes) / len(outcomes)
    errors = [abs(outcome.error) for outcome in outcomes if outcome.error is not None]
    print(f"\n{right:.0%} right" + (f"; median error of predictions {median(errors):.1%}" if errors else ""))
    return int(right < MIN_RIGHT_SHARE or (bool(errors) and median(errors) > MAX_MEDIAN_ERROR))


if __name__ == "__main__":
    sys.exit(main())
