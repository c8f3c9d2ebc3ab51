"""Which layout pays on this machine: one rank, a tower on each of two ranks, or both towers on each of two ranks.

    python tools/bench_towers.py [--device cpu|cuda] [--batch N] [--width W] [--steps N] [--json FILE]

Starts its own ranks, layout after layout in rounds, on made-up images that are already on their device. Prints seconds
of a step by what they went to (by CUDA events on a GPU): computing, waiting for maps and halves of images, waiting for
sums of gradients, the update; then which layout is fastest, and why. On a machine with one GPU two ranks share it, and
nothing is concluded.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from model.alexnet import AlexNet
from model.dropout import DropoutDraws
from model.optim import Momentum2012
from model.parallel.exchange import TowerExchange, step_bytes
from model.parallel.half_batches import PairBatch, whole_batches
from model.parallel.mesh import RankLayout
from model.parallel.ranks import Ranks, start
from model.recipe import SOURCE2012, learning_rates
from model.shapes import NetSpec
from model.trainer import PRECISIONS, train_step, wait_for
from tools.shared.cli import Progress, run, write_json

WARM_UP = 3  # steps
PARTS = ("compute", "exchange", "swap", "sums", "optimizer")


@dataclass(frozen=True)
class Work:
    """What every layout does."""

    spec: NetSpec
    batch: int
    steps: int
    device: str
    precision: str

    def __post_init__(self) -> None:
        if self.batch < 2 or self.batch % 2:
            raise ValueError(f"batch {self.batch} cannot be shared by two ranks; choose an even number")
        if self.steps < 1:
            raise ValueError(f"steps {self.steps}, expected at least 1")


@dataclass(frozen=True)
class Rival:
    """A layout, and the number of its ranks."""

    name: str
    world: int
    layout: RankLayout


RIVALS = (Rival("one rank", 1, "towers"), Rival("tower pair", 2, "towers"), Rival("data pair", 2, "data"))


def main() -> int:
    """Measures and prints; returns the exit code."""
    args = _arguments()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch sees no CUDA device here; use --device cpu")
    work = Work(NetSpec(width=args.width), args.batch, args.steps, device, args.precision)
    shared = device == "cuda" and torch.cuda.device_count() < 2
    print(f"device     {device}, {where(device)}; {work.precision}, batch {work.batch}, width {work.spec.width:g}")
    print(f"measured   {args.rounds} rounds of {work.steps} steps, after {WARM_UP} to warm up")
    if shared:
        print("           TWO RANKS SHARE A GPU: a run for correctness; their speed means nothing")
    rounds: dict[str, list[list[dict[str, Any]]]] = {rival.name: [] for rival in RIVALS}
    with Progress("measuring", args.rounds * len(RIVALS), "starts") as progress:
        for _ in range(args.rounds):
            for rival in RIVALS:
                rounds[rival.name].append(measure(rival, work))
                progress(1)
    found = {name: summary(those) for name, those in rounds.items()}
    print(table(found))
    conclusion = "nothing is concluded: the ranks shared a GPU" if shared else why(found)
    print(conclusion)
    record = {"device": where(device), "work": asdict(work), "layouts": found, "rounds": rounds}
    write_json(args.json, {**record, "shared_gpu": shared, "conclusion": conclusion})
    return 0


def where(device: str) -> str:
    """The hardware in a few words."""
    if device == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{len(os.sched_getaffinity(0))} cores"


def measure(rival: Rival, work: Work) -> list[dict[str, Any]]:
    """Starts the ranks of a layout; returns what each of them measured."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    pipes, processes = [], []
    for rank in range(rival.world):
        receiver, sender = context.Pipe(duplex=False)
        processes.append(context.Process(target=_rank, args=(rank, port, rival, work, sender)))
        processes[-1].start()
        sender.close()  # ours; so that a rank that dies is noticed
        pipes.append(receiver)
    try:
        return [pipe.recv() for pipe in pipes]
    except EOFError as error:
        raise ValueError(f"a rank of the layout {rival.name!r} failed; its own words are above") from error
    finally:
        for process in processes:
            process.join()


