"""Checkpoints: a folder that is complete or absent, and that any number of ranks can read.

    weights.safetensors      "conv1.weight" ...: both towers, stacked as `model.shapes.tower_slice` says
    velocities.safetensors   the optimizer's velocities, by the same names
    state.json               the format, recipe, network and seed, and where training stands

There is no pickle, so loading a checkpoint cannot run code.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.alexnet import AlexNet
from model.files import REPLACED, TEMPORARY, replacing
from model.optim import Momentum2012
from model.parallel.ranks import SINGLE_RANK, Ranks
from model.recipe import PlateauState, Recipe
from model.shapes import TOWERS, NetSpec, tower_rows

FORMAT = "alexnet-pipeline checkpoint, version 2"  # version 1 had other field names in state.json
NOUNS = {"recipe": "recipe", "spec": "network", "seed": "seed"}  # entries of state.json, as messages call them
WEIGHTS, VELOCITIES, STATE = "weights.safetensors", "velocities.safetensors", "state.json"


@dataclass
class TrainState:
    """Where training stands: the next step to take, and what the loop remembers between steps.

    Attributes:
        epoch: epoch of the next step, from 0.
        step: position of the next step in its epoch, from 0. It equals the steps of an epoch while the validation at
            the epoch's end is still due.
        optimizer_steps: steps taken so far, over all epochs.
        plateau: state of the plateau schedule, for recipes whose learning rates follow the validation error.
        losses: mean losses of the steps since the last line of metrics.
        top1s: shares of images whose first guess was right, of the same steps.
        val_error: validation error of these weights; None if they were not validated.
    """

    epoch: int
    step: int
    optimizer_steps: int
    plateau: PlateauState
    losses: list[float]
    top1s: list[float]
    val_error: float | None = None

    @classmethod
    def start(cls) -> TrainState:
        """The state before the first step."""
        return cls(0, 0, 0, PlateauState(), [], [])


def save(
    path: Path, model: AlexNet, optimizer: Momentum2012, state: TrainState, seed: int, ranks: Ranks = SINGLE_RANK
) -> None:
    """Writes a checkpoint atomically. It writes nothing if `path` already holds this state of this run.

    Every rank must call it; rank 0 gathers the towers and writes.

    Raises:
        OSError: on rank 0 if the checkpoint cannot be written. Nothing remains of the attempt, and all other
            checkpoints stay as they were.
    """
    record = {
        "format": FORMAT,
        "recipe": asdict(model.recipe),
        "spec": asdict(model.spec),
        "seed": seed,
        "state": asdict(state),
    }
    text = json.dumps(record, indent=1) + "\n"
    saved_before = ranks.first and (path / STATE).is_file() and (path / STATE).read_text() == text
    if ranks.any(saved_before):  # all ranks must agree: gathering the towers needs every one of them
        return
    weights = ranks.gather_towers({name: parameter.data for name, parameter in model.named_parameters()})
    velocities = ranks.gather_towers(optimizer.velocities())
    if weights is not None and velocities is not None:
        _write(path, weights, velocities, text)


def _write(path: Path, weights: dict[str, Tensor], velocities: dict[str, Tensor], text: str) -> None:
    try:
        with replacing(path) as temporary:
            temporary.mkdir(parents=True)
            save_file(weights, temporary / WEIGHTS)
            save_file(velocities, temporary / VELOCITIES)
            (temporary / STATE).write_text(text)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path}: could not be saved ({error})") from error


def all_in(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, in the order of their optimizer steps."""
    return sorted(path for path in folder.glob("step-*") if (path / STATE).is_file())


def latest(folder: Path) -> Path | None:
    """The checkpoint with the most optimizer steps in `folder`; None if there is none."""
    return next(reversed(all_in(folder)), None)


def optimizer_steps(folder: Path) -> int:
    """Optimizer steps of the latest checkpoint in `folder`, -1 if there is none: a number that ranks can exchange."""
    path = latest(folder)
    return int(path.name.removeprefix("step-")) if path else -1


