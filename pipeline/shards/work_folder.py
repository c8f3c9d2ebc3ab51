"""The folder of an unfinished shard set: its lock, and what differs between two records of what a set is made from."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.files import doing, warn_if_unsupported

LOCK = "lock"


@contextmanager
def locked(work: Path) -> Iterator[None]:
    """Makes the work folder and locks it, so that two runs never write there at once."""
    with doing("make the folder", work):
        work.mkdir(parents=True, exist_ok=True)
    with doing("write", work / LOCK), (work / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{work}: another run is writing here; wait for it or choose another folder") from error
        except OSError as error:
            warn_if_unsupported(error, work, "lock files", "do not start two runs on this folder at once")
        yield


def read_record(path: Path) -> dict[str, Any]:
    """The JSON object in a file of the work folder; empty if it is damaged."""
    with doing("read", path):
        data = path.read_bytes()
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def difference_of(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """The entries that differ, as `quality 90, now 85`; empty if all are equal."""
    if not isinstance(found, dict) or found.keys() != expected.keys():
        return "its record is damaged"
    parts = []
    for key, value in expected.items():
        if isinstance(value, dict):
            parts.append(difference_of(found[key], value))
        elif found[key] != value:
            parts.append(f"{key} {found[key]}, now {value}")
    return ", ".join(filter(None, parts))
