"""The folder of a run: config.json, metrics.jsonl, checkpoints/, and stall.json of the stall report."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from model.files import write_atomically as write_atomically  # "as": also imported from here

CONFIG, METRICS, STALL = "config.json", "metrics.jsonl", "stall.json"
LONGEST_VALUE = 40  # characters of a setting in a message


class RunFolder:
    """Reads and writes the folder of one run.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unwritten: list[str] = []  # lines that could not be written because the disk was full

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    def begin(self, config: dict[str, Any], resume: bool) -> None:
        """Creates the folder, or opens it again.

        Args:
            config: written to config.json. Its entry `must_match` holds everything that changes the numbers; a resumed
                run must have the same.
            resume: whether an existing run may be continued.

        Raises:
            ValueError: if the run exists and `resume` is False, or if it began with another `must_match`. The folder
                then stays as it was.
        """
        path = self.path / CONFIG
        if not path.is_file():
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(config, indent=1) + "\n")
            return
        if not resume:
            raise ValueError(f"{self.path}: this run exists already; add --resume, or choose another --run-name NAME")
        found = json.loads(path.read_text())["must_match"]
        required = json.loads(json.dumps(config["must_match"]))
        for name, value in required.items():
            if found.get(name) != value:
                change = f"{name} {_short(found.get(name))}, now {_short(value)}"
                raise ValueError(
                    f"{self.path}: begun with {change}; resume with the same, or choose another --run-name NAME"
                )

    def launch(self) -> str | None:
        """What started the run, from its config.json; None if the run has not begun."""
        path = self.path / CONFIG
        found: str | None = json.loads(path.read_text()).get("launch") if path.is_file() else None
        return found

    def log(self, line: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl, complete or not at all.

        Raises:
            OSError: if the line cannot be written. The next call writes it first.
        """
        self._unwritten.append(json.dumps(line) + "\n")
        data = "".join(self._unwritten).encode()
        with (self.path / METRICS).open("ab", buffering=0) as file:
            end = file.tell()
            try:
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
            except OSError:
                file.truncate(end)
                raise
        self._unwritten.clear()

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl. A last line that a crash cut short is left out."""
        path = self.path / METRICS
        if not path.is_file():
            return []
        lines = path.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def forget_after(self, optimizer_steps: int) -> None:
        """Drops the metrics of later steps: a resumed run takes these steps again, and writes their lines again."""
        kept = [line for line in self.metrics() if line["step"] <= optimizer_steps]
        write_atomically(self.path / METRICS, "".join(json.dumps(line) + "\n" for line in kept))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."
