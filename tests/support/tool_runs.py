"""Runs the tools as a user does: in this process, which saves the seconds of a start, or in a process of its own."""

from __future__ import annotations

import io
import json
import os
import runpy
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).parents[2]
TINY = ["--width", "0.05", "--batch", "8", "--log-every", "1", "--stall-seconds", "0.2"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
Done = subprocess.CompletedProcess[str]


def tool(name: str, *args: object) -> Done:
    """Runs tools/NAME.py in this process, as `python tools/NAME.py` would."""
    handler = signal.getsignal(signal.SIGINT)  # the tool may set another
    argv = [str(ROOT / "tools" / f"{name}.py"), *map(str, args)]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with patch.object(sys, "argv", argv), redirect_stdout(out), redirect_stderr(err):
        try:
            runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            signal.signal(signal.SIGINT, handler)
    return Done(argv, code, out.getvalue(), err.getvalue())


def start(name: str, *args: object, module: bool = False) -> subprocess.Popen[str]:
    """Starts `python tools/NAME.py`, or `python -m tools.NAME`, in a process of its own; stderr goes to stdout."""
    script = ["-m", f"tools.{name}"] if module else [str(ROOT / "tools" / f"{name}.py")]
    command = [sys.executable, *script, *map(str, args)]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, **how)


def printed(done: Done, code: int = 0) -> str:
    """Asserts the exit code and returns what the tool printed on stdout."""
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def metrics(run: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[float, float]]:
    """(step, loss) of every training line in a run's metrics."""
    return [(line["step"], line["loss"]) for line in metrics(run) if "loss" in line]
