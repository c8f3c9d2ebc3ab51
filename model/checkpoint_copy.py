"""A checkpoint of the first rank on all ranks, also if they have no common file system."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from model.checkpoint import STATE
from model.parallel.ranks import Ranks


@contextmanager
def seen_by_all(path: Path, ranks: Ranks) -> Iterator[Path]:
    """Yields a folder with the first rank's checkpoint `path`. Every rank must call it.

    It is `path` itself where a rank sees the same files there; otherwise a temporary copy, which the first rank sends.

    Args:
        path: the checkpoint, undamaged on the first rank; on the others it may be absent, or another one.
        ranks: this rank among the others.
    """
    state = _read(path / STATE)
    of_first = ranks.from_first(state)
    copied = state != of_first
    if not ranks.any(copied):
        yield path
        return
    with TemporaryDirectory(prefix="checkpoint-") as folder:
        for name in (STATE, *json.loads(of_first)["files"]):
            data = ranks.from_first(_read(path / name) if ranks.first else b"")
            if copied:
                (Path(folder) / name).write_bytes(data)
        yield Path(folder) if copied else path


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""
