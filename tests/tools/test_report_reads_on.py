"""The report of a run reads what the run would have read next: first the windows, then the stages, nothing twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.checkpoint import TrainState
from model.parallel.ranks import SINGLE_RANK
from model.trainer import LoopSettings, Trainer
from pipeline.loader.settings import LoaderSettings
from pipeline.profiling.clocks import StepClocks
from pipeline.shards.reader import ShardSet
from tests.support.rank_jobs import make
from tests.support.shard_fixtures import basis_of, sample, write_set
from tools.shared import stall_report
from tools.shared.stall_report import Trained, measure_run

BATCH, STEPS = 2, 200
AT = (3, 120)  # epoch and step at which the run has stopped


def test_windows_go_on_where_the_run_stopped_and_stages_where_they_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shards = write_set(tmp_path, [sample(number) for number in range(7)])
    basis, shards = basis_of(shards), shards.part(np.arange(BATCH * STEPS) % 7)
    model, optimizer, towers = make(SINGLE_RANK)
    state = TrainState.start()
    state.epoch, state.step = AT
    trainer = Trainer(model, optimizer, LoopSettings(8, STEPS, 0), state, towers)
    settings = LoaderSettings(batch=BATCH, threads=1, queue_depth=1)
    started, read = list[tuple[int, int]](), list[ShardSet]()
    loader, stages = stall_report.TrainLoader, stall_report.measure_stages

    def noted_loader(set_of: ShardSet, basis: Any, how: Any, epoch: int, step: int, *ranks: int) -> Any:
        started.append((epoch, step))
        return loader(set_of, basis, how, epoch, step, *ranks)

    def noted_stages(part: ShardSet, *rest: Any, **options: Any) -> Any:
        read.append(part)
        return stages(part, *rest, **options)

    monkeypatch.setattr(stall_report, "TrainLoader", noted_loader)
    monkeypatch.setattr(stall_report, "measure_stages", noted_stages)
    run = Trained(shards, basis, settings, trainer, tmp_path, 0.02, stage_rounds=1, rounds=2)
    found = measure_run(run, StepClocks())
    assert started == [AT]
    rest_of_epoch = len(read[0]) - len(shards)
    assert 0 <= rest_of_epoch < BATCH * (STEPS - AT[1]), "the stages read what the windows have read"
    assert found.storage["windows_cached_share"] is not None and found.run == {}
