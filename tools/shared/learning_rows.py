"""The rows of docs/training.md, and what is kept of their training runs.

A row is a recipe with at most one change of interest; it is trained with several seeds. Only the losses and scores of a
run are kept, so that table and curves can be made again without the runs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from model.changes import CHANGES
from model.runs import METRICS, RunFolder
from tools.shared.chance import is_at_chance

RECIPES_ALONE = ("source2012", "paper")
SOURCE_STARTS = (
    *("conv-sd-0.01", "bias-0", "bias-0.1", "bias-lr-1x", "unit-variance", "lighting-paper", "no-lighting"),
    *("lrn-alpha-sum", "no-lrn"),
)
SOURCE_LAYERS = (
    *("non-overlapping-pooling", "tanh", "no-dropout", "one-tower", "no-communication"),
    *("no-conv2", "no-conv3", "no-conv4", "no-conv5", "no-fc6", "no-fc7", "sixth-conv"),
)
PAPER_CHANGES = ("conv-sd-0.03", "bias-0", "bias-lr-2x", "unit-variance", "lighting-source2012", "lrn-alpha-mean")
ROWS = (
    *RECIPES_ALONE,
    *(f"source2012+{change}" for change in (*SOURCE_STARTS, *SOURCE_LAYERS)),
    *(f"paper+{change}" for change in PAPER_CHANGES),
)


def options_of(row: str) -> list[str]:
    """The options of tools/train.py that give a row. Learning rates stay as they start: the plateau schedule of the
    recipe "paper" would lower them on a long plateau, and the rows would differ in two things."""
    recipe, changes = parts_of(row)
    return ["--recipe", recipe, *(word for name in changes for word in ("--change", name))]


def parts_of(row: str) -> tuple[str, list[str]]:
    """Recipe and changes of a row."""
    recipe, _, change = row.partition("+")
    return recipe, ["constant-lr", *([change] if change else [])]


def what_differs(row: str) -> str:
    """A row in words."""
    recipe, _, change = row.partition("+")
    return CHANGES[change].summary if change else f"the recipe `{recipe}`"


EARLY = 0.6  # of the steps of a run: scores are shown from here and from the end


@dataclass(frozen=True)
class LearningRun:
    """One training run of a row.

    Attributes:
        row: one of `ROWS`.
        seed: its seed.
        day: the day on which it ended, in UTC.
        commit: commit of the source that trained.
        losses: pairs [optimizer steps, mean training loss since the last pair].
        scores: pairs [optimizer steps, top-1 on the validation set].
    """

    row: str
    seed: int
    day: str
    commit: str
    losses: list[list[float]]
    scores: list[list[float]]

    @classmethod
    def read(cls, folder: Path, steps: int) -> LearningRun | None:
        """The first `steps` optimizer steps of the run in `folder`, which is named ROW-sSEED.

        Returns:
            None if it is another run, or if it has no score in the last part of these steps (see `EARLY`).
        """
        row, _, seed = folder.name.rpartition("-s")
        if row not in ROWS or not seed.isdigit() or not (folder / METRICS).is_file():
            return None
        lines = [line for line in RunFolder(folder).metrics() if line["step"] <= steps]
        losses = [[line["step"], round(line["loss"], 4)] for line in lines if "loss" in line]
        scores = [[line["step"], round(line["val_top1"], 4)] for line in lines if "val_top1" in line]
        if not scores or scores[-1][0] < EARLY * steps:
            return None
        day = time.strftime("%Y-%m-%d", time.gmtime((folder / METRICS).stat().st_mtime))
        return cls(row, int(seed), day, str(RunFolder(folder).config().get("git_commit")), losses, scores)

    @property
    def steps(self) -> float:
        """Optimizer steps until the last score."""
        return self.scores[-1][0]

    def score_from(self, step: float) -> float | None:
        """The first score at or after `step`; None if there is none."""
        return next((top1 for at, top1 in self.scores if at >= step), None)

    def steps_at_chance(self, classes: int) -> int | None:
        """Optimizer steps until the mean loss of a line of metrics is better than guessing; None if it never is."""
        return next((int(step) for step, loss in self.losses if not is_at_chance(loss, classes)), None)


@dataclass(frozen=True)
class Record:
    """All runs, and what they have in common.

    Attributes:
        setting: images, val_images, classes, batch, width, steps (of each run), machine and versions.
        runs: the runs.
        first_steps: for each row, the relative change of the slowest layer in the first step: `slowest_change` of
            `tools.shared.first_step`.
    """

    setting: dict[str, Any]
    runs: list[LearningRun]
    first_steps: dict[str, float] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Record:
        """Reads what `save` wrote."""
        found = json.loads(path.read_text())
        return cls(found["setting"], [LearningRun(**each) for each in found["runs"]], found["first_steps"])

    def save(self, path: Path) -> None:
        """Writes JSON with a line for each run."""
        runs = ",\n".join(json.dumps(asdict(run), separators=(",", ":")) for run in self.runs)
        setting, first = (json.dumps(each, indent=1) for each in (self.setting, self.first_steps))
        path.write_text(f'{{"setting": {setting},\n"first_steps": {first},\n"runs": [\n{runs}\n]}}\n')

    def with_runs(self, runs: Sequence[LearningRun]) -> Record:
        """This record with more runs; a run replaces the one of the same row and seed."""
        merged = {(run.row, run.seed): run for run in (*self.runs, *runs)}
        ordered = sorted(merged.values(), key=lambda run: (ROWS.index(run.row), run.seed))
        return replace(self, runs=ordered)

    def of_row(self, row: str) -> list[LearningRun]:
        """The runs of a row, by seed."""
        return [run for run in self.runs if run.row == row]

    def rows(self) -> list[str]:
        """The rows that have a run, in the order of `ROWS`."""
        return [row for row in ROWS if self.of_row(row)]


def table(record: Record) -> str:
    """The rows as a Markdown table."""
    steps, classes = record.setting["steps"], record.setting["classes"]
    at = (round(EARLY * steps), steps)
    head = (
        "row",
        "what is different",
        "first step",
        "seeds",
        "steps at chance",
        *(f"top-1 after {step}" for step in at),
    )
    lines = [_line(head), "|---|---|" + (len(head) - 2) * "--:|"]
    for row in record.rows():
        runs = record.of_row(row)
        first_step = f"{100 * record.first_steps[row]:.2g} %" if row in record.first_steps else ""
        scores = (_mean_and_range([run.score_from(step) for run in runs]) for step in at)
        lines.append(
            _line((f"`{row}`", what_differs(row), first_step, f"{len(runs)}", _steps_at_chance(runs, classes), *scores))
        )
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _steps_at_chance(runs: Sequence[LearningRun], classes: int) -> str:
    """ "42", "42 to 90", or "all 390" for runs that never do better than guessing."""
    stays = [(run.steps, run.steps_at_chance(classes)) for run in runs]
    shown = sorted((steps + 1, f"all {steps:g}") if stay is None else (stay, f"{stay}") for steps, stay in stays)
    return shown[0][1] if shown[0] == shown[-1] else f"{shown[0][1]} to {shown[-1][1]}"


def _mean_and_range(scores: Sequence[float | None]) -> str:
    """Empty if no run has a score; with the number of runs that have one if that is not all of them."""
    found = [score for score in scores if score is not None]
    if not found:
        return ""
    mean = f"{sum(found) / len(found):.1%}"
    spread = f" ({min(found):.1%} to {max(found):.1%})" if len(found) > 1 else ""
    return mean + spread + (f", {len(found)} of {len(scores)} seeds" if len(found) < len(scores) else "")
