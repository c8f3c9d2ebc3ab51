"""Kills a random rank at a random step, again and again, and compares each run with one that nothing happened to.

    python tests/long_kill_ranks.py --runs 50

Every run is `torchrun --nproc-per-node 2 --max-restarts 3` on a small drawn sample; SIGKILL comes a random part of a
step after a random step. Losses of all steps, and the bytes of the last checkpoint, must be those of the whole run.
Prints a line a run and a summary; exits with 1 where one run differs. A run takes about 20 seconds on 2 cores.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from model import checkpoint
from pipeline import rgb_pca
from pipeline.imagenet.source import open_source
from pipeline.shards.build import make_split
from pipeline.shards.reader import open_shards
from pipeline.synthetic.dataset import make_sample
from pipeline.workers import IN_PROCESS, ignore
from tests.support.rank_tools import ended, losses, start_torchrun, wait_for_step, workers
from tests.support.shard_fixtures import SAMPLE, SHARD_SETTINGS

STEPS = 16
LONGEST_PAUSE_S = 0.2  # a step takes about a tenth of a second


def make_shards(root: Path) -> list[object]:
    """The sample's shard sets; returns the arguments of training that all runs share."""
    make_sample(root / "sample", SAMPLE, workers=IN_PROCESS, progress=ignore)
    for split in ("train", "val"):
        make_split(open_source(root / "sample").listing(split), root, SHARD_SETTINGS, IN_PROCESS, 10, ignore)
    rgb_pca.save(rgb_pca.measure(open_shards(root / "train"), IN_PROCESS, ignore), root / "train" / "eigenbasis.json")
    return [root / "train", "--val", root / "val", "--runs", root, "--steps", STEPS]


def state_of(run: Path) -> tuple[object, ...]:
    """What must not differ: losses, and the last checkpoint byte by byte."""
    last = checkpoint.latest(run / "checkpoints")
    assert last is not None
    files = (checkpoint.WEIGHTS, checkpoint.VELOCITIES, checkpoint.STATE)
    return losses(run), *((last / name).read_bytes() for name in files)


def kill_once(args: list[object], root: Path, draw: random.Random, ranks: int) -> tuple[str, tuple[object, ...]]:
    """One run in which one rank is killed: what was done to it, and how it ended."""
    run = root / "killed"
    shutil.rmtree(run, ignore_errors=True)
    step, rank, every = draw.randrange(1, STEPS), draw.randrange(ranks), draw.randrange(1, 5)
    pause_s = draw.uniform(0, LONGEST_PAUSE_S)
    process = start_torchrun(ranks, *args, "--run-name", run.name, "--save-every", every, restarts=3)
    wait_for_step(run, step, process)
    time.sleep(pause_s)
    victim = workers(process).get(rank)
    if victim is not None:
        victim.kill()
    out = ended(process)
    resumed = [line.split()[-3].strip(",") for line in out.splitlines() if line.startswith("resumed")]
    told = f"rank {rank} killed {pause_s * 1000:3.0f} ms after step {step:2}, saved every {every}: "
    return told + (f"resumed after update {resumed[-1]}" if resumed else "began again, or had ended"), state_of(run)


def main() -> int:
    """Kills and compares; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=2012)
    arguments = parser.parse_args()
    draw, different, resumed, started_s = random.Random(arguments.seed), 0, 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        args = make_shards(root)
        ended(start_torchrun(arguments.ranks, *args, "--run-name", "whole"))
        expected = state_of(root / "whole")
        for number in range(1, arguments.runs + 1):
            told, found = kill_once(args, root, draw, arguments.ranks)
            same = found == expected
            different += not same
            resumed += "resumed" in told
            print(f"{number:3} of {arguments.runs}  {told}: {'the same' if same else 'DIFFERENT'}", flush=True)
    print(
        f"{arguments.runs} runs on {arguments.ranks} ranks, {resumed} resumed from a checkpoint, "
        f"{arguments.runs - different} ended as the whole run, {different} did not; "
        f"{time.monotonic() - started_s:.0f} s"
    )
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
