"""Runs tools one after another in processes of their own, and passes SIGTERM on to the one that is running."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil

TOOLS = Path(__file__).parents[1]
STOPPED = 128 + signal.SIGTERM  # the shell's exit code for a process that SIGTERM ended


class ToolRunner:
    """Runs one tool after another. After SIGTERM it starts no further tool.

    It passes SIGTERM on to the running tool. Ctrl-C reaches that tool by itself, because a terminal sends SIGINT to all
    processes in the foreground.
    """

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._ranks = 1
        self._stopping = False
        signal.signal(signal.SIGTERM, self._stop)
        # A handler that does nothing, not SIG_IGN: the tools would inherit SIG_IGN and ignore Ctrl-C too.
        signal.signal(signal.SIGINT, lambda signum, frame: None)

    def run(self, name: str, *args: object, ranks: int = 1) -> int:
        """Runs tools/NAME.py, under torchrun if there are several ranks.

        Returns:
            Its exit code; 128 + N if signal N ended it; 143 without a start if SIGTERM came before.
        """
        if self._stopping:
            return STOPPED
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        self._ranks = ranks
        self._child = subprocess.Popen([sys.executable, *torchrun, str(TOOLS / f"{name}.py"), *map(str, args)])
        if self._stopping:  # SIGTERM came while the process started
            self._pass_on()
        code = self._child.wait()
        return 128 - code if code < 0 else code

    def _stop(self, signum: int, frame: object) -> None:
        self._stopping = True
        self._pass_on()

    def _pass_on(self) -> None:
        """Sends SIGTERM to the tool, or to its ranks: torchrun would give them 30 s and then exit with an error."""
        if self._child is None or self._child.poll() is not None:
            return
        tool = psutil.Process(self._child.pid)
        for process in (tool.children() if self._ranks > 1 else []) or [tool]:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
