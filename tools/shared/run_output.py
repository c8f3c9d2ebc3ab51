"""The screen of a training run: every line also goes to train.log, and a screen that fails does not end the run."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from tools.shared.cli import discard


class LogFile:
    """Appends complete lines to a file. After a failure, for example a full disk, it is silent.

    Args:
        path: the file; None to write nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._file: TextIO | None = None
        with suppress(OSError):
            self._file = path.open("a", buffering=1, encoding="utf-8", errors="backslashreplace") if path else None

    def write(self, line: str) -> None:
        """Appends a line. Lines of a progress bar, which overwrite each other, are left out."""
        if self._file is not None and "\r" not in line:
            try:
                self._file.write(f"{line}\n")
            except (OSError, ValueError):
                self._file = None

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()


class SafeStream(io.TextIOBase):
    """A stream that never raises: once writing fails (closed pipe, full disk), its text only goes to the log."""

    def __init__(self, stream: TextIO | None, log: LogFile) -> None:
        super().__init__()
        self._stream, self._log, self._line = stream, log, ""

    def write(self, text: str) -> int:
        """Writes to the stream and, line by line, to the log."""
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._log.write(line)
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        """Flushes the stream."""
        self._try("flush")

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        try:
            return self._stream is not None and self._stream.isatty()
        except ValueError:
            return False

    def fileno(self) -> int:
        """The stream's file descriptor."""
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()

    def _try(self, method: str, *args: str) -> None:
        if self._stream is None:
            return
        try:
            getattr(self._stream, method)(*args)
        except UnicodeEncodeError as error:  # for example a name with an accent, and a screen that is set to ASCII
            self._try(
                method, *(text.encode(error.encoding, "backslashreplace").decode(error.encoding) for text in args)
            )
        except (OSError, ValueError):  # ValueError: the stream is closed
            discard(self._stream)
            self._stream = None


@contextmanager
def logged(path: Path | None) -> Iterator[None]:
    """In this block stdout and stderr never raise, and their lines are appended to the file `path`, if it is given."""
    log, before = LogFile(path), (sys.stdout, sys.stderr)
    sys.stdout, sys.stderr = (SafeStream(stream, log) for stream in before)
    try:
        yield
    except (ValueError, OSError) as error:
        log.write(f"error: {error}")
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
        log.close()
