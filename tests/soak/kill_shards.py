"""Kills make_shards at random moments, runs it again, and compares the result with an uninterrupted run.

    python -m tests.soak.kill_shards [--runs 200] [--seed 1]

Each run uses a fresh folder and one worker (every twentieth run uses 2 or 3). It is killed with SIGKILL after a random
time of up to twice that of an uninterrupted run, and started again, until it completes. The folder must then hold
exactly the files of the uninterrupted run, byte for byte. Prints a line per 10 runs and a summary. Exits with 1 at the
first difference.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from pathlib import Path

import psutil

from pipeline.imagenet.source import open_source
from pipeline.shards.build import make_split
from pipeline.shards.settings import ShardSettings
from pipeline.synthetic.dataset import SampleSettings, make_sample
from pipeline.workers import IN_PROCESS, ignore, workers_of
from tests.support.shard_fixtures import files_of

WORKER_COUNTS = (1, 2, 3)


def make_shards(source: Path, out: Path, worker_count: int) -> None:
    """Does the work of make_shards without its start-up, so that most kills interrupt the work itself."""
    opened = open_source(source)
    with workers_of(worker_count, make_split.__module__) as workers:
        for split in opened.splits():
            make_split(opened.listing(split), out, ShardSettings(shard_samples=6), workers, 10, ignore)


def start(source: Path, out: Path, worker_count: int) -> ForkProcess:
    process = get_context("fork").Process(target=make_shards, args=(source, out, worker_count))
    process.start()
    return process


def duration_s(source: Path, out: Path, worker_count: int) -> float:
    """Duration of an uninterrupted run."""
    started_s = time.monotonic()
    process = start(source, out, worker_count)
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - started_s


@dataclass
class Killer:
    """Runs make_shards and kills it, at moments drawn from `rng`.

    Attributes:
        source: The sample dataset.
        uninterrupted_s: Duration of an uninterrupted run by number of workers.
        rng: Source of all random numbers.
        kills: Number of kills by the state in which they left the folder.
    """

    source: Path
    uninterrupted_s: dict[int, float]
    rng: random.Random
    kills: Counter[str] = field(default_factory=Counter)

    def run(self, out: Path, worker_count: int) -> int | None:
        """Starts and kills runs into `out` until one completes after at least one kill. Returns its exit code."""
        killed = False
        while True:
            process = start(self.source, out, worker_count)
            process.join(timeout=self.uninterrupted_s[worker_count] * self.rng.uniform(0, 2))
            if process.exitcode is None:
                children = psutil.Process(process.pid).children(recursive=True)
                process.kill()
                process.join()
                psutil.wait_procs(children)  # workers exit by themselves; without the wait they would accumulate
                self.kills[state_of(out)] += 1
                killed = True
            elif killed:
                return process.exitcode
            else:  # it completed before it was killed, which proves nothing
                shutil.rmtree(out)


def state_of(out: Path) -> str:
    """How far a killed run had come."""
    for split in ("val", "train"):
        if (out / split).exists():
            return f"{split} complete"
        if (out / f"{split}.unfinished").exists():
            shards = len(list((out / f"{split}.unfinished").glob("*.tar")))
            return f"{split}, {shards:2} shards"
    return "nothing written"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_sample(root / "sample", SampleSettings(classes=3, train_images=24, val_images=4), IN_PROCESS, ignore)
        uninterrupted_s = {n: duration_s(root / "sample", root / f"expected-{n}", n) for n in WORKER_COUNTS}
        expected = files_of(root / "expected-1")
        assert files_of(root / "expected-2") == files_of(root / "expected-3") == expected
        killer = Killer(root / "sample", uninterrupted_s, rng)
        for run in range(1, args.runs + 1):
            out = root / f"run-{run}"
            code = killer.run(out, rng.choice([2, 3]) if run % 20 == 0 else 1)
            found = files_of(out)
            if code or found != expected:
                names = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))
                print(f"run {run} exited with {code}, seed {args.seed}; these files differ: {names}")
                return 1
            shutil.rmtree(out)
            if run % 10 == 0:
                print(f"{run} of {args.runs} runs, {killer.kills.total()} kills, all equal so far", flush=True)
    print(f"{args.runs} runs, {killer.kills.total()} kills; state after the kill: {dict(sorted(killer.kills.items()))}")
    print("every folder is byte for byte that of the uninterrupted run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
