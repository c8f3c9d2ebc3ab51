"""What every tool shares: exit codes, one-line errors, progress, `--workers` and `--engine`, `--json`.

Exit codes: 0 fine; 1 the answer is no; 2 wrong use or wrong input, after one line on stderr that says what was
found, what was expected and what to do next. `TRACEBACK=1` in the environment shows where that line came from.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from tqdm import tqdm

from pipeline.workers import Workers, workers_of

PLAIN_LINE_EVERY_S = 10.0


def run(main: Callable[[], int]) -> NoReturn:
    """Calls `main` and exits with its code; a user's mistake (ValueError, OSError) becomes one line and code 2."""
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        print(f"{Path(sys.argv[0]).name}: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted; run the same command again", file=sys.stderr)
        sys.exit(130)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


class Progress:
    """Progress of long work on stderr, with rate and remaining time: a bar on a terminal, plain lines elsewhere.

    Used as a context manager; calling it with `n` counts n more units done. `note` is shown behind the rate. Without a
    `total` there is no remaining time, and nothing is said of work that turned out to be none. `quiet` says nothing at
    all: of several ranks one speaks.
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
        """Counts `n` more units done."""
        self.done += n
        if self.bar is not None:
            self.bar.set_postfix_str(self.note, refresh=False)
            self.bar.update(n)
        elif time.monotonic() - self.printed_s >= PLAIN_LINE_EVERY_S and not self.quiet:
            self._print_line()

    def say(self, line: str) -> None:
        """Prints a line to stdout, above the bar where there is one."""
        if not self.quiet:
            tqdm.write(line) if self.bar is not None else print(line, flush=True)

    def _print_line(self) -> None:
        self.printed_s = time.monotonic()
        rate = (self.done - self.done_before) / max(self.printed_s - self.started_s, 1e-9)
        line = f"{self.what}: {self.done:,}"
        if self.total is not None:
            line += f" of {self.total:,}"
        line += f" {self.unit}, {rate:,.{0 if rate >= 10 else 1}f} {self.unit}/s"
        if self.total is not None and 0 < self.done < self.total and rate:
            line += f", {(self.total - self.done) / rate:,.0f} s left"
        print(f"{line}, {self.note}" if self.note else line, file=sys.stderr)


def add_workers(parser: argparse.ArgumentParser) -> None:
    """The arguments that say who does the work: --workers or --engine."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--workers", type=int, default=cores(), help="processes; default: one per core")
    group.add_argument("--engine", metavar="URL", help="a Dask scheduler, tcp://host:8786, on the same files")


def chosen_workers(args: argparse.Namespace, preload: str) -> AbstractContextManager[Workers]:
    """The workers that `add_workers`' arguments name."""
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers}, expected at least 1")
    return workers_of(args.workers, preload, args.engine)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def write_json(path: Path | None, record: dict[str, Any]) -> None:
    """Writes what the screen said to `path` (nothing where `--json` was not given)."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n")
