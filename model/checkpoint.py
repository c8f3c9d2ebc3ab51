"""Checkpoints: a folder that is complete or absent, and that any number of ranks can read.

    weights.safetensors      "conv1.weight" ...: both towers, stacked as `model.shapes.tower_slice` says
    velocities.safetensors   the optimizer's velocities, by the same names
    data.safetensors         mean image and eigenbasis of the training data; absent if the caller gave no data
    state.json               the format, recipe, network and seed, where training stands, classes of the data, and the
                             SHA-256 of all files, which is checked on loading

There is no pickle, so loading a checkpoint cannot run code. Only folders named step-NUMBER, with at least nine digits,
are checkpoints: a copy such as step-000000004-keep belongs to the user and is left alone.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.alexnet import AlexNet
from model.changes import changed
from model.data_record import DataRecord
from model.files import REPLACED, TEMPORARY, replacing, write_atomically
from model.optim import Momentum2012
from model.parallel.ranks import SINGLE_RANK, Ranks
from model.recipe import PlateauState, Recipe
from model.runs import difference
from model.shapes import TOWERS, NetSpec, tower_rows

FORMAT = "alexnet-pipeline checkpoint, version 3"  # version 2 had no checksums and no data
NOUNS = {"recipe": "recipe", "spec": "network", "seed": "seed"}  # entries of state.json, as messages call them
WEIGHTS, VELOCITIES, STATE = "weights.safetensors", "velocities.safetensors", "state.json"
DATA = "data.safetensors"
NAME = re.compile(r"step-\d{9,}")
LEFT_OVER = re.compile(rf"\.step-\d{{9,}}({re.escape(TEMPORARY)}|{re.escape(REPLACED)})")  # of a killed `save`
EARLIER = "use an earlier checkpoint: --resume-from CHECKPOINT"


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
        val_set: SHA-256 of the manifest of the set that gave `val_error`: errors on two sets are not comparable.
    """

    epoch: int
    step: int
    optimizer_steps: int
    plateau: PlateauState
    losses: list[float]
    top1s: list[float]
    val_error: float | None = None
    val_set: str | None = None

    @classmethod
    def start(cls) -> TrainState:
        """The state before the first step."""
        return cls(0, 0, 0, PlateauState(), [], [])


def save(
    path: Path,
    model: AlexNet,
    optimizer: Momentum2012,
    state: TrainState,
    seed: int,
    ranks: Ranks = SINGLE_RANK,
    data: DataRecord | None = None,
) -> None:
    """Writes a checkpoint atomically. It writes nothing if `path` already holds this state of this run, undamaged.

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
        "data": data.record() if data else None,
    }
    saved_before = ranks.first and _holds(path, record)
    if ranks.any(saved_before):  # all ranks must agree: gathering the towers needs every one of them
        return
    weights = ranks.gather_towers({name: parameter.data for name, parameter in model.named_parameters()})
    velocities = ranks.gather_towers(optimizer.velocities())
    if weights is not None and velocities is not None:
        tensors = {WEIGHTS: weights, VELOCITIES: velocities} | ({DATA: data.arrays} if data else {})
        _write(path, tensors, record)


def update_state(path: Path, state: TrainState) -> None:
    """Replaces the state of a checkpoint, atomically, whose weights and velocities stay: those of a validation's start.

    Raises:
        OSError: the file cannot be written. The checkpoint stays as it was.
        ValueError: `path` is not an undamaged checkpoint.
    """
    write_atomically(path / STATE, sealed(_read_state(path) | {"state": asdict(state)}))


def _holds(path: Path, record: dict[str, Any]) -> bool:
    try:
        found = _read_state(path)
    except (OSError, ValueError):
        return False
    return {name: found.get(name) for name in record} == _as_json(record) and not faults(path)


def _write(path: Path, tensors: dict[str, dict[str, Tensor]], record: dict[str, Any]) -> None:
    try:
        with replacing(path) as temporary:
            temporary.mkdir(parents=True)
            for name, arrays in tensors.items():
                save_file(arrays, temporary / name)
            files = {name: _sha256(temporary / name) for name in tensors}
            (temporary / STATE).write_text(sealed(record | {"files": files}))
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path}: could not be saved ({error})") from error


def sealed(record: dict[str, Any]) -> str:
    """The text of state.json: a record and its SHA-256."""
    body = {name: value for name, value in record.items() if name != "sha256"}
    return json.dumps({**body, "sha256": hashlib.sha256(json.dumps(body).encode()).hexdigest()}, indent=1) + "\n"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def faults(path: Path) -> list[str]:
    """What is wrong with the files of a checkpoint: a line for each missing or damaged file; none for a whole one."""
    try:
        files = _read_state(path).get("files", {})
    except ValueError as error:
        return [str(error)]
    found = []
    for name, expected in files.items():
        try:
            if _sha256(path / name) != expected:
                found.append(f"{path / name}: damaged (its SHA-256 is not the one in {STATE})")
        except OSError as error:
            found.append(f"{path / name}: missing or damaged ({error.strerror})")
    return found


def last_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint with the most optimizer steps among the undamaged ones, and the faults of all later ones."""
    found: list[str] = []
    for path in reversed(all_in(folder)):
        if not (wrong := faults(path)):
            return path, found
        found += wrong
    return None, found


