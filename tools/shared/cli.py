"""Rules that every tool follows: exit codes, one-line errors, checks of options, progress, `--workers`, `--json`.

Exit codes: 0 success; 1 a check failed; 2 wrong usage or wrong input, after one line on stderr that says what was
found, what was expected and what to do next. Set `TRACEBACK=1` to see where such an error was raised.

This module imports only the standard library and tqdm, so that `--help` of every tool answers quickly.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from tqdm import tqdm

from pipeline.host import whole_cores
from tools.shared import ctrl_c

if TYPE_CHECKING:
    from pipeline.workers import Workers

PLAIN_LINE_INTERVAL_S = 10.0


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Returns an empty parser whose `--help` prints `description`, a tool's docstring, as it is written.

    Abbreviated options are rejected: an abbreviation could become ambiguous with the next option that is added.
    """
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def run(main: Callable[[], int]) -> NoReturn:
    """Calls `main` and exits with the code that it returns.

    A ValueError or an OSError is the user's mistake: it becomes one line on stderr and exit code 2. Ctrl-C becomes one
    line and exit code 130.
    """
    tool = Path(sys.argv[0]).name
    _open_standard_streams()
    try:
        _require_working_folder()
        sys.exit(main())
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        _say_last(f"{tool}: {one_line(error)}")
        sys.exit(2)
    except KeyboardInterrupt:
        _say_last(ctrl_c.line().rstrip("\n"))
        sys.exit(ctrl_c.EXIT_CODE)


def _require_working_folder() -> None:
    try:
        os.getcwd()
    except FileNotFoundError as error:  # torch could not be loaded, and its message would name another file
        raise ValueError("the working folder was removed; change to another one (cd) and run this again") from error


def _say_last(line: str) -> None:
    """Prints a line on stderr. If that fails (closed, full disk), the exit code still says what happened."""
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        discard(sys.stderr)
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        discard(sys.stdout)


def discard(stream: TextIO) -> None:
    """Connects a stream that cannot be written to /dev/null: what it has buffered would fail again when Python ends."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _open_standard_streams() -> None:
    """Opens /dev/null for each standard stream that the process was started without (`>&-`).

    Otherwise the next file that is opened would get its number, and be written to by whoever writes to the screen.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)  # Python has set it to None
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def one_line(error: Exception) -> str:
    """The message of an error on one line."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


# ---- checks of numeric options ------------------------------------------------------------------------------------


def require_at_least(least: float, **options: float | None) -> None:
    """Checks numeric options before any work starts.

    Args:
        least: the smallest value that is allowed.
        options: values by option, with `_` for `-`: `save_every=0` is `--save-every 0`. None means "not given".

    Raises:
        ValueError: an option is smaller, or is not a finite number. The message has the option as the user typed it.
    """
    for name, value in options.items():
        if value is not None and not least <= value < math.inf:
            raise ValueError(f"{_typed(name, value)}: expected at least {least:g}")


def require_positive(**options: float | None) -> None:
    """Checks that numeric options are finite and above 0; arguments and errors are those of `require_at_least`."""
    for name, value in options.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{_typed(name, value)}: expected a number above 0")


def _typed(name: str, value: float) -> str:
    return f"--{name.replace('_', '-')} {value:{'d' if isinstance(value, int) else 'g'}}"


# ---- progress -----------------------------------------------------------------------------------------------------


class Progress:
    """Shows the progress of long work on stderr, with throughput and remaining time.

    On a terminal it is a bar; otherwise it prints a plain line at intervals. Use it as a context manager and call it
    with `n` to count n more units.

    Args:
        what: the work, for example "training".
        total: units of the whole work; None if unknown, and then no remaining time is shown.
        unit: what is counted.
        done: units that an earlier run has completed. They count as done, but not in the throughput.
        quiet: shows nothing; for every rank except the first.

    Attributes:
        note: text that is shown after the throughput.
    """

    def __init__(self, what: str, total: int | None, unit: str = "img", done: int = 0, quiet: bool = False) -> None:
        self.what, self.total, self.unit, self.note, self.quiet = what, total, unit, "", quiet
        self.done = self.done_before = done
        self.started_s = self.printed_s = time.monotonic()
        shown = sys.stderr.isatty() and not quiet
        self.bar = tqdm(total=total, initial=done, desc=what, unit=unit, delay=0.5) if shown else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()
        elif error is None and self.done > self.done_before and not self.quiet:
            self._print_line()

    def __call__(self, n: int) -> None:
        """Counts `n` more units."""
        self.done += n
        if self.bar is not None:
            self.bar.set_postfix_str(self.note, refresh=False)
            self.bar.update(n)
        elif time.monotonic() - self.printed_s >= PLAIN_LINE_INTERVAL_S and not self.quiet:
            self._print_line()

    def say(self, line: str) -> None:
        """Prints a line to stdout, above the bar if there is one."""
        if not self.quiet:
            tqdm.write(line) if self.bar is not None else print(line, flush=True)

    def _print_line(self) -> None:
        self.printed_s = time.monotonic()
        per_s = (self.done - self.done_before) / max(self.printed_s - self.started_s, 1e-9)
        line = f"{self.what}: {self.done:,}"
        if self.total is not None:
            line += f" of {self.total:,}"
        line += f" {self.unit}, {per_s:,.{0 if per_s >= 10 else 1}f} {self.unit}/s"
        if self.total is not None and 0 < self.done < self.total and per_s:
            line += f", {(self.total - self.done) / per_s:,.0f} s left"
        print(f"{line}, {self.note}" if self.note else line, file=sys.stderr)


# ---- workers and results ------------------------------------------------------------------------------------------


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Adds `--workers` and `--engine`, which choose who does the work. They exclude each other."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--workers", type=int, default=cores(), metavar="N", help="processes; default: one per core")
    group.add_argument("--engine", metavar="URL", help="use the Dask scheduler at URL (tcp://host:8786) instead")


def preload_workers(args: argparse.Namespace, *modules: str) -> None:
    """Lets several local worker processes import `modules` already now, while this process prepares their work."""
    from pipeline.workers import start_fork_server

    if _several_local(args):
        start_fork_server(*modules)


@contextmanager
def chosen_workers(args: argparse.Namespace, *preload: str) -> Iterator[Workers]:
    """Starts the workers that the options of `add_workers` choose, and stops them after the block.

    Args:
        args: parsed arguments.
        preload: modules that every worker imports before its first job; the same as those of `preload_workers`.

    Raises:
        ValueError: `--workers` is below 1.
    """
    from pipeline.workers import workers_of  # starts process pools: only a tool that works needs it

    require_at_least(1, workers=args.workers)
    # One worker is this process, and those of a cluster are not its own: then Ctrl-C may end this process at once.
    with (
        ctrl_c.Raising() if _several_local(args) else nullcontext(),
        workers_of(args.workers, *preload, engine=args.engine) as workers,
    ):
        yield workers


def _several_local(args: argparse.Namespace) -> bool:
    return args.engine is None and args.workers > 1


def cores() -> int:
    """Returns how many cores this process may use, rounded up."""
    return whole_cores()


def json_path(text: str) -> Path:
    """The type of `--json`: a file that can be written, checked before any work starts."""
    path = Path(text)
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder, expected a file")
    if not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path} cannot be written; choose another file")
    return path


def write_json(path: Path | None, record: dict[str, Any]) -> None:
    """Writes what the screen said to `path`, atomically; does nothing if `--json` was not given."""
    from pipeline.files import published

    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with published(path) as file:
            file.write((json.dumps(record, indent=2) + "\n").encode())
