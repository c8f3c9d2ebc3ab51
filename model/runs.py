"""The folder of a run: config.json, metrics.jsonl, checkpoints/, train.log, and stall.json of the stall report."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from model.files import write_atomically as write_atomically  # "as": also imported from here

CONFIG, METRICS, STALL, LOG, LOCK = "config.json", "metrics.jsonl", "stall.json", "train.log", "run.lock"
LONGEST_VALUE = 40  # characters of a setting in a message
ELSE = "choose another --run-name NAME"
ACCEPT = {"decoding": "add --accept-decoder-change, "}  # how to continue with another value after all


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

    def begin(self, config: dict[str, Any], resume: bool, accepted: Collection[str] = ()) -> list[str]:
        """Creates the folder, or opens it again.

        Args:
            config: written to config.json. Its entry `must_match` holds everything that changes the numbers; a resumed
                run must have the same. A change of an entry of `may_change` is recorded in the entry `changes`.
            resume: whether an existing run may be continued.
            accepted: entries of `must_match` that may differ. Their changes are recorded like those of `may_change`.

        Returns:
            A line for each setting that changed.

        Raises:
            ValueError: if the run exists and `resume` is False, if it began with another `must_match`, or if
                config.json or metrics.jsonl is damaged or lost. The folder then stays as it was.
        """
        path = self.path / CONFIG
        if not path.is_file():
            self._refuse_lost_config()
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(config, indent=1) + "\n")
            return []
        if not resume:
            raise ValueError(f"{self.path}: this run exists already; add --resume, or {ELSE}")
        found = self.config()
        required = json.loads(json.dumps(config["must_match"]))
        for name, value in required.items():
            if name not in accepted and found["must_match"].get(name) != value:
                change = f"{name} {difference(found['must_match'].get(name), value)}"
                same = f"resume with the same, {ACCEPT.get(name, '')}or {ELSE}"
                raise ValueError(f"{self.path}: begun with {change}; {same}")
        self.metrics()
        return self._record_changes(found, config.get("may_change", {}), {name: required[name] for name in accepted})

    def _refuse_lost_config(self) -> None:
        for name in (METRICS, self.checkpoints.name):
            there = self.path / name
            if there.is_file() or (there.is_dir() and any(there.iterdir())):
                raise ValueError(f"{self.path / CONFIG}: missing, but {name} of a run is there; restore it, or {ELSE}")

    def _record_changes(self, found: dict[str, Any], may_change: dict[str, Any], accepted: dict[str, Any]) -> list[str]:
        before, now = found["must_match"] | found.get("may_change", {}), may_change | accepted
        changed = [name for name, value in now.items() if before.get(name) != value]
        if not changed:
            return []
        when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        changes = [{"when": when, "setting": name, "was": before.get(name), "now": now[name]} for name in changed]
        found |= {"may_change": may_change, "changes": [*found.get("changes", []), *changes]}
        found["must_match"] = found["must_match"] | accepted
        write_atomically(self.path / CONFIG, json.dumps(found, indent=1) + "\n")
        return [f"{name} {_short(before.get(name))}, now {_short(now[name])}" for name in changed]

    def config(self) -> dict[str, Any]:
        """The content of config.json. Raises ValueError if it is damaged."""
        path = self.path / CONFIG
        try:
            found = json.loads(path.read_text())
        except ValueError as error:  # also of bytes that are not UTF-8
            raise ValueError(f"{path}: damaged ({error}); restore it, or {ELSE}") from error
        if not isinstance(found, dict) or not isinstance(found.get("must_match"), dict):
            raise ValueError(f"{path}: damaged (no settings under 'must_match'); restore it, or {ELSE}")
        if not isinstance(found.get("may_change", {}), dict) or not isinstance(found.get("changes", []), list):
            raise ValueError(f"{path}: damaged ('may_change' or 'changes' has another type); restore it, or {ELSE}")
        return found

    def launch(self) -> str | None:
        """What started the run, from its config.json; None if the run has not begun."""
        found: str | None = self.config().get("launch") if (self.path / CONFIG).is_file() else None
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
        """The lines of metrics.jsonl. A last line that a crash cut short is left out.

        Raises:
            ValueError: a line is none of this program's. The message names the file and the line.
        """
        path = self.path / METRICS
        if not path.is_file():
            return []
        found = []
        for number, line in enumerate(path.read_text(errors="replace").splitlines(keepends=True), 1):
            if not line.endswith("\n"):
                break
            try:
                entry = json.loads(line)
            except ValueError:
                entry = None
            if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
                raise ValueError(f"{path}: line {number} is not a line of metrics; remove it, or {ELSE}")
            found.append(entry)
        return found

    def forget_after(self, optimizer_steps: int, validation_is_due: bool = False) -> None:
        """Drops the metrics of later steps: a resumed run takes these steps again, and writes their lines again.

        With `validation_is_due` it drops the validation of the last step, too, which is made again.
        """

        def made_again(line: dict[str, Any]) -> bool:
            due = validation_is_due and "val_loss" in line and line["step"] == optimizer_steps
            return line["step"] > optimizer_steps or due

        kept = [line for line in self.metrics() if not made_again(line)]
        write_atomically(self.path / METRICS, "".join(json.dumps(line) + "\n" for line in kept))


def difference(found: Any, expected: Any) -> str:
    """The first setting that differs between two values, with both values, for a message."""
    if isinstance(found, dict) and isinstance(expected, dict):
        name = next((name for name in {**expected, **found} if found.get(name) != expected.get(name)), None)
        return f"{name} {_short_of(found, name)}, now {_short_of(expected, name)}" if name else "other fields"
    return f"{_short(found)}, now {_short(expected)}"


def _short_of(values: dict[str, Any], name: str) -> str:
    return _short(values[name]) if name in values else "(default)"


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."
