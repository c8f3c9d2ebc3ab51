"""A part of a sharding run in a process of its own, for tests of parts that run at the same time or are killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch  # noqa: F401  before processes are forked: each would import it

from pipeline.imagenet.source import open_source
from pipeline.shards.parts import Part, make_part
from pipeline.shards.settings import ShardSettings
from pipeline.workers import IN_PROCESS


def run_part(source: Path, out: Path, settings: ShardSettings, part: str, killed_after: int | None) -> None:
    """Does a part of the train split; kills itself once `killed_after` of its images are done."""
    done = 0

    def progress(images: int) -> None:
        nonlocal done
        done += images
        if killed_after is not None and done >= killed_after:
            os.kill(os.getpid(), signal.SIGKILL)

    make_part(open_source(source).listing("train"), out, settings, IN_PROCESS, 10, progress, Part.parse(part))
