"""The lines that tools/train.py prints before a run starts: recipe, network, device, ranks, data."""

from __future__ import annotations

from dataclasses import replace

from model.checkpoint import TrainState
from model.parallel.exchange import step_bytes
from model.parallel.half_batches import swaps_crops
from model.shapes import layer_table
from model.step_options import describe_step
from model.transfer import frozen_layers
from tools.shared.job import Job


def describe(job: Job, state: TrainState) -> str:
    """Returns the description of a run that starts or resumes at `state`."""
    place, loop = job.ranks.place, job.loop
    parameters = sum(shape.weights + shape.biases for shape in layer_table(job.spec, job.recipe))
    layout = "both towers on one rank" if place.world == 1 else f"both towers on each of {place.world} ranks"
    if place.is_pair:
        layout = "one tower on each rank of a pair"
    changes = f" with {', '.join(job.recipe.changes)}" if job.recipe.changes else ""
    rules = f"{job.recipe.name}{changes}, learning rates x {job.recipe.learning_rate_scale:g}"
    how = describe_step(job.loader.device, loop.precision, loop.lrn, loop.cuda_graph)
    lines = [
        f"recipe     {rules}, batch {job.loader.batch}, seed {loop.seed}",
        f"network    {parameters:,} parameters, width {job.spec.width:g}, {job.spec.classes} classes, {layout}",
        f"device     {job.loader.device}, {how}, data loader with {_workers(job)}",
        *(_describe_ranks(job) if place.world > 1 else []),
        f"data       {len(job.shards):,} samples, {loop.steps_per_epoch} steps an epoch, epochs: {loop.epochs}",
    ]
    if job.init_from:
        frozen = ", ".join(frozen_layers(job.recipe)) or "none"
        lines.append(f"start      {job.init_from[1]} of {job.init_from[0]}; frozen: {frozen}")
    if state.optimizer_steps:
        lines.append(f"resumed    after optimizer step {state.optimizer_steps:,}, epoch {state.epoch}")
    return "\n".join(lines)


def _workers(job: Job) -> str:
    """What the data loader of a rank runs on."""
    if job.loader.library == "webdataset":
        return f"{job.loader.threads} worker processes (webdataset, Pillow)"
    return f"{job.loader.threads} threads"


def _describe_ranks(job: Job) -> list[str]:
    """How the ranks are laid out, and the bytes that each rank of the first pair will send in a step."""
    ranks, place = job.ranks, job.ranks.place
    parts = f"{place.data_ranks} part{'s' if place.data_ranks > 1 else ''} of the batch"
    lines = [f"ranks      {place.world} over {ranks.backend}: {parts}, ranks for each part: {place.tower_ranks}"]
    if ranks.shared_gpu:
        lines.append("           the ranks share a GPU: use this run to check results, not to measure speed")
    for rank in range(place.tower_ranks):
        here, precision = replace(place, rank=rank), job.loop.precision
        sent = step_bytes(here, job.spec, job.recipe, job.loader.batch, precision, swaps_crops(ranks))
        lines.append(f"{'' if rank else 'each step':<10} rank {rank} sends {format_bytes(sent)} (calculated)")
    return lines


def format_bytes(sent: dict[str, int]) -> str:
    """Returns exact bytes by kind as text, for example "images 1,024, sums 2,048 bytes"."""
    return ", ".join(f"{kind} {count:,}" for kind, count in sent.items()) + " bytes"
