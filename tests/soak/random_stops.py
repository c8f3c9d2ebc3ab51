"""Stops trainings at random moments in random ways, continues them, and compares each with an undisturbed one.

    python -m tests.soak.random_stops --rounds 100

In a round a run is stopped one to three times before it may end: by SIGTERM, SIGINT, SIGHUP or SIGKILL at a random
moment, by a disk that is full for files above a size, by a damaged last checkpoint, or by a screen that is closed.
Sometimes it is started a second time while it runs, which must be refused. Every start has the same command with
--resume. At the end the losses of all steps and the weights and velocities must be those of the undisturbed run. Prints
a line for each round and a summary; exits with 1 if a run differs, shows a traceback, or ends with an exit code that it
should not have.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from model import checkpoint
from tests.soak.kill_ranks import make_shards
from tests.support.rank_tools import ENVIRONMENT, TRAIN, losses

OPTIONS = ["--width", "0.05", "--batch", "8", "--log-every", "1", "--stall-seconds", "0.05", "--save-every", "3"]
SIGNAL_CODES = {signal.SIGTERM: 0, signal.SIGINT: 130, signal.SIGHUP: 129, signal.SIGKILL: -signal.SIGKILL}
FAULTS = (*(number.name for number in SIGNAL_CODES), "full disk", "damaged", "closed screen")
FULL_BYTES = 1 << 16  # largest file on the "full disk": config.json fits, a checkpoint does not
STARTED_S = 30.0  # longest wait for a run to write its first message
ENDED_S = 300.0


class Failed(Exception):
    """A run did what it should not do."""


def state_of(run: Path) -> tuple[object, ...]:
    """What must not differ: the losses, and the bytes of the last checkpoint."""
    last = checkpoint.latest(run / "checkpoints")
    if last is None or checkpoint.faults(last):
        raise Failed(f"no whole checkpoint at the end: {last}")
    return losses(run), *((last / name).read_bytes() for name in (checkpoint.WEIGHTS, checkpoint.VELOCITIES))


class Stops:
    """One run that is stopped again and again.

    Args:
        args: arguments of train.py that all runs share.
        run: the run's folder.
        rng: chooses faults and moments.
        whole_s: how long the undisturbed run took, start included.
    """

    def __init__(self, args: list[object], run: Path, rng: random.Random, whole_s: float) -> None:
        self._command = [sys.executable, TRAIN, *map(str, [*args, "--run-name", run.name, *OPTIONS, "--resume"])]
        self._run, self._rng, self._whole_s = run, rng, whole_s
        self._output = run.with_name("output.txt")

    def _start(self, limit_bytes: int | None = None) -> subprocess.Popen[bytes]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if limit_bytes:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
        try:
            with self._output.open("wb") as output:
                return subprocess.Popen(self._command, env=ENVIRONMENT, stdout=output, stderr=output)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def _end(self, process: subprocess.Popen[bytes], codes: set[int]) -> None:
        code = process.wait(timeout=ENDED_S)
        text = self._output.read_text(errors="replace")
        if code not in codes or "Traceback" in text:
            raise Failed(f"exit code {code}, expected {sorted(codes)}:\n{text[-2000:]}")

    def fault(self, name: str) -> None:
        """Starts the run and stops it once."""
        if name == "full disk":
            self._end(self._start(FULL_BYTES), {0, 1})  # 1: the last state is not saved; 0: it was complete already
        elif name == "damaged":
            self._damage()
        elif name == "closed screen":
            reading, writing = os.pipe()
            process = subprocess.Popen(self._command, env=ENVIRONMENT, stdout=writing, stderr=writing)
            os.close(writing)
            os.close(reading)
            if code := process.wait(timeout=ENDED_S):
                raise Failed(f"exit code {code} with a closed screen")
        else:
            self._signal(signal.Signals[name])

    def _signal(self, number: signal.Signals) -> None:
        process = self._start()
        lock = self._run / "run.lock"
        # A signal before the run has begun ends it as any process; whether it has is visible in its lock.
        self._wait_for(lock, process)
        time.sleep(self._rng.uniform(0, self._whole_s / 2))
        if self._rng.random() < 0.3:
            self._second_start(process)
        process.send_signal(number)
        self._end(process, {0, SIGNAL_CODES[number], 128 + number, -number})

    def _wait_for(self, path: Path, process: subprocess.Popen[bytes]) -> None:
        deadline_s = time.monotonic() + STARTED_S
        while not (path.is_file() and str(process.pid) in path.read_text()) and process.poll() is None:
            if time.monotonic() > deadline_s:
                raise Failed(f"not started within {STARTED_S:g} s")
            time.sleep(0.005)

    def _second_start(self, first: subprocess.Popen[bytes]) -> None:
        done = subprocess.run(self._command, env=ENVIRONMENT, capture_output=True, text=True, timeout=ENDED_S)
        ended = first.poll() is not None  # then the second one was allowed to train
        if not ended and (done.returncode != 2 or f"process {first.pid} on " not in done.stderr):
            raise Failed(f"a second start gave {done.returncode}: {done.stderr}")

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
        self._end(self._start(), {0})


def main() -> int:
    """Stops, continues and compares; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=2012, help="seed of the faults; default: %(default)s")
    arguments = parser.parse_args()
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