def _rank(rank: int, port: int, rival: Rival, work: Work, sender: Any) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": rival.world, "LOCAL_WORLD_SIZE": rival.world}
    os.environ.update({"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)})
    os.environ.update({name: str(value) for name, value in place.items()})
    ranks = start(rival.layout, work.device, 300)
    sender.send(steps(ranks, work))
    ranks.leave()


def steps(ranks: Ranks, work: Work) -> dict[str, Any]:
    """Takes the steps; returns seconds of one by what they went to, and the bytes that this rank sent in it."""
    place = ranks.place
    model = AlexNet(work.spec, towers=place.towers).to(ranks.device)
    optimizer = Momentum2012(model.named_parameters(), SOURCE2012, learning_rates(SOURCE2012, 0, 1))
    towers = TowerExchange(ranks, model)
    with closing(whole_batches(made_up(ranks, work), ranks)) as batches:
        for step in range(WARM_UP + work.steps):
            if step == WARM_UP:
                wait_for(ranks.device)
                ranks.any(False)  # so that all begin together
                ranks.spans.take()
            with ranks.spans.span("step"):
                draws = DropoutDraws(0, step, place.first_row(work.batch), work.batch)
                train_step(model, optimizer, next(batches), draws, work.precision, towers)
        taken = ranks.spans.take()
    seconds = {name: taken.get(name, 0.0) / work.steps for name in ("step", *PARTS)}
    seconds["compute"] = seconds["step"] - sum(seconds[part] for part in PARTS[1:])
    sent = step_bytes(place, work.spec, SOURCE2012, work.batch, work.precision)
    return {**{f"{name}_s": value for name, value in seconds.items()}, "sent_bytes": sent}


def made_up(ranks: Ranks, work: Work) -> Iterator[PairBatch]:
    """The rows that this rank would have decoded, over and over."""
    rows = work.batch // ranks.place.world
    draw = torch.Generator().manual_seed(ranks.place.rank)
    images = (60 * torch.randn(rows, 3, 224, 224, generator=draw)).to(ranks.device)
    labels = torch.randint(work.spec.classes, (rows,), generator=draw).to(ranks.device)
    while True:
        yield PairBatch(images, labels, 0, 0)


def summary(rounds: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the rounds of rank 0's seconds, the spread of its steps, and the bytes that each rank sends."""
    first = [those[0] for those in rounds]
    seconds = {f"{name}_s": median(each[f"{name}_s"] for each in first) for name in ("step", *PARTS)}
    steps_s = [each["step_s"] for each in first]
    sent = [rank["sent_bytes"] for rank in rounds[0]]
    return {**seconds, "step_s_min": min(steps_s), "step_s_max": max(steps_s), "sent_bytes": sent}


def table(found: dict[str, dict[str, Any]]) -> str:
    """Milliseconds of a step as lines for people."""
    columns = ("step", *PARTS)
    lines = [f"{'ms a step':12}" + "".join(f"{name:>11}" for name in columns) + f"{'min to max':>20}{'MB sent':>9}"]
    for name, each in found.items():
        sent_mb = max(sum(sent.values()) for sent in each["sent_bytes"]) / 1e6
        spread = f"{each['step_s_min'] * 1000:,.1f} to {each['step_s_max'] * 1000:,.1f}"
        cells = "".join(f"{each[f'{column}_s'] * 1000:11,.1f}" for column in columns)
        lines.append(f"{name:12}{cells}{spread:>20}{sent_mb:9,.1f}")
    return "\n".join(lines)


def why(found: dict[str, dict[str, Any]]) -> str:
    """Which layout is fastest, and what the others lose by."""
    order = sorted(found, key=lambda name: found[name]["step_s"])
    best = found[order[0]]
    lines = [f"fastest    {order[0]}"]
    for name in order[1:]:
        each = found[name]
        slower = {part: (each[f"{part}_s"] - best[f"{part}_s"]) * 1000 for part in PARTS}
        part = max(slower, key=lambda part: slower[part])
        lines.append(
            f"           {name} takes {each['step_s'] / best['step_s']:.2f} times as long, most of it for "
            f"{part} (+{slower[part]:,.1f} ms)"
        )
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[0], help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=SOURCE2012.batch, metavar="N", help="global; default: %(default)s")
    parser.add_argument("--width", type=float, default=1.0, metavar="W", help="scales the maps; default: 1")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="of a round; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what the screen says")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
