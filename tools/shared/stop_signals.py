"""Signals ask a run to stop; the run then saves and names the command that continues.

SIGTERM; SIGUSR1, which batch systems send before a time limit (Slurm: --signal=USR1@60); SIGINT (Ctrl-C); SIGHUP (a
closed terminal).
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
AGAIN_S = 0.01  # after a destructor has dropped the exception
OF_SYSTEMS = (signal.SIGTERM, signal.SIGUSR1)  # they count other exit codes than 0 as failures


class StopRequested(BaseException):
    """A signal asked the process to stop, in a block of `StopSignals.raising`."""


class StopSignals:
    """Records the first signal that asks this process to stop. Use it as a context manager in the main thread.

    A second Ctrl-C ends the process at once, without saving. A signal that the process was started to ignore stays
    ignored: SIGHUP under nohup.

    Attributes:
        requested: number of the signal; 0 if there was none.
    """

    def __init__(self) -> None:
        self.requested = 0
        self._raise = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def raising(self) -> Iterator[None]:
        """In this block a signal raises `StopRequested` at once: nothing in it needs to be completed."""
        if self.requested:
            raise StopRequested
        hook, alarm = sys.unraisablehook, signal.signal(signal.SIGALRM, self._on_alarm)
        sys.unraisablehook = partial(self._raise_again, hook)
        self._raise = True
        try:
            yield
        finally:
            self._raise = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, alarm)
            sys.unraisablehook = hook

    def _raise_again(self, hook: Callable[[Any], object], lost: Any) -> None:
        """Python drops an exception that is raised in a destructor. A moment later it is raised again."""
        if lost.exc_type is not StopRequested:
            hook(lost)
            return
        self._raise = True
        signal.setitimer(signal.ITIMER_REAL, AGAIN_S)

    def _on_alarm(self, number: int, frame: FrameType | None) -> None:
        if self._raise:
            self._raise = False
            raise StopRequested

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested == signal.SIGINT:
            _write("\nended at once; steps since the last checkpoint are lost\n")
            os._exit(128 + number)
        if number == signal.SIGINT:
            _write("\nstopping after the current step; press Ctrl-C again to end at once, without saving\n")
        self.requested = self.requested or number
        if self._raise:
            self._raise = False
            raise StopRequested


def exit_code(number: int) -> int:
    """The exit code of a run that this signal stopped and that has saved.

    Returns:
        0 for SIGTERM and SIGUSR1, which ask for nothing else; 128 + number for the others. Always 0 under torchrun,
        which would count any other code as a failure and start the ranks again.
    """
    return 0 if number in OF_SYSTEMS or "TORCHELASTIC_RUN_ID" in os.environ else 128 + number


def resume_command() -> str:
    """The command that continues the run of this process."""
    script, *options = sys.argv
    if "--resume-from" in options:
        at = options.index("--resume-from")
        del options[at : at + 2]
    options = [option for option in options if option != "--resume" and not option.startswith("--resume-from=")]
    start, ranks = ["python"], os.environ.get("LOCAL_WORLD_SIZE", "1")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        start = ["torchrun", "--nproc-per-node", ranks]
        if os.environ.get("WORLD_SIZE") != ranks:
            start += ["--nnodes", os.environ.get("GROUP_WORLD_SIZE", "NODES"), "..."]
    return f"{' '.join(start)} {shlex.join([script, *options, '--resume'])}"


def _write(text: str) -> None:
    """Writes to the screen without Python's buffers, which the signal may have interrupted."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            os.write(2, text.encode())
