"""Checkpoints: a folder that is whole or absent, and means the same on any number of ranks.

    weights.safetensors      "conv1.weight" ...: both towers, stacked as `model.alexnet.tower_slice` says
    velocities.safetensors   the update rule's velocities, by the same names
    state.json               where training stands, and of which recipe and network the tensors are

No pickle: nothing in a checkpoint can run.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.alexnet import AlexNet
from model.optim import Momentum2012
from model.parallel.ranks import SINGLE_RANK, Ranks
from model.recipe import PlateauState, Recipe
from model.shapes import TOWERS, NetSpec, tower_rows

FORMAT = "alexnet-pipeline checkpoint, version 1"
WEIGHTS, VELOCITIES, STATE = "weights.safetensors", "velocities.safetensors", "state.json"


@dataclass
class TrainState:
    """Where training stands: the next step to take, and what the loop remembers between steps.

    Attributes:
        epoch: of the next step, from 0.
        step: of the next step within its epoch, from 0.
        optimizer_steps: steps taken so far, over all epochs.
        plateau: of recipes whose rates follow the validation error.
        losses: mean losses of the steps since the last line of metrics.
        corrects: share of images whose first guess was right, of the same steps.
        val_error: validation error of these very weights; None where nobody validated them.
    """

    epoch: int
    step: int
    optimizer_steps: int
    plateau: PlateauState
    losses: list[float]
    corrects: list[float]
    val_error: float | None = None

    @classmethod
    def start(cls) -> TrainState:
        """The state before the first step."""
        return cls(0, 0, 0, PlateauState(), [], [])


def save(
    path: Path, model: AlexNet, optimizer: Momentum2012, state: TrainState, seed: int, ranks: Ranks = SINGLE_RANK
) -> None:
    """Writes a checkpoint under `path`, which appears when whole: temporary folder, fsync, rename. One that is there
    already, of the same state of the same run, is left as it is.

    Every rank must call it; the first collects the towers and writes. OSError there where it could not: nothing is
    left of the attempt then, and every other checkpoint is as it was.
    """
    record = {
        "format": FORMAT,
        "recipe": asdict(model.recipe),
        "spec": asdict(model.spec),
        "seed": seed,
        "state": asdict(state),
    }
    text = json.dumps(record, indent=1) + "\n"
    there = ranks.first and (path / STATE).is_file() and (path / STATE).read_text() == text
    if ranks.any(there):
        return
    weights = ranks.collect({name: parameter.data for name, parameter in model.named_parameters()})
    velocities = ranks.collect(optimizer.velocities())
    if weights is not None and velocities is not None:
        _write(path, weights, velocities, text)


def _write(path: Path, weights: dict[str, Tensor], velocities: dict[str, Tensor], text: str) -> None:
    temporary, former = (path.with_name(f".{path.name}.{what}") for what in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save_file(weights, temporary / WEIGHTS)
        save_file(velocities, temporary / VELOCITIES)
        (temporary / STATE).write_text(text)
        for entry in (*temporary.iterdir(), temporary):
            _fsync(entry)
        if path.exists():  # the same step, now validated
            path.rename(former)
        temporary.rename(path)
        _fsync(path.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"{path}: could not be saved ({error})") from error
    shutil.rmtree(former, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def all_in(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, by optimizer_steps, which their names sort by."""
    return sorted(path for path in folder.glob("step-*") if (path / STATE).is_file())


def latest(folder: Path) -> Path | None:
    """The checkpoint of most optimizer_steps in `folder`, None where there is none."""
    return next(reversed(all_in(folder)), None)


def optimizer_steps(folder: Path) -> int:
    """Updates of the latest checkpoint in `folder`, -1 where there is none: a number that ranks can tell each other."""
    path = latest(folder)
    return int(path.name.removeprefix("step-")) if path else -1


def named(folder: Path, optimizer_steps: int) -> Path | None:
    """The checkpoint of that many optimizer_steps, None for -1."""
    return folder / _name(optimizer_steps) if optimizer_steps >= 0 else None