def all_in(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, in the order of their optimizer steps."""
    paths = (path for path in folder.glob("step-*") if NAME.fullmatch(path.name) and (path / STATE).is_file())
    return sorted(paths, key=optimizer_steps_of)


def optimizer_steps_of(path: Path) -> int:
    """Optimizer steps of a checkpoint, from its name; ValueError if the folder has another name."""
    if not NAME.fullmatch(path.name):
        raise ValueError(f"{path}: not the name of a checkpoint; expected runs/NAME/checkpoints/step-...")
    return int(path.name.removeprefix("step-"))


def latest(folder: Path) -> Path | None:
    """The checkpoint with the most optimizer steps in `folder`; None if there is none."""
    return next(reversed(all_in(folder)), None)


def optimizer_steps(folder: Path) -> int:
    """Optimizer steps of the latest checkpoint in `folder`, -1 if there is none: a number that ranks can exchange."""
    path = latest(folder)
    return optimizer_steps_of(path) if path else -1


def named(folder: Path, optimizer_steps: int) -> Path | None:
    """Path of the checkpoint with that many optimizer steps; None for -1."""
    return folder / _name(optimizer_steps) if optimizer_steps >= 0 else None


def best(folder: Path) -> Path | None:
    """The checkpoint with the lowest validation error in `folder`, the earliest of equal ones; None if no checkpoint
    was validated. Only those count that were validated on the same set as the last one that was validated."""
    states = {path: _state_or_none(path) for path in all_in(folder)}
    validated = {path: state for path, state in states.items() if state and state.get("val_error") is not None}
    if not validated:
        return None
    val_set = list(validated.values())[-1].get("val_set")
    known = {path: state["val_error"] for path, state in validated.items() if state.get("val_set") == val_set}
    return min(known, key=lambda path: known[path])


def _state_or_none(path: Path) -> dict[str, Any] | None:
    try:
        return dict(_read_state(path)["state"])
    except ValueError:  # damaged; `faults` reports it
        return None


def prune(folder: Path, keep: int) -> None:
    """Removes all checkpoints but the last `keep` and the best one; each takes half a gigabyte at full width. It also
    removes what a killed `save` left behind. Files with other names are left alone."""
    assert keep > 0
    for path in set(all_in(folder)[:-keep]) - {best(folder)}:
        shutil.rmtree(path)
    for path in folder.glob(".step-*"):
        if LEFT_OVER.fullmatch(path.name) and path.is_dir():
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
        ValueError: if the checkpoint has another format, recipe, network or seed, or is damaged. The scale of the
            learning rates may differ.
    """
    record = _read_state(path)
    required = {"recipe": asdict(model.recipe), "spec": asdict(model.spec), "seed": seed}
    record["recipe"]["learning_rate_scale"] = model.recipe.learning_rate_scale
    for part, value in _as_json(required).items():
        if record[part] != value:
            change = difference(record[part], value)
            raise ValueError(f"{path}: saved with another {NOUNS[part]} ({change}); use the one it was saved with")
    _refuse_damage(path)
    parameters = {name: p.data for name, p in model.named_parameters()}
    _fill(path / WEIGHTS, parameters, model.towers)
    _fill(path / VELOCITIES, optimizer.velocities(), model.towers)
    fields = dict(record["state"])
    return TrainState(**{**fields, "plateau": PlateauState(**fields["plateau"])})


def load_model(path: str | Path, recipes: dict[str, Recipe]) -> AlexNet:
    """The network of a checkpoint, for evaluation.

    Raises:
        ValueError: if the folder holds no checkpoint of one of `recipes`, or a damaged one.
    """
    path = Path(path)
    record = _read_state(path)
    name = record["recipe"]["name"]
    if name not in recipes:
        raise ValueError(f"{path}: saved with recipe {name!r}, expected one of {', '.join(recipes)}")
    _refuse_damage(path)
    model = AlexNet(NetSpec(**record["spec"]), changed(recipes[name], record["recipe"].get("changes", ())))
    _fill(path / WEIGHTS, {name: p.data for name, p in model.named_parameters()}, TOWERS)
    return model


def load_data(path: str | Path) -> DataRecord:
    """What a checkpoint knows of its training data.

    Raises:
        ValueError: if the folder holds no checkpoint, a damaged one, or one that was saved without its data.
    """
    path = Path(path)
    record = _read_state(path)
    if record.get("data") is None:
        raise ValueError(f"{path}: saved without its classes and mean image; use a checkpoint that train.py saved")
    _refuse_damage(path)
    return DataRecord(**record["data"], arrays=load_file(path / DATA))


def _refuse_damage(path: Path) -> None:
    if found := faults(path):
        raise ValueError(f"{'; '.join(found)}; {EARLIER}")


def _read_state(path: Path) -> dict[str, Any]:
    try:
        record = json.loads((path / STATE).read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{path}: no checkpoint here (no {STATE}); expected runs/NAME/checkpoints/step-...") from error
    except ValueError as error:
        raise ValueError(f"{path / STATE}: damaged ({error}); {EARLIER}") from error
    found = record.get("format") if isinstance(record, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"{path / STATE}: format {found!r}, expected {FORMAT!r}; "
            "train again, or use the version of this program that wrote it"
        )
    if json.loads(sealed(record))["sha256"] != record.get("sha256"):
        raise ValueError(f"{path / STATE}: damaged (its content does not have its SHA-256); {EARLIER}")
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
        raise ValueError(f"{path}: missing or damaged ({error}); {EARLIER}") from error
    if {name: t.shape for name, t in found.items()} != {name: t.shape for name, t in tensors.items()}:
        raise ValueError(f"{path}: holds tensors of another network; use the settings that it was saved with")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(found[name])


def _as_json(record: dict[str, Any]) -> dict[str, Any]:
    """The record as JSON returns it (tuples become lists), so that it compares equal to one that was read."""
    parsed: dict[str, Any] = json.loads(json.dumps(record))
    return parsed
