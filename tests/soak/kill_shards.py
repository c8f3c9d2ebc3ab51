"""Kills make_shards at random moments, runs it again, and compares with a run that nobody disturbed.

    python tests/long_kill_shards.py [--runs 200] [--seed 1]

Every run: a fresh folder, one worker (every twentieth 2 or 3), SIGKILL after up to twice the time that a whole run
takes, again and again until one gets through. Then every file must be, byte for byte, the undisturbed run's, and no
other may be there. Prints a line per 10 runs and a summary; exits with 1 at the first difference.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from pathlib import Path

import psutil

from tests.support.shard_fixtures import files_of

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from pipeline.imagenet.source import open_source  # noqa: E402
from pipeline.shards import build as sharder  # noqa: E402
from pipeline.shards.build import ShardSettings, make_split  # noqa: E402
from pipeline.synthetic.dataset import SampleSettings, make_sample  # noqa: E402
from pipeline.workers import IN_PROCESS, ignore, workers_of  # noqa: E402


def make(source: Path, out: Path, workers: int) -> None:
    """What make_shards does, without its start: most kills are to hit the work."""
    where = open_source(source)
    with workers_of(workers, sharder.__name__) as crew:
        for split in where.splits():
            make_split(where.listing(split), out, ShardSettings(shard_samples=6), crew, 10, ignore)


def start(source: Path, out: Path, workers: int) -> ForkProcess:
    process = get_context("fork").Process(target=make, args=(source, out, workers))
    process.start()
    return process


def seconds_of(source: Path, out: Path, workers: int) -> float:
    """The time of an undisturbed run."""
    started_s = time.monotonic()
    process = start(source, out, workers)
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - started_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_sample(root / "sample", SampleSettings(classes=3, train_images=24, val_images=4), IN_PROCESS, ignore)
        whole_s = {n: seconds_of(root / "sample", root / f"whole-{n}", n) for n in (1, 2, 3)}
        expected = files_of(root / "whole-1")
        assert files_of(root / "whole-2") == files_of(root / "whole-3") == expected
        hits: Counter[str] = Counter()
        for run in range(1, args.runs + 1):
            out = root / f"run-{run}"
            workers = draw.choice([2, 3]) if run % 20 == 0 else 1
            kills = 0
            while True:
                process = start(root / "sample", out, workers)
                process.join(timeout=whole_s[workers] * draw.uniform(0, 2))
                if process.exitcode is None:
                    helpers = psutil.Process(process.pid).children(recursive=True)
                    process.kill()
                    process.join()
                    psutil.wait_procs(helpers)  # they end by themselves, once they have started: else they pile up
                    hits[state_of(out)] += 1
                    kills += 1
                elif kills:
                    break
                else:  # it got through at once: that proves nothing
                    shutil.rmtree(out)
            found = files_of(out)
            if process.exitcode or found != expected:
                names = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))
                print(f"run {run} ended with {process.exitcode}, seed {args.seed}; these files differ: {names}")
                return 1
            shutil.rmtree(out)
            if run % 10 == 0:
                print(f"{run} of {args.runs} runs, {sum(hits.values())} kills, all equal so far", flush=True)
    print(f"{args.runs} runs, {sum(hits.values())} kills; where they hit: {dict(sorted(hits.items()))}")
    print("every folder is byte for byte that of the undisturbed run")
    return 0


def state_of(out: Path) -> str:
    """How far the killed run had come."""
    for split in ("val", "train"):
        if (out / split).exists():
            return f"{split} whole"
        if (out / f"{split}.unfinished").exists():
            shards = len(list((out / f"{split}.unfinished").glob("*.tar")))
            return f"{split}, {shards:2} shards"
    return "nothing written"


if __name__ == "__main__":
    sys.exit(main())
