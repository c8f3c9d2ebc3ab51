"""Compares three layouts on this machine: one rank, a tower on each of two ranks, both towers on each of two ranks.

    python tools/bench_towers.py [--device cpu|cuda] [--precision P] [--batch N] [--width W] [--steps N] [--json FILE]

Starts the ranks itself, on random images that are already on their device. The layouts are interleaved in rounds, so
that background load affects all of them equally. Prints the time of a training step by part: computing, waiting for
activations ("exchange"), for halves of images ("swap") and for sums of gradients ("sums"), and the optimizer. Times on
a GPU come from CUDA events. Then it names the fastest layout, and the part in which each other layout is slower. On a
machine with one GPU two ranks share it, and no conclusion is drawn.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from model.parallel.mesh import RankLayout
from model.recipe import LRN_FORMS, PRECISIONS, SOURCE2012, LrnForm, learning_rates
from model.shapes import NetSpec
from tools.shared.cli import Progress, cores, json_path, run, write_json

if TYPE_CHECKING:
    from model.parallel.half_batches import PairBatch
    from model.parallel.ranks import Ranks

WARM_UP_STEPS = 3
PARTS = ("compute", "exchange", "swap", "sums", "optimizer")


@dataclass(frozen=True)
class Work:
    """What every layout does.

    Attributes:
        spec: size of the network.
        batch: images of the global batch.
        steps: optimizer steps of a round.
        device: "cpu" or "cuda".
        precision: one of `model.recipe.PRECISIONS`.
        lrn: one of `model.recipe.LRN_FORMS`.
    """

    spec: NetSpec
    batch: int
    steps: int
    device: str
    precision: str
    lrn: LrnForm = "eager"


@dataclass(frozen=True)
class Candidate:
    """A layout, and the number of its ranks."""

    name: str
    world: int
    layout: RankLayout


CANDIDATES = (
    Candidate("one rank", 1, "towers"),
    Candidate("tower pair", 2, "towers"),
    Candidate("data pair", 2, "data"),
)


def main() -> int:
    """Measures and prints; returns the exit code."""
    args = parse()
    import torch

    from model.step_options import check_step, describe_step
    from pipeline.loader.settings import check_device

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    check_step(torch.device(device), args.precision, args.lrn)
    work = Work(NetSpec(width=args.width), args.batch, args.steps, device, args.precision, args.lrn)
    shared = device == "cuda" and torch.cuda.device_count() < 2
    how = describe_step(device, work.precision, work.lrn, cuda_graph=False)
    print(f"device     {device}, {hardware(device)}; {how}, batch {work.batch}, width {work.spec.width:g}")
    print(f"measured   {args.rounds} rounds of {work.steps} steps, after {WARM_UP_STEPS} steps of warm-up")
    if shared:
        print("           TWO RANKS SHARE A GPU: this run checks correctness; their speed means nothing")
    rounds: dict[str, list[list[dict[str, Any]]]] = {candidate.name: [] for candidate in CANDIDATES}
    with Progress("measuring", args.rounds * len(CANDIDATES), "starts") as progress:
        for _ in range(args.rounds):
            for candidate in CANDIDATES:
                rounds[candidate.name].append(measure(candidate, work))
                progress(1)
    found = {name: summary(measured) for name, measured in rounds.items()}
    print(table(found))
    conclusion = "no conclusion: the ranks shared a GPU" if shared else compare(found)
    print(conclusion)
    record = {"device": hardware(device), "work": asdict(work), "layouts": found, "rounds": rounds}
    write_json(args.json, {**record, "shared_gpu": shared, "conclusion": conclusion})
    return 0


def hardware(device: str) -> str:
    """The hardware in a few words."""
    import torch

    if device == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{cores()} cores"


def measure(candidate: Candidate, work: Work) -> list[dict[str, Any]]:
    """Starts the ranks of a layout; returns what each of them measured."""
    context = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    pipes, processes = [], []
    for rank in range(candidate.world):
        receiver, sender = context.Pipe(duplex=False)
        processes.append(context.Process(target=_rank, args=(rank, port, candidate, work, sender)))
        processes[-1].start()
        sender.close()  # this process's copy; otherwise recv() would not notice that a rank has died
        pipes.append(receiver)
    try:
        return [pipe.recv() for pipe in pipes]
    except EOFError as error:
        raise ValueError(f"a rank of the layout {candidate.name!r} failed; its own message is above") from error
    finally:
        for process in processes:
            process.join()


def _rank(rank: int, port: int, candidate: Candidate, work: Work, sender: Any) -> None:
    from model.parallel.ranks import start

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": candidate.world, "LOCAL_WORLD_SIZE": candidate.world}
    os.environ.update({"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)})
    os.environ.update({name: str(value) for name, value in place.items()})
    ranks = start(candidate.layout, work.device, 300, cores=cores())
    sender.send(take_steps(ranks, work))
    ranks.leave()


def take_steps(ranks: Ranks, work: Work) -> dict[str, Any]:
    """Takes the steps. Returns the seconds of one step by part, and the bytes that this rank sends in it."""
    from model.alexnet import AlexNet
    from model.dropout import DropoutDraws
    from model.optim import Momentum2012
    from model.parallel.exchange import TowerExchange, step_bytes
    from model.parallel.half_batches import whole_batches
    from model.precision import prepare
    from model.train_step import train_step
    from model.trainer import wait_for

    place = ranks.place
    model = AlexNet(work.spec, towers=place.towers).to(ranks.device)
    prepare(model, work.device, work.precision)
    model.use_lrn(work.lrn)
    optimizer = Momentum2012(model.named_parameters(), SOURCE2012, learning_rates(SOURCE2012, 0, 1))
    towers = TowerExchange(ranks, model)
    with closing(whole_batches(random_batches(ranks, work), ranks)) as batches:
        for step in range(WARM_UP_STEPS + work.steps):
            if step == WARM_UP_STEPS:
                wait_for(ranks.device)
                ranks.any(False)  # a barrier: all ranks start the measured steps together
                ranks.spans.take()
            with ranks.spans.span("step"):
                draws = DropoutDraws(0, step, place.first_row(work.batch), work.batch)
                train_step(model, optimizer, next(batches), draws, work.precision, towers)
        taken_s = ranks.spans.take()
    seconds = {name: taken_s.get(name, 0.0) / work.steps for name in ("step", *PARTS)}
    seconds["compute"] = seconds["step"] - sum(seconds[part] for part in PARTS[1:])
    sent = step_bytes(place, work.spec, SOURCE2012, work.batch, work.precision)
    return {**{f"{name}_s": value for name, value in seconds.items()}, "sent_bytes": sent}


def random_batches(ranks: Ranks, work: Work) -> Iterator[PairBatch]:
    """Yields one random batch again and again: the rows that this rank would decode."""
    import torch

    from model.parallel.half_batches import PairBatch

    rows = work.batch // ranks.place.world
    generator = torch.Generator().manual_seed(ranks.place.rank)
    images = (60 * torch.randn(rows, 3, 224, 224, generator=generator)).to(ranks.device)
    labels = torch.randint(work.spec.classes, (rows,), generator=generator).to(ranks.device)
    while True:
        yield PairBatch(images, labels, 0, 0)


def summary(rounds: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of rank 0's seconds over the rounds, the range of its steps, and the bytes that each rank sends."""
    first = [ranks[0] for ranks in rounds]
    seconds = {f"{name}_s": median(each[f"{name}_s"] for each in first) for name in ("step", *PARTS)}
    steps_s = [each["step_s"] for each in first]
    sent = [rank["sent_bytes"] for rank in rounds[0]]
    return {**seconds, "step_s_min": min(steps_s), "step_s_max": max(steps_s), "sent_bytes": sent}


