"""The step as a CUDA graph, proven on the CPU: it never needs data on the host, and a replay is the step itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from model.alexnet import AlexNet
from model.checkpoint import TrainState
from model.cuda_graph import WARM_UP_STEPS, CudaGraph, GraphedStep
from model.dropout import DropoutDraws, empty_keys
from model.optim import Momentum2012, set_learning_rates
from model.parallel.half_batches import PairBatch
from model.recipe import SOURCE2012, LayerLearningRates, learning_rates
from model.shapes import NetSpec
from model.train_step import train_step
from model.trainer import LoopSettings, Trainer
from tests.model.test_trainer import Recorder, batches
from tests.support.launches import META, Launches

SPEC = NetSpec(classes=5, width=0.05)
Work = Callable[[], None]


class SimulatedGraph:
    """A graph on the CPU: what was recorded runs again on the same memory. It keeps the order of calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.recorded: Work | None = None

    def run(self, work: Work) -> None:
        """Runs the work."""
        self.calls.append("run")
        work()

    def record(self, work: Work) -> None:
        """Keeps the work and does not run it."""
        self.calls.append("record")
        self.recorded = work

    def replay(self) -> None:
        """Runs the work that was kept."""
        self.calls.append("replay")
        assert self.recorded is not None
        self.recorded()


def network(device: torch.device | str = "cpu") -> tuple[AlexNet, Momentum2012]:
    model = AlexNet(SPEC, seed=3).to(device)
    return model, Momentum2012(model.named_parameters(), SOURCE2012, learning_rates(SOURCE2012, 0, 91))


def keyed(draws: DropoutDraws) -> DropoutDraws:
    """The same step, with masks from keys, as on a GPU."""
    keys = empty_keys(SOURCE2012, torch.device("cpu"))
    draws.fill_keys(keys)
    return replace(draws, keys=keys)


def test_replays_are_the_steps_without_a_graph():
    """Bit for bit: losses and weights over changes of the learning rates, one of which freezes a layer. Each change is
    recorded once; every step has its own images, labels and masks."""
    model, optimizer = network()
    twin, its_optimizer = network()
    graph = SimulatedGraph()
    step = GraphedStep(model, optimizer, "float32", graph)
    start, later = learning_rates(SOURCE2012, 0, 91), learning_rates(SOURCE2012, 30, 91)
    schedule = [start] * 5 + [later] * 2 + [start] + [start | {"conv1": LayerLearningRates(0.0, 0.0)}]
    losses = []
    for number, batch in enumerate(islice(batches(), 9)):
        for each in (optimizer, its_optimizer):
            set_learning_rates(each, schedule[number])
        draws = DropoutDraws(9, number)
        losses.append((step(batch, draws), train_step(twin, its_optimizer, batch, keyed(draws))))
    assert graph.calls[:WARM_UP_STEPS] == ["run"] * WARM_UP_STEPS
    again = ["record", "replay"]
    assert graph.calls[WARM_UP_STEPS:] == [*again, "replay", *again, "replay", *again, *again]
    for found, expected in losses:  # compared at the end: results of earlier steps must not be overwritten
        assert torch.equal(torch.stack(found), torch.stack(expected))
    assert len({float(found[0]) for found, _ in losses}) == len(losses)
    for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_replays_on_a_gpu_are_the_steps_without_a_graph():
    """In float64, with a change of the learning rates."""
    nets = [network("cuda"), network("cuda")]
    for model, _ in nets:
        model.double()
    (model, optimizer), (twin, its_optimizer) = (
        (model, Momentum2012(model.named_parameters(), SOURCE2012, learning_rates(SOURCE2012, 0, 91)))
        for model, _ in nets
    )
    step = GraphedStep(model, optimizer, "float32", CudaGraph())
    for number, batch in enumerate(islice(batches(), 8)):
        on_gpu = replace(batch, images=batch.images.double().cuda(), labels=batch.labels.cuda())
        for each in (optimizer, its_optimizer):
            set_learning_rates(each, learning_rates(SOURCE2012, 30 * (number > 5), 91))
        draws = DropoutDraws(9, number)
        found, expected = step(on_gpu, draws), train_step(twin, its_optimizer, on_gpu, draws)
        torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-5, atol=0)


def test_a_batch_of_another_shape_is_an_error():
    step = GraphedStep(*network(), "float32", SimulatedGraph())
    first = next(batches())
    step(first, DropoutDraws(9, 0))
    with pytest.raises(AssertionError, match="one shape"):
        step(replace(first, images=first.images[:2], labels=first.labels[:2]), DropoutDraws(9, 1))


def meta_batch(rows: int) -> PairBatch:
    images = torch.empty(rows, 3, 224, 224, device=META)
    return PairBatch(images, torch.empty(rows, dtype=torch.int64, device=META), 0, 0)


def test_a_step_does_not_make_the_host_wait():
    """Neither the step nor what a graph does around it reads a number, counts nonzero elements, or copies to or from
    the CPU: the tensors have no data, so any of these is an error. A step has at most 125 launches."""
    model, optimizer = network(META)
    with Launches() as launches:
        train_step(model, optimizer, meta_batch(8), DropoutDraws(0, 0))
    assert launches.count <= 125, launches.operators
    step = GraphedStep(*network(META), "float32", SimulatedGraph())
    with Launches():
        for number in range(WARM_UP_STEPS + 2):
            step(meta_batch(8), DropoutDraws(9, number))
    for reads in (lambda x: x.item(), lambda x: x.nonzero(), lambda x: x.cpu()):  # the instrument itself
        with pytest.raises((RuntimeError, NotImplementedError)):
            reads(torch.empty(1, device=META))


def test_the_loop_takes_graphed_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With `cuda_graph` the loop, and whoever asks the trainer for a step, replays; otherwise nothing is recorded."""
    graph = SimulatedGraph()
    monkeypatch.setattr("model.trainer.CudaGraph", lambda: graph)
    settings = LoopSettings(4, 3, seed=9, log_every=1, max_optimizer_steps=5)
    for cuda_graph in (False, True):
        trainer = Trainer(*network(), replace(settings, cuda_graph=cuda_graph), TrainState.start())
        assert not graph.calls
        recorder = Recorder(tmp_path / str(cuda_graph))
        assert trainer.fit(batches(), recorder.hooks(trainer))
        assert len({line["loss"] for line in recorder.lines}) == 5
    assert graph.calls == [*["run"] * WARM_UP_STEPS, "record", "replay", "replay"]
    trainer.compute(next(batches()), DropoutDraws(0, 0))
    assert graph.calls[-2:] == ["replay", "replay"]
