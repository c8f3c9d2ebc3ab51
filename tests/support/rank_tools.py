"""Runs tools/train.py as a user does: by torchrun, as single ranks that a test can signal, or in this process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import psutil
import pytest

ROOT = Path(__file__).parents[2]
TINY = ["--width", "0.05", "--batch", "8", "--log-every", "1", "--stall-seconds", "0"]
TRAIN = str(ROOT / "tools" / "train.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def start_torchrun(ranks: int, *args: object, restarts: int = 0) -> subprocess.Popen[str]:
    """`torchrun --nproc-per-node RANKS --max-restarts RESTARTS tools/train.py ARGS`."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    torchrun += ["--max-restarts", str(restarts), "--monitor-interval", "0.1"]
    return _popen([*torchrun, TRAIN, *map(str, args), *TINY], ENVIRONMENT)


def start_nodes(nodes: int, ranks: int, *args: object) -> list[subprocess.Popen[str]]:
    """One torchrun for each of several nodes, all on this machine, with RANKS ranks each."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        meeting = ["--master-addr", "127.0.0.1", "--master-port", str(probe.getsockname()[1])]
    job = ["--nnodes", str(nodes), "--nproc-per-node", str(ranks), "--monitor-interval", "0.1", *meeting]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *job]
    script = [TRAIN, *map(str, args), *TINY]
    return [_popen([*torchrun, "--node-rank", str(node), *script], ENVIRONMENT) for node in range(nodes)]


def start_ranks(ranks: int, *args: object, last: tuple[object, ...] = ()) -> list[subprocess.Popen[str]]:
    """The same without torchrun, so that a test gets the exit code and the output of every rank. The last rank gets the
    arguments `last`, too."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(probe.getsockname()[1])}
    started = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        environment = {**ENVIRONMENT, **address, **{name: str(value) for name, value in place.items()}}
        own = [*args, *TINY, *(last if rank == ranks - 1 else ())]
        started.append(_popen([sys.executable, TRAIN, *map(str, own)], environment))
    return started


def start_one(*args: object) -> subprocess.Popen[str]:
    """A single rank."""
    return _popen([sys.executable, TRAIN, *map(str, args), *TINY], ENVIRONMENT)


def run_here(*args: object, code: int = 0, **environment: str) -> str:
    """A single rank in this process, which saves the time of imports. Returns its output if it exits with `code`."""
    from tools import train
    from tools.shared.cli import run

    out = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [TRAIN, *map(str, args), *TINY]),
        mock.patch.dict(os.environ, environment),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
        pytest.raises(SystemExit) as ended,
    ):
        run(train.main)
    assert ended.value.code == code, out.getvalue()
    return out.getvalue()


def _popen(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(process: subprocess.Popen[str], code: int = 0, timeout_s: float = 120) -> str:
    """Waits for the process. Returns its output if it exits with `code`."""
    out, _ = process.communicate(timeout=timeout_s)
    assert process.returncode == code, out
    return out


def lines(run: Path) -> list[dict[str, float]]:
    """The complete lines of a run's metrics."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def losses(run: Path) -> list[tuple[float, float]]:
    """(step, loss) of every line of training."""
    return [(line["step"], line["loss"]) for line in lines(run) if "loss" in line]


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Waits until the run has logged `step`."""
    while not any(line["step"] >= step for line in lines(run)):
        assert process.poll() is None, ended(process)
        os.sched_yield()


def workers(agent: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """The processes that torchrun started, by rank."""
    return {int(child.environ()["RANK"]): child for child in psutil.Process(agent.pid).children()}
