"""Ctrl-C ends a tool with one line and exit code 130, at any moment from the tool's first import to its exit.

Python's KeyboardInterrupt is not enough: in an import or a destructor it prints a traceback or is lost. A tool that
publishes its results atomically may end at any moment, so it calls `end_at_once` before its other imports. While worker
processes run, Ctrl-C raises KeyboardInterrupt after all (`Raising`), because they must be stopped.
"""

from __future__ import annotations

import os
import signal
import sys

EXIT_CODE = 128 + signal.SIGINT

_raises = False


def end_at_once() -> None:
    """From now on, Ctrl-C ends this process, unless it was started to ignore Ctrl-C."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, _on_signal)


class Raising:
    """In this block the first Ctrl-C raises KeyboardInterrupt; the next one ends the process at once."""

    def __enter__(self) -> None:
        global _raises
        _raises = True

    def __exit__(self, *_: object) -> None:
        global _raises
        _raises = False


def line() -> str:
    """What a tool says after Ctrl-C."""
    return f"{os.path.basename(sys.argv[0])}: interrupted; run the same command again to continue\n"


def _on_signal(number: int, frame: object) -> None:
    global _raises
    if _raises:
        _raises = False
        raise KeyboardInterrupt
    try:
        sys.stdout.flush()
    except Exception:  # closed, or the signal came while it was written to: what is left in the buffer is lost
        pass
    try:
        # Without Python's buffers. A progress bar has not ended its line.
        os.write(2, (("\n" if os.isatty(2) else "") + line()).encode())
    finally:
        os._exit(EXIT_CODE)
