"""The trainer that a stall report measures, as the commands build it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from model.batch import Batch
from model.dropout import DropoutDraws
from model.parallel.mesh import Place
from model.trainer import Trainer
from tools.shared.stall_report import trainer_under_test


@pytest.mark.parametrize(("device", "asynchronous"), [("cpu", False), ("cuda", True)])
def test_only_a_gpu_is_asynchronous(device: str, asynchronous: bool):
    """On a GPU a step returns once it is launched, so waits are judged against the device's queue."""
    trainer = SimpleNamespace(ranks=SimpleNamespace(place=None, device=torch.device(device)))
    assert trainer_under_test(cast(Trainer, trainer), 8).asynchronous is asynchronous


def test_measured_steps_are_those_of_the_loop():
    """So a report on a run with a CUDA graph measures replays. Each step has masks of its own."""
    taken: list[tuple[object, DropoutDraws]] = []

    def compute(rows: Batch, draws: DropoutDraws) -> tuple[torch.Tensor, torch.Tensor]:
        taken.append((rows, draws))
        return torch.zeros(()), torch.zeros(())

    ranks = SimpleNamespace(place=Place(), device=torch.device("cpu"))
    subject = trainer_under_test(cast(Trainer, SimpleNamespace(ranks=ranks, compute=compute)), 8)
    rows = cast(Batch, object())
    subject.step(rows)
    subject.step(rows)
    assert taken == [(rows, DropoutDraws(0, step, 0, 8)) for step in (0, 1)]
