"""Measures each switch of the training step on and off, in interleaved windows, beside an estimate from bytes and
launches.

`VARIANTS` is the table of what is measured. A new variant is one line: a name, and a function that makes the step.
"""

from __future__ import annotations

import importlib
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

from model.alexnet import AlexNet
from model.batch import Batch
from model.cuda_graph import CudaGraph, GraphedStep
from model.dropout import DropoutDraws
from model.optim import Momentum2012
from model.parallel.half_batches import PairBatch
from model.precision import prepare
from model.recipe import SOURCE2012, learning_rates
from model.shapes import TOWERS, NetSpec
from model.train_step import train_step
from model.trainer import wait_for
from pipeline.profiling.windows import TrainerUnderTest, measure_demand
from tools.shared.operator_counts import count_step

GENTLE = 0.1  # factor on the learning rates: weights stay finite on random images
COPIED_FLOATS, TINY_LAUNCHES = 2**26, 1000  # to measure memory traffic (256 MB) and the cost of a launch
REPLAYED = 2  # batches that are trained on in turn
WARM_UP_STEPS = 5  # cuDNN compares its algorithms, libraries allocate memory, kernels are compiled
Step = Callable[[Batch], object]


@dataclass(frozen=True)
class Rig:
    """What every variant is made of.

    Attributes:
        device: where steps run.
        width: width of the network.
    """

    device: torch.device
    width: float = 1.0

    def net(self, arrange: Callable[[AlexNet], object] = lambda model: None) -> tuple[AlexNet, Momentum2012]:
        """A new network, arranged before its optimizer is made, and the optimizer."""
        recipe = replace(SOURCE2012, learning_rate_scale=GENTLE)
        model = AlexNet(NetSpec(width=self.width), recipe).to(self.device)
        arrange(model)
        return model, Momentum2012(model.named_parameters(), recipe, learning_rates(recipe, 0, 1))

    def batches(self, rows: int) -> list[Batch]:
        """Random batches that are on the device already."""
        images = 60 * torch.randn(REPLAYED, rows, 3, 224, 224, device=self.device)
        labels = torch.arange(rows, device=self.device) % 1000
        return [PairBatch(each, labels, 0, number) for number, each in enumerate(images)]


def eager(rig: Rig, precision: str = "float32", arrange: Callable[[AlexNet], object] = lambda model: None) -> Step:
    """A step as the training loop takes it.

    Args:
        rig: makes the network.
        precision: one of `model.recipe.PRECISIONS`.
        arrange: changes the new network, for example its layout in memory.
    """
    model, optimizer = rig.net(arrange)
    return lambda batch: train_step(model, optimizer, batch, DropoutDraws(0, 0), precision)


def channels_last(model: nn.Module) -> None:
    """Stores the weights of convolutions with the channels last; activations follow."""
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def triton(model: AlexNet) -> None:
    """LRN (local response normalisation) in two fused kernels."""
    model.use_lrn("triton")


def fastest(model: AlexNet) -> None:
    """What `--precision bfloat16 --lrn triton` does to the network."""
    channels_last(model)
    triton(model)


def graphed(rig: Rig, precision: str = "float32", arrange: Callable[[AlexNet], object] = lambda model: None) -> Step:
    """A step that is recorded once and replayed; arguments are those of `eager`."""
    step = GraphedStep(*rig.net(arrange), precision, CudaGraph())
    return lambda batch: step(batch, DropoutDraws(0, 0))


def torchvision_net(subject: Any, precision: str) -> tuple[Any, Any]:
    """torchvision's network, with the interface of this project's one, and torch's optimizer.

    Args:
        subject: its `settings.device` is where the network goes.
        precision: one of `model.recipe.PRECISIONS`.
    """
    device = subject.settings.device
    net = importlib.import_module("torchvision.models").alexnet().to(device)
    prepare(net, device, precision)
    net.towers, forward = TOWERS, net.forward
    net.forward = lambda images, *_: forward(images / 60)  # it expects images with standard deviation 1
    return net, torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4)


class SeparateOperators(Momentum2012):
    """The optimizer with several operators for each parameter, as on the CPU, instead of one fused kernel."""

    @torch.no_grad()
    def step(self) -> None:
        """Changes every parameter by its gradient."""
        for group in self.param_groups:
            self._step(group["params"][0], group["lr"], group["momentum"], group["weight_decay"])


def separate_optimizer(rig: Rig) -> Step:
    """A step without the fused kernel of the optimizer."""
    model, optimizer = rig.net()
    optimizer.__class__ = SeparateOperators
    return lambda batch: train_step(model, optimizer, batch, DropoutDraws(0, 0))


# The first variant is what training does without options; the others change one switch of it, the last ones several.
VARIANTS: dict[str, Callable[[Rig], Step]] = {
    "default": eager,
    "optimizer not fused": separate_optimizer,
    "channels last": partial(eager, arrange=channels_last),
    "LRN triton": partial(eager, arrange=triton),
    "CUDA graph": graphed,
    "tf32": partial(eager, precision="tf32"),
    "tf32, channels last": partial(eager, precision="tf32", arrange=channels_last),
    "bfloat16": partial(eager, precision="bfloat16"),
    "bfloat16, channels last": partial(eager, precision="bfloat16", arrange=channels_last),
    "bfloat16, channels last, LRN triton": partial(eager, precision="bfloat16", arrange=fastest),
    "bfloat16, channels last, LRN triton, CUDA graph": partial(graphed, precision="bfloat16", arrange=fastest),
}


