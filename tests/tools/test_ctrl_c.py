"""Ctrl-C at any moment: one line, exit code 130, no traceback of any process, and the same command continues."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tool_runs import ENVIRONMENT, ROOT, printed, tool

# With this variable, every Python process prints a line on stderr after each import: the moments are read from them.
IMPORTS = {**ENVIRONMENT, "PYTHONPROFILEIMPORTTIME": "1"}
IMPORT_LINE = "import time:"
MESSAGE = "{}.py: interrupted; run the same command again to continue"

pytestmark = pytest.mark.slow


def start(name: str, environment: dict[str, str], *args: object) -> subprocess.Popen[str]:
    """Starts a tool as a terminal does: with a process group of its own. stderr goes to stdout."""
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, args)]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    return subprocess.Popen(command, env=environment, **how)


def interrupt(name: str, moment: str, *args: object) -> tuple[int, list[str]]:
    """Starts a tool and sends Ctrl-C to all its processes once one has printed a line that matches `moment`.

    Returns:
        Exit code, and the lines of all processes, apart from those about imports.
    """
    process, lines = start(name, IMPORTS, *args), []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line.rstrip())
        if re.search(moment, line):
            break
    os.killpg(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=60)  # returns when the last process has ended
    lines += rest.splitlines()
    return process.returncode, [line for line in lines if not line.startswith(IMPORT_LINE)]


# Imports of the tool before its work and in it; after "train:", those of the process from which workers are forked.
MOMENTS = [
    ("make_shards", 1, r"\| +argparse$"),
    ("make_shards", 1, r"\| +torch\.nn\.functional$"),
    ("make_shards", 2, r"\| +pipeline\.shards\.settings$"),
    ("make_shards", 2, r"^train: "),
    ("make_shards", 2, r"\| +torch\.nn\.functional$"),
    ("compute_pca", 1, r"\| +argparse$"),
    ("compute_pca", 2, r"\| +numba\.core\.config$"),
    ("compute_pca", 2, r"\| +pipeline\.rgb_pca$"),
]


@pytest.mark.parametrize(("name", "workers", "moment"), MOMENTS)
def test_ctrl_c_while_a_tool_starts(
    name: str, workers: int, moment: str, sample: Path, tmp_path: Path, shard_root: Path
):
    """Only what the tool had printed before, and one line."""
    shards = [shard_root / "train", "--out", tmp_path / "basis.json"]
    folders = [sample, tmp_path / "out"] if name == "make_shards" else shards
    code, lines = interrupt(name, moment, *folders, "--workers", workers)
    assert (code, lines[-1:]) == (130, [MESSAGE.format(name)]), lines
    assert all(re.match(r"(train|val|not used): ", line) for line in lines[:-1]), lines


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_while_workers_write_is_resumed_to_the_same_bytes(workers: int, sample: Path, tmp_path: Path):
    """It comes after the first shard of many."""
    options = ["--shard-samples", 1, "--workers", workers, "--split", "train"]
    process = start("make_shards", ENVIRONMENT, sample, tmp_path / "out", *options)
    while not list((tmp_path / "out").glob("train.unfinished/train-*.json")):
        assert process.poll() is None, process.communicate()
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    *_, last = out.splitlines()
    assert (process.returncode, last) == (130, MESSAGE.format("make_shards")) and "Traceback" not in out, out
    assert not (tmp_path / "out" / "train").exists()
    printed(tool("make_shards", sample, tmp_path / "out", *options))
    printed(tool("make_shards", sample, tmp_path / "fresh", *options))
    assert bytes_of(tmp_path / "out/train") == bytes_of(tmp_path / "fresh/train")


def test_a_second_ctrl_c_ends_a_tool_that_waits_for_its_workers():
    """The first raises KeyboardInterrupt in the block, the second one ends the process with the line."""
    script = (
        "import os, signal; from tools.shared import ctrl_c\n"
        "ctrl_c.end_at_once()\n"
        "with ctrl_c.Raising():\n"
        "  try:\n    signal.raise_signal(signal.SIGINT)\n"
        "  except KeyboardInterrupt:\n    print('stopping', flush=True)\n"
        "  signal.raise_signal(signal.SIGINT)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "stopping\n")
    assert done.stderr == "-c: interrupted; run the same command again to continue\n"


def bytes_of(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
