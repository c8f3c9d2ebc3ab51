"""Where results come from: the commit of the source, the versions of libraries, the launch of a job's ranks."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = ("torch", "nvidia-dali-cuda120", "numpy", "pillow")  # those that decide the numbers


def git_commit() -> str | None:
    """Returns the commit of the source, or None if the source is not a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def library_versions() -> dict[str, str]:
    """Returns the version of each of `LIBRARIES` that is installed."""
    found = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):  # DALI, where training uses --loader webdataset
            found[name] = version(name)
    return found


def launch() -> str | None:
    """Returns a name for the torchrun process that started this rank, or None without torchrun.

    The name is the same when that process restarts its ranks after a failure. A new torchrun has another name, even if
    the operating system reuses the process id.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    import psutil

    agent = psutil.Process(os.getppid())
    return f"{platform.node()} {agent.pid} {agent.create_time()}"