def measure_switches(
    rig: Rig, rows: int, budget_s: float, rounds: int = 3, variants: Mapping[str, Callable[[Rig], Step]] | None = None
) -> dict[str, Any]:
    """Measures all variants at one batch size, in turn.

    Args:
        rig: makes the networks.
        rows: images of a batch.
        budget_s: seconds for the windows of all variants; preparation comes on top.
        rounds: windows of each variant.
        variants: default: `VARIANTS`.

    Returns:
        For each variant `img_s` (of each window), `launches` and `bytes` of a step, `bounds_img_s` (what memory traffic
        and launches would allow), `estimated_img_s` (the lower of them) and `over_default` (ratio of the medians); or
        `failed` and `traceback`. `device`: what the bounds are computed with.
    """
    table, batches = VARIANTS if variants is None else variants, rig.batches(rows)
    device = {"bytes_per_s": memory_traffic(rig.device), "launch_s": launch_cost_s(rig.device)}
    found: dict[str, dict[str, Any]] = {name: {} for name in table}
    steps = dict[str, Step]()
    for name, make in table.items():

        def prepare(name: str = name, make: Callable[[Rig], Step] = make) -> None:
            step = make(rig)
            counts = count_step(lambda: step(batches[0]))
            for number in range(WARM_UP_STEPS):
                step(batches[number % REPLAYED])
            wait_for(rig.device)
            bounds = counts.bounds_img_s(rows, **device)
            found[name] |= {**asdict(counts), "bounds_img_s": bounds, "estimated_img_s": min(bounds.values())}
            steps[name] = step

        _attempt(found[name], prepare)
    window_s = budget_s / max(1, rounds * len(steps))
    for _ in range(rounds):
        for name, step in steps.items():
            _attempt(found[name], partial(_window, found[name], step, batches, window_s))
    return {"device": device, "window_s": window_s, "variants": _compared(found, next(iter(table)))}


def step_img_s(step: Step, batches: Sequence[Batch], window_s: float) -> float:
    """img/s of steps on batches that are on the device, in one window."""
    settle = partial(wait_for, batches[0].images.device)
    return measure_demand(TrainerUnderTest[Batch](lambda batch: len(batch.labels), step, settle), batches, window_s)


def replay_img_s(model: Any, optimizer: Any, batches: Sequence[Batch], window_s: float, precision: str) -> float:
    """The same for training steps of a network."""

    def step(batch: Batch) -> None:
        train_step(model, optimizer, batch, DropoutDraws(0, 0), precision)

    return step_img_s(step, batches, window_s)


def _window(found: dict[str, Any], step: Step, batches: Sequence[Batch], window_s: float) -> None:
    """Adds the img/s of one window."""
    found.setdefault("img_s", []).append(step_img_s(step, batches, window_s))


def _attempt(found: dict[str, Any], work: Callable[[], object]) -> None:
    """Does the work, unless this variant has failed. One that this machine cannot run must not stop the others."""
    if "failed" in found:
        return
    try:
        work()
    except Exception as error:
        found |= {"failed": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}


def _compared(found: dict[str, dict[str, Any]], default: str) -> dict[str, dict[str, Any]]:
    base = median(found[default].get("img_s", [0.0]))
    for variant in found.values():
        if base and "failed" not in variant:
            variant["over_default"] = median(variant["img_s"]) / base
    return found


def memory_traffic(device: torch.device, floats: int = COPIED_FLOATS, rounds: int = 5) -> float:
    """Bytes a second that a copy of a large tensor reads and writes: the best of a few."""
    source = torch.zeros(floats, device=device)
    target = torch.empty_like(source)
    seconds = [_timed(device, lambda: target.copy_(source)) for _ in range(rounds + 1)]
    return 2 * source.numel() * source.element_size() / min(seconds[1:])


def launch_cost_s(device: torch.device) -> float:
    """Seconds of the host for one launch: many operators on a tiny tensor."""
    tiny = torch.zeros(1, device=device)

    def launches() -> None:
        for _ in range(TINY_LAUNCHES):
            tiny.add_(1)

    launches()
    return _timed(device, launches) / TINY_LAUNCHES


def _timed(device: torch.device, work: Callable[[], object]) -> float:
    wait_for(device)
    started_s = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - started_s


def format_switches(rows: int, found: dict[str, Any]) -> str:
    """The result as lines of text: a variant a line, the estimate beside the measurement."""
    lines = [f"batch {rows:<44}{'img/s':>9}{'estimate':>10}{'/ default':>11}{'launches':>10}{'GB':>8}"]
    for name, variant in found["variants"].items():
        if "failed" in variant:
            lines.append(f"  {name:<48} {variant['failed']}"[:120])
            continue
        lines.append(
            f"  {name:<48}{median(variant['img_s']):9,.0f}{variant['estimated_img_s']:10,.0f}"
            f"{variant['over_default']:11.2f}{variant['launches']:10,}{variant['bytes'] / 1e9:8.2f}"
        )
    return "\n".join(lines)
