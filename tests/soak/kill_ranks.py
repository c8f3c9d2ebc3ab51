"""Kills a random rank at a random step, in many runs, and compares each run with an uninterrupted one.

    python tests/soak/kill_ranks.py --runs 50

Every run is `torchrun --nproc-per-node 2 --max-restarts 3` on a small synthetic dataset. SIGKILL comes a random part of
a step after a random step. The losses of all steps and the bytes of the last checkpoint must be those of the
uninterrupted run. Prints a line for each run and a summary; exits with 1 if a run differs. A run takes about 20 seconds
on 2 cores.
"""

from __future__ import annotations

import argparse
import random
import re
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
    """Makes the shard sets; returns the arguments of train.py that all runs share."""
    make_sample(root / "sample", SAMPLE, workers=IN_PROCESS, progress=ignore)
    for split in ("train", "val"):
        make_split(open_source(root / "sample").listing(split), root, SHARD_SETTINGS, IN_PROCESS, 10, ignore)
    rgb_pca.save(
        rgb_pca.measure(open_shards(root / "train"), IN_PROCESS, ignore), rgb_pca.eigenbasis_path(root / "train")
    )
    return [root / "train", "--val", root / "val", "--runs", root, "--steps", STEPS]


def state_of(run: Path) -> tuple[object, ...]:
    """What must not differ: the losses, and the bytes of the last checkpoint."""
    last = checkpoint.latest(run / "checkpoints")
    assert last is not None
    files = (checkpoint.WEIGHTS, checkpoint.VELOCITIES, checkpoint.STATE)
    return losses(run), *((last / name).read_bytes() for name in files)


def kill_once(args: list[object], root: Path, rng: random.Random, ranks: int) -> tuple[str, tuple[object, ...]]:
    """One run in which one rank is killed. Returns a description of the fault, and the state at the end."""
    run = root / "killed"
    shutil.rmtree(run, ignore_errors=True)
    step, rank, every = rng.randrange(1, STEPS), rng.randrange(ranks), rng.randrange(1, 5)
    pause_s = rng.uniform(0, LONGEST_PAUSE_S)
    process = start_torchrun(ranks, *args, "--run-name", run.name, "--save-every", every, restarts=3)
    wait_for_step(run, step, process)
    time.sleep(pause_s)
    victim = workers(process).get(rank)
    if victim is not None:
        victim.kill()
    out = ended(process)
    resumed = re.findall(r"^resumed\D*([\d,]*\d)", out, re.MULTILINE)
    end = f"resumed after optimizer step {resumed[-1]}" if resumed else "started again, or had ended before"
    fault = f"rank {rank} killed {pause_s * 1000:3.0f} ms after step {step:2}, saved every {every} steps"
    return f"{fault}: {end}", state_of(run)


def main() -> int:
    """Kills and compares; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50, metavar="N", help="default: %(default)s")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="ranks of a run; default: %(default)s")
    parser.add_argument("--seed", type=int, default=2012, help="seed of the faults; default: %(default)s")
    arguments = parser.parse_args()
    rng, different, resumed, started_s = random.Random(arguments.seed), 0, 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        args = make_shards(root)
        ended(start_torchrun(arguments.ranks, *args, "--run-name", "whole"))
        expected = state_of(root / "whole")
        for number in range(1, arguments.runs + 1):
            fault, found = kill_once(args, root, rng, arguments.ranks)
            same = found == expected
            different += not same
            resumed += "resumed" in fault
            print(f"{number:3} of {arguments.runs}  {fault}: {'the same' if same else 'DIFFERENT'}", flush=True)
    print(
        f"{arguments.runs} runs on {arguments.ranks} ranks, {resumed} resumed from a checkpoint, "
        f"{arguments.runs - different} ended like the uninterrupted run, {different} did not; "
        f"{time.monotonic() - started_s:.0f} s"
    )
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
