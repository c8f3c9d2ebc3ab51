"""A run's folder: config.json, metrics.jsonl, checkpoints/, and what the stall report leaves (stall.json)."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

CONFIG, METRICS, STALL = "config.json", "metrics.jsonl", "stall.json"


class RunFolder:
    """`config` is compared when a run is resumed: its entry `must_match` decides what the numbers are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unwritten: list[str] = []  # lines that found the disk full

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.path / "checkpoints"

    def begin(self, config: dict[str, Any], resume: bool) -> None:
        """Makes the folder, or opens it again. Raises ValueError where it is there and `resume` is not asked for, or
        where it was begun with another `must_match`; the folder is then as it was."""
        path = self.path / CONFIG
        if path.is_file():
            if not resume:
                raise ValueError(f"{self.path}: this run is there already; add --resume, or choose another --run-name NAME")
            found = json.loads(path.read_text())["must_match"]
            wanted = json.loads(json.dumps(config["must_match"]))
            for name, value in wanted.items():
                if found.get(name) != value:
                    change = f"{name} {_short(found.get(name))}, now {_short(value)}"
                    raise ValueError(f"{self.path}: begun with {change}; resume with the same, or choose another --run")
            return
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(config, indent=1) + "\n")

    def launch(self) -> str | None:
        """What started the run, as its config says; None where it has not begun."""
        path = self.path / CONFIG
        found: str | None = json.loads(path.read_text()).get("launch") if path.is_file() else None
        return found

    def log(self, line: dict[str, Any]) -> None:
        """Adds a line to metrics.jsonl, whole. OSError where it could not; the next call then adds it first."""
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
        """The lines of metrics.jsonl; a last line that a crash cut short is left out."""
        path = self.path / METRICS
        if not path.is_file():
            return []
        lines = path.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def forget_after(self, optimizer_steps: int) -> None:
        """Drops metrics of steps after `optimizer_steps`: a resumed run takes those steps, and writes their lines, again."""
        kept = [line for line in self.metrics() if line["step"] <= optimizer_steps]
        write_atomically(self.path / METRICS, "".join(json.dumps(line) + "\n" for line in kept))


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that is never seen half-written."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
