"""The trainer that a stall report measures, as the commands build it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from model.trainer import Trainer
from tools.shared.stall_report import trainer_under_test


@pytest.mark.parametrize(("device", "asynchronous"), [("cpu", False), ("cuda", True)])
def test_only_a_gpu_is_asynchronous(device: str, asynchronous: bool):
    """On a GPU a step returns once it is launched, so waits are judged against the device's queue."""
    trainer = SimpleNamespace(ranks=SimpleNamespace(place=None, device=torch.device(device)))
    assert trainer_under_test(cast(Trainer, trainer), 8).asynchronous is asynchronous