def best(folder: Path) -> Path | None:
    """The checkpoint of the lowest validation error in `folder`, the earliest of equals; None where none has one."""
    errors = {path: _val_error(path) for path in all_in(folder)}
    known = {path: error for path, error in errors.items() if error is not None}
    return min(known, key=lambda path: known[path], default=None)


def _val_error(path: Path) -> float | None:
    try:
        error: float | None = _read_state(path)["state"].get("val_error")
    except ValueError:  # damaged: whoever resumes from it is told
        return None
    return error


def prune(folder: Path, keep: int) -> None:
    """Removes all but the last `keep` checkpoints and the best one; the whole network's takes half a gigabyte. What an
    attempt to save that was killed has left goes too."""
    assert keep > 0
    for path in set(all_in(folder)[:-keep]) - {best(folder)}:
        shutil.rmtree(path)
    for path in (*folder.glob(".step-*.tmp"), *folder.glob(".step-*.old")):
        shutil.rmtree(path)


def name_of(state: TrainState) -> str:
    """The folder name of a checkpoint at `state`."""
    return _name(state.optimizer_steps)


def _name(optimizer_steps: int) -> str:
    return f"step-{optimizer_steps:09d}"


def restore(path: Path, model: AlexNet, optimizer: Momentum2012, seed: int) -> TrainState:
    """Fills `model` and `optimizer`, of both towers or one, from a checkpoint and returns where it stood.

    Raises ValueError where it is of another recipe, network or seed, or is damaged.
    """
    record = _read_state(path)
    wanted = {"recipe": asdict(model.recipe), "spec": asdict(model.spec), "seed": seed}
    for what, value in _as_json(wanted).items():
        if record[what] != value:
            raise ValueError(
                f"{path}: of another {what} ({_difference(record[what], value)}); use the one it was made with"
            )
    parameters = {name: p.data for name, p in model.named_parameters()}
    _fill(path / WEIGHTS, parameters, model.towers)
    _fill(path / VELOCITIES, optimizer.velocities(), model.towers)
    fields = dict(record["state"])
    return TrainState(**{**fields, "plateau": PlateauState(**fields["plateau"])})


def load_model(path: Path, recipes: dict[str, Recipe]) -> AlexNet:
    """The network of a checkpoint, for evaluation; ValueError where the folder is no checkpoint of a recipe we have."""
    record = _read_state(path)
    name = record["recipe"]["name"]
    if name not in recipes:
        raise ValueError(f"{path}: of recipe {name!r}, expected one of {', '.join(recipes)}")
    model = AlexNet(NetSpec(**record["spec"]), recipes[name])
    _fill(path / WEIGHTS, {name: p.data for name, p in model.named_parameters()}, TOWERS)
    return model


def _read_state(path: Path) -> dict[str, Any]:
    try:
        record = json.loads((path / STATE).read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no checkpoint here (no {STATE}); expected runs/NAME/checkpoints/step-...") from error
    except ValueError as error:
        raise ValueError(f"{path / STATE}: damaged ({error}); use an earlier checkpoint") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path / STATE}: its format is not {FORMAT!r}; it was written by another version")
    return record


def _fill(path: Path, tensors: dict[str, Tensor], towers: tuple[int, ...]) -> None:
    """Reads the rows of `towers` into `tensors`."""
    found: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in list(file.keys()):
                rows = file.get_slice(name)
                piece: Tensor = rows[tower_rows(name, rows.get_shape()[0], towers)]
                if len(piece):
                    found[name] = piece
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: missing or damaged ({error}); use an earlier checkpoint") from error
    if {name: t.shape for name, t in found.items()} != {name: t.shape for name, t in tensors.items()}:
        raise ValueError(f"{path}: holds tensors of another network; use the settings that it was made with")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(found[name])


def _as_json(record: dict[str, Any]) -> dict[str, Any]:
    """What JSON makes of a record (tuples become lists), so that it compares equal to one that was read."""
    parsed: dict[str, Any] = json.loads(json.dumps(record))
    return parsed


def _difference(found: Any, wanted: Any) -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        parts = [f"{key} {found.get(key)!r}, now {wanted[key]!r}" for key in wanted if found.get(key) != wanted[key]]
        return parts[0] if parts else "other fields"
    return f"{found!r}, now {wanted!r}"