def table(found: dict[str, dict[str, Any]]) -> str:
    """Milliseconds of a step by part, as a table of text."""
    columns = ("step", *PARTS)
    lines = [f"{'ms a step':12}" + "".join(f"{name:>11}" for name in columns) + f"{'min to max':>20}{'MB sent':>9}"]
    for name, each in found.items():
        sent_mb = max(sum(sent.values()) for sent in each["sent_bytes"]) / 1e6
        spread = f"{each['step_s_min'] * 1000:,.1f} to {each['step_s_max'] * 1000:,.1f}"
        cells = "".join(f"{each[f'{column}_s'] * 1000:11,.1f}" for column in columns)
        lines.append(f"{name:12}{cells}{spread:>20}{sent_mb:9,.1f}")
    return "\n".join(lines)


def compare(found: dict[str, dict[str, Any]]) -> str:
    """Names the fastest layout, and the part in which each other layout loses most."""
    order = sorted(found, key=lambda name: found[name]["step_s"])
    best = found[order[0]]
    lines = [f"fastest    {order[0]}"]
    for name in order[1:]:
        each = found[name]
        slower_ms = {part: (each[f"{part}_s"] - best[f"{part}_s"]) * 1000 for part in PARTS}
        part = max(slower_ms, key=lambda part: slower_ms[part])
        lines.append(
            f"           {name} takes {each['step_s'] / best['step_s']:.2f} times as long, most of it for "
            f"{part} (+{slower_ms[part]:,.1f} ms)"
        )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is a CUDA device")
    add("--precision", choices=PRECISIONS, default=PRECISIONS[0], help="of products; default: %(default)s")
    add("--lrn", choices=LRN_FORMS, default=LRN_FORMS[0], help="triton: fused kernels on a GPU; default: %(default)s")
    add("--batch", type=int, default=SOURCE2012.batch, metavar="N", help="global batch; default: %(default)s")
    add("--width", type=float, default=1.0, metavar="W", help="factor on the feature maps; default: %(default)s")
    add("--steps", type=int, default=10, metavar="N", help="optimizer steps of a round; default: %(default)s")
    add("--rounds", type=int, default=3, metavar="N", help="default: %(default)s")
    add("--json", type=json_path, metavar="FILE", help="also write all figures to FILE")
    args = parser.parse_args()
    if args.batch < 2 or args.batch % 2:
        raise ValueError(f"--batch {args.batch} cannot be shared by two ranks; choose an even number")
    for name in ("steps", "rounds"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}, expected at least 1")
    return args


if __name__ == "__main__":
    run(main)