def named(folder: Path, optimizer_steps: int) -> Path | None:
    """Path of the checkpoint with that many optimizer steps; None for -1."""
    return folder / _name(optimizer_steps) if optimizer_steps >= 0 else None


def best(folder: Path) -> Path | None:
    """The checkpoint with the lowest validation error in `folder`, the earliest of equal ones; None if no checkpoint
    was validated."""
    errors = {path: _val_error(path) for path in all_in(folder)}
    known = {path: error for path, error in errors.items() if error is not None}
    return min(known, key=lambda path: known[path], default=None)


def _val_error(path: Path) -> float | None:
    try:
        error: float | None = _read_state(path)["state"].get("val_error")
    except ValueError:  # damaged; `restore` reports it
        return None
    return error


def prune(folder: Path, keep: int) -> None:
    """Removes all checkpoints but the last `keep` and the best one; each takes half a gigabyte at full width. It also
    removes what a killed `save` left behind."""
    assert keep > 0
    for path in set(all_in(folder)[:-keep]) - {best(folder)}:
        shutil.rmtree(path)
    for path in (*folder.glob(f".step-*{TEMPORARY}"), *folder.glob(f".step-*{REPLACED}")):
        shutil.rmtree(path)


def name_of(state: TrainState) -> str:
    """The folder name of a checkpoint at `state`."""
    return _name(state.optimizer_steps)


def _name(optimizer_steps: int) -> str:
    return f"step-{optimizer_steps:09d}"


def restore(path: Path, model: AlexNet, optimizer: Momentum2012, seed: int) -> TrainState:
    """Fills `model` and `optimizer`, of both towers or of one, from a checkpoint.

    Returns:
        Where training stood.

    Raises:
        ValueError: if the checkpoint has another format, recipe, network or seed, or is damaged.
    """
    record = _read_state(path)
    required = {"recipe": asdict(model.recipe), "spec": asdict(model.spec), "seed": seed}
    for part, value in _as_json(required).items():
        if record[part] != value:
            change = _difference(record[part], value)
            raise ValueError(f"{path}: saved with another {NOUNS[part]} ({change}); use the one it was saved with")
    parameters = {name: p.data for name, p in model.named_parameters()}
    _fill(path / WEIGHTS, parameters, model.towers)
    _fill(path / VELOCITIES, optimizer.velocities(), model.towers)
    fields = dict(record["state"])
    return TrainState(**{**fields, "plateau": PlateauState(**fields["plateau"])})


def load_model(path: Path, recipes: dict[str, Recipe]) -> AlexNet:
    """The network of a checkpoint, for evaluation.

    Raises:
        ValueError: if the folder holds no checkpoint of one of `recipes`.
    """
    record = _read_state(path)
    name = record["recipe"]["name"]
    if name not in recipes:
        raise ValueError(f"{path}: saved with recipe {name!r}, expected one of {', '.join(recipes)}")
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
    found = record.get("format") if isinstance(record, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"{path / STATE}: format {found!r}, expected {FORMAT!r}; "
            "train again, or use the version of this program that wrote it"
        )
    return dict(record)


def _fill(path: Path, tensors: dict[str, Tensor], towers: tuple[int, ...]) -> None:
    """Copies the rows of `towers` from a safetensors file into `tensors`. Only these rows are read from disk."""
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
        raise ValueError(f"{path}: holds tensors of another network; use the settings that it was saved with")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(found[name])


def _as_json(record: dict[str, Any]) -> dict[str, Any]:
    """The record as JSON returns it (tuples become lists), so that it compares equal to one that was read."""
    parsed: dict[str, Any] = json.loads(json.dumps(record))
    return parsed


def _difference(found: Any, expected: Any) -> str:
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = [key for key in expected if found.get(key) != expected[key]]
        return f"{keys[0]} {found.get(keys[0])!r}, now {expected[keys[0]]!r}" if keys else "other fields"
    return f"{found!r}, now {expected!r}"
