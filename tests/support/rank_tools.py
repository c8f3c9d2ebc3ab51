"""The training tool on several ranks as a user runs it: by torchrun, or as single ranks that a test can signal."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
TINY = ["--width", "0.05", "--batch", "8", "--log-every", "1", "--stall-seconds", "0"]
COMMAND = [sys.executable, str(ROOT / "tools" / "train.py")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def start_torchrun(ranks: int, *args: object, restarts: int = 0) -> subprocess.Popen[str]:
    """`torchrun --nproc-per-node RANKS --max-restarts RESTARTS tools/train.py ARGS`."""
    how = ["--nproc-per-node", str(ranks), "--max-restarts", str(restarts), "--monitor-interval", "0.1", "--"]
    command = [sys.executable, "-m", "torch.distributed.run", *how, *COMMAND[1:], *map(str, args), *TINY]
    return _popen(command, ENVIRONMENT)


def start_ranks(ranks: int, *args: object) -> list[subprocess.Popen[str]]:
    """The same without torchrun, so that every rank's exit code and words are to be had."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(probe.getsockname()[1])}
    started = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        environment = {**ENVIRONMENT, **address, **{name: str(value) for name, value in place.items()}}
        started.append(_popen([*COMMAND, *map(str, args), *TINY], environment))
    return started


def start_one(*args: object, **environment: str) -> subprocess.Popen[str]:
    """One rank, with more in its environment."""
    return _popen([*COMMAND, *map(str, args), *TINY], {**ENVIRONMENT, **environment})


def _popen(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(process: subprocess.Popen[str], code: int = 0, timeout_s: float = 120) -> str:
    """What it printed, if it ends with `code`."""
    out, _ = process.communicate(timeout=timeout_s)
    assert process.returncode == code, out
    return out


def lines(run: Path) -> list[dict[str, float]]:
    """What stands in a run's metrics."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def losses(run: Path) -> list[tuple[float, float]]:
    """(step, loss) of every line of training."""
    return [(line["step"], line["loss"]) for line in lines(run) if "loss" in line]


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Returns when the run has come to `step`."""
    while not any(line["step"] >= step for line in lines(run)):
        assert process.poll() is None, ended(process)
        os.sched_yield()


def workers(agent: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """torchrun's processes by rank."""
    return {int(child.environ()["RANK"]): child for child in psutil.Process(agent.pid).children()}
