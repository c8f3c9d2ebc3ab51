"""Runs tools one after another in processes of their own, and passes signals on to the one that is running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil

TOOLS = Path(__file__).parents[1]
STOPPED = 128 + signal.SIGTERM  # the shell's exit code for a process that SIGTERM ended


class ToolRunner:
    """Runs one tool after another. After SIGTERM, SIGHUP or Ctrl-C it starts no further tool.

    It passes these signals on to the running tool. A tool has a session of its own: the terminal's Ctrl-C then does not
    reach it a second time, nor torchrun, which would give its ranks 30 s and exit with an error.
    """

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._ranks = 1
        self._stopped_by = 0
        self._pending: list[int] = []  # signals that came while the process started
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, self._stop)

    def run(self, name: str, *args: object, ranks: int = 1) -> int:
        """Runs tools/NAME.py, under torchrun if there are several ranks.

        Returns:
            Its exit code; 128 + N if signal N ended it, or if SIGINT or SIGHUP stopped it and it has saved; 128 + N
            without a start if signal N came before.
        """
        if self._stopped_by:
            return 128 + self._stopped_by
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        command = [sys.executable, *torchrun, str(TOOLS / f"{name}.py"), *map(str, args)]
        self._ranks = ranks
        self._child = subprocess.Popen(command, start_new_session=True)
        while self._pending:
            self._pass_on(self._pending.pop(0))
        code = self._child.wait()
        if code == 0 and self._stopped_by in (signal.SIGINT, signal.SIGHUP):
            return 128 + self._stopped_by  # ranks under torchrun exit with 0 after saving
        return 128 - code if code < 0 else code

    def _stop(self, number: int, frame: object) -> None:
        self._stopped_by = self._stopped_by or number
        if self._child is None:
            self._pending.append(number)
        else:
            self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        """Sends a signal to the tool, or to its ranks: torchrun would give them 30 s and then exit with an error.

        Ctrl-C goes to all processes of a tool, as a terminal sends it.
        """
        if self._child is None or self._child.poll() is not None:
            return
        tool = psutil.Process(self._child.pid)
        ranks = tool.children() if self._ranks > 1 else []
        if not ranks and number == signal.SIGINT:
            with suppress(ProcessLookupError):
                os.killpg(self._child.pid, number)
            return
        for process in ranks or [tool]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
