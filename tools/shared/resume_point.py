"""From which checkpoint a run continues: the last undamaged one, or the one that --resume-from names."""

from __future__ import annotations

import sys
from pathlib import Path

from model import checkpoint
from tools.shared.job import Job


def choose_checkpoint(job: Job) -> Path | None:
    """Chooses the checkpoint on the first rank. Later ones, which cannot count any more, get another name.

    Returns:
        The checkpoint; None if the run has none.

    Raises:
        ValueError: no checkpoint is whole.
    """
    folder, path, faults = job.folder.checkpoints, job.resume_from, list[str]()
    if path is None:
        path, faults = checkpoint.last_whole(folder)
        if faults and path is None:
            raise ValueError(f"{'; '.join(faults)}; no checkpoint is whole: choose another --run-name NAME")
    for line in faults:
        print(f"train.py: warning: {line}", file=sys.stderr)
    if path is None and job.folder.metrics():
        found = f"{folder}: no checkpoint, though the run has taken steps; training begins again at step 0"
        print(f"train.py: warning: {found}", file=sys.stderr)
    if path is not None:
        _set_later_aside(folder, checkpoint.optimizer_steps_of(path), "damaged" if faults else "replaced")
        if faults:
            print(f"train.py: warning: resuming from {path}, the last whole checkpoint", file=sys.stderr)
    return path


def _set_later_aside(folder: Path, optimizer_steps: int, ending: str) -> None:
    for later in checkpoint.all_in(folder):
        if checkpoint.optimizer_steps_of(later) > optimizer_steps:
            aside, number = later.with_name(f"{later.name}.{ending}"), 1
            while aside.exists():
                number += 1
                aside = later.with_name(f"{later.name}.{ending}-{number}")
            later.rename(aside)
