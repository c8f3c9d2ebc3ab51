"""Stops trainings at random moments in random ways, continues them, and compares each with an undisturbed one.

    python -m tests.soak.random_stops --rounds 100

In a round a run is stopped one to three times before it may end: by SIGTERM, SIGINT, SIGHUP or SIGKILL at a random
moment, by a disk that is full for files above a size, by a damaged last checkpoint, or by a screen that is closed.
Sometimes it is started a second time while it runs, which must be refused. Every start has the same arguments with
--resume, some also make the stall report. The processes are forked from one that has imported everything, which saves
seconds a start. At the end the losses of all steps and the weights and velocities must be those of the undisturbed run.
Prints a line for each round and a summary; exits with 1 if a run differs, shows a traceback, or ends with an exit code
that it should not have.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from model import checkpoint
from tests.soak.kill_ranks import make_shards
from tests.support.rank_tools import TRAIN, losses

OPTIONS = ["--width", "0.05", "--batch", "8", "--log-every", "1", "--save-every", "3", "--resume"]
SIGNAL_CODES = {signal.SIGTERM: 0, signal.SIGINT: 130, signal.SIGHUP: 129, signal.SIGKILL: -signal.SIGKILL}
FAULTS = (*(number.name for number in SIGNAL_CODES), "full disk", "damaged", "closed screen")
REPORT_SHARE = 0.2  # of the starts, with a stall report at their end
FULL_BYTES = 1 << 16  # largest file on the "full disk": config.json fits, a checkpoint does not
STARTED_S = 120.0  # longest wait for a run to take its lock
ENDED_S = 600.0
FORK_SERVER = multiprocessing.get_context("forkserver")
PRELOADED = ["tests.soak.kill_ranks", "tests.support.rank_tools", "tools.train", "tools.shared.train_command"]


class Failed(Exception):
    """A run did what it should not do."""


def state_of(run: Path) -> tuple[object, ...]:
    """What must not differ: the losses, and the bytes of the last checkpoint."""
    last = checkpoint.latest(run / "checkpoints")
    if last is None or checkpoint.faults(last):
        raise Failed(f"no whole checkpoint at the end: {last}")
    return losses(run), *((last / name).read_bytes() for name in (checkpoint.WEIGHTS, checkpoint.VELOCITIES))


def train(arguments: list[str], output: Path | None, limit_bytes: int | None) -> None:
    """A process's work: `python tools/train.py ARGUMENTS`.

    Args:
        arguments: those of train.py.
        output: file for stdout and stderr; None for a pipe that no one reads.
        limit_bytes: largest file that it can write; None for no limit.
    """
    from tools.shared.cli import run
    from tools.train import main

    signal.signal(signal.SIGINT, signal.default_int_handler)  # also if whoever started this ignores it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if output:
        screen = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    else:
        reading, screen = os.pipe()
        os.close(reading)
    for number in (1, 2):
        os.dup2(screen, number)
    if limit_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    sys.argv = [TRAIN, *arguments]
    run(main)


class Stops:
    """One run that is stopped again and again.

    Args:
        args: arguments of train.py that all runs share.
        run: the run's folder.
        rng: chooses faults and moments.
        whole_s: how long the undisturbed run took, start included.
    """

    def __init__(self, args: list[object], run: Path, rng: random.Random, whole_s: float) -> None:
        self._arguments = [*map(str, [*args, "--run-name", run.name, *OPTIONS])]
        self._run, self._rng, self._whole_s = run, rng, whole_s
        self._output = run.with_name("output.txt")

    def _start(self, output: Path | None, limit_bytes: int | None = None) -> ForkServerProcess:
        with_report = self._rng.random() < REPORT_SHARE
        arguments = [*self._arguments, "--stall-seconds", "0.05" if with_report else "0"]
        process = FORK_SERVER.Process(target=train, args=(arguments, output, limit_bytes))
        process.start()
        return process

    def _end(self, process: ForkServerProcess, codes: set[int]) -> None:
        process.join(ENDED_S)
        text = self._output.read_text(errors="replace") if self._output.is_file() else ""
        if process.exitcode not in codes or "Traceback" in text:
            process.kill()
            raise Failed(f"exit code {process.exitcode}, expected {sorted(codes)}:\n{text[-2000:]}")

    def fault(self, name: str) -> None:
        """Starts the run and stops it once."""
        if name == "full disk":  # 1: the last state is not saved; 0: it was complete already
            self._end(self._start(self._output, FULL_BYTES), {0, 1})
        elif name == "damaged":
            self._damage()
        elif name == "closed screen":
            self._end(self._start(None), {0})
        else:
            self._signal(signal.Signals[name])

    def _signal(self, number: signal.Signals) -> None:
        process = self._start(self._output)
        # A signal before the run has begun ends it as any process; whether it has is visible in its lock.
        self._wait_for(self._run / "run.lock", process)
        time.sleep(self._rng.uniform(0, self._whole_s))
        if self._rng.random() < 0.3:
            self._second_start(process)
        if process.is_alive() and process.pid:
            os.kill(process.pid, number)
        self._end(process, {0, SIGNAL_CODES[number], 128 + number, -number})

    def _wait_for(self, path: Path, process: ForkServerProcess) -> None:
        deadline_s = time.monotonic() + STARTED_S
        while not (_holds(path, str(process.pid)) or not process.is_alive()):
            if time.monotonic() > deadline_s:
                raise Failed(f"not started within {STARTED_S:g} s")
            time.sleep(0.005)

    def _second_start(self, first: ForkServerProcess) -> None:
        output = self._output.with_name("second.txt")
        second = self._start(output)
        second.join(ENDED_S)
        said, ended = output.read_text(), not first.is_alive()  # if it has ended, the second one was allowed to train
        if not ended and (second.exitcode != 2 or f"process {first.pid} on " not in said):
            raise Failed(f"a second start gave {second.exitcode}: {said}")

    def _damage(self) -> None:
        """Cuts or changes a file of the last checkpoint, if an earlier one is left."""
        checkpoints = checkpoint.all_in(self._run / "checkpoints") if self._run.is_dir() else []
        if len(checkpoints) > 1:
            path = checkpoints[-1] / self._rng.choice([checkpoint.WEIGHTS, checkpoint.VELOCITIES, checkpoint.STATE])
            data = bytearray(path.read_bytes())
            data[self._rng.randrange(len(data))] ^= 1 << self._rng.randrange(8)
            path.write_bytes(data if self._rng.random() < 0.5 else data[: len(data) // 2])

    def finish(self) -> None:
        """Lets the run end."""
        self._end(self._start(self._output), {0})


def _holds(path: Path, text: str) -> bool:
    try:
        return text in path.read_text()
    except FileNotFoundError:
        return False


def main() -> int:
    """Stops, continues and compares; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=2012, help="seed of the faults; default: %(default)s")
    arguments = parser.parse_args()
    FORK_SERVER.set_forkserver_preload(PRELOADED)
    os.environ.update({"OMP_NUM_THREADS": "1"})
    rng, failures, started_s = random.Random(arguments.seed), 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        args = make_shards(root)
        begun_s = time.monotonic()
        Stops(args, root / "whole", rng, 0.0).finish()
        whole_s = time.monotonic() - begun_s
        expected = state_of(root / "whole")
        for number in range(1, arguments.rounds + 1):
            run = root / "stopped"
            shutil.rmtree(run, ignore_errors=True)
            stops = Stops(args, run, rng, whole_s)
            faults = rng.choices(FAULTS, k=rng.randrange(1, 4))
            try:
                for name in faults:
                    stops.fault(name)
                stops.finish()
                result = "the same" if state_of(run) == expected else "DIFFERENT"
            except Failed as error:
                result = f"FAILED: {error}"
            failures += result != "the same"
            print(f"{number:3} of {arguments.rounds}  {', '.join(faults)}: {result}", flush=True)
    print(f"{arguments.rounds} rounds, {failures} failures, {time.monotonic() - started_s:.0f} s")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
