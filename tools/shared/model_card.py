"""The model card of a run: what was trained on what, how well it scores, and how to load it, as Markdown text."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model import checkpoint
from model.checkpoint import TrainState
from model.files import write_atomically
from model.shapes import layer_table
from model.transfer import frozen_layers
from tools.shared.cli import one_line
from tools.shared.job import Job
from tools.shared.provenance import git_commit, library_versions

CARD = "model-card.md"


def update_card(job: Job, state: TrainState) -> bool:
    """Writes the model card of a run for its checkpoints as they are now. A failure gives a warning, never an error.

    Returns:
        Whether the card was written.
    """
    path = job.folder.path / CARD
    try:
        write_atomically(path, card(job, state, job.folder.metrics()))
    except Exception as error:
        if os.environ.get("TRACEBACK"):
            raise
        print(
            f"train.py: warning: {path}: could not be written ({one_line(error)}); training continues", file=sys.stderr
        )
        return False
    return True


def card(job: Job, state: TrainState, metrics: list[dict[str, Any]]) -> str:
    """The text of the card.

    Args:
        job: the settings of the run.
        state: where training stands.
        metrics: the lines of metrics.jsonl.
    """
    last = job.folder.checkpoints / checkpoint.name_of(state)
    lines = [
        f"# Model card: {job.folder.path.name}",
        "",
        "tools/train.py writes this file again at every checkpoint.",
        "",
        *_list(_facts(job, state)),
        "",
        "## Scores",
        "",
        *_scores(job, metrics, last),
        "",
        "## Use",
        "",
        "```python",
        "from tools.shared.classifier import Classifier",
        "",
        f'classifier = Classifier.load("{last}")',
        'print(classifier.classify(["photo.jpg"])[0])',
        "```",
        "",
        f"The same as a command: `python tools/predict.py photo.jpg --checkpoint {last}`",
        "",
        "The checkpoint holds the class names, the mean image and the resize settings. Every image gets one of the",
        "classes of the training set, also if it shows something else.",
    ]
    return "\n".join(lines) + "\n"


def _facts(job: Job, state: TrainState) -> dict[str, str]:
    loop, recipe, shards = job.loop, job.recipe, job.shards
    parameters = sum(shape.weights + shape.biases for shape in layer_table(job.spec, recipe))
    kinds = ("short_side", "stored", "filter", "quality", "subsampling")
    stored = ", ".join(f"{kind} {shards.manifest.settings[kind]}" for kind in kinds if kind in shards.manifest.settings)
    facts = {
        "Network": f"AlexNet of 2012, two towers, width {job.spec.width:g}, {parameters:,} parameters",
        "Recipe": f"{recipe.name}, learning rates x {recipe.learning_rate_scale:g}, batch {job.loader.batch}, "
        f"seed {loop.seed}, {loop.precision}",
        "Training": f"{state.optimizer_steps:,} of {loop.optimizer_steps:,} optimizer steps, "
        f"{loop.steps_per_epoch:,} an epoch, schedule of {loop.epochs} epochs",
        "Data": f"{shards.folder}: {len(shards):,} images, {job.spec.classes} classes",
        "SHA-256 of its manifest": shards.manifest_sha256,
        "Stored images": stored or "unknown settings",
        "Software": ", ".join(f"{name} {version}" for name, version in library_versions().items()),
        "Commit": git_commit() or "unknown",
    }
    if job.init_from:
        frozen = ", ".join(frozen_layers(recipe)) or "none"
        facts["Started from"] = f"{job.init_from[1]} of {job.init_from[0]}; frozen layers: {frozen}"
    return facts


def _scores(job: Job, metrics: list[dict[str, Any]], last: Path) -> list[str]:
    """A table of the last and the best checkpoint that were validated."""
    if job.val is None:
        return ["Not validated: the run has no validation set."]
    by_step = {line["step"]: line for line in metrics if "val_top1" in line}
    best = checkpoint.best(job.folder.checkpoints)
    rows = []
    shown = {"last and best": last} if best == last else {"last": last, "best": best}
    for which, path in shown.items():
        line = by_step.get(checkpoint.optimizer_steps_of(path)) if path else None
        if path and line:
            scores = f"{line['val_top1']:.2%} | {line['val_top5']:.2%} | {line['val_loss']:.4f}"
            rows.append(f"| {path.name} ({which}) | {scores} |")
    if not rows:
        return ["Not validated yet."]
    head = [f"Centre crops of {job.val.folder} ({len(job.val):,} images, manifest {job.val.manifest_sha256}).", ""]
    return [*head, "| checkpoint | top-1 | top-5 | loss |", "|---|--:|--:|--:|", *rows]


def _list(facts: Mapping[str, str]) -> list[str]:
    return [f"- {name}: {value}" for name, value in facts.items()]
