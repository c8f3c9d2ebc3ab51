"""A sample that the loader's decoder accepts and the CPU decoder refuses, or the other way round, is replaced."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.loader import inputs
from pipeline.loader.graphs import GraphSettings
from pipeline.loader.inputs import TrainPlanner
from pipeline.loader.settings import LoaderSettings


@pytest.mark.parametrize(("refusing", "decodes"), [({"cpu"}, False), ({"cuda"}, False), (set(), True)])
def test_both_decoders_judge_a_sample(refusing: set[str], decodes: bool, monkeypatch: pytest.MonkeyPatch):
    own = GraphSettings(batch=1, device="cuda", device_id=0, threads=1, queue_depth=1, hw_decoder_load=0.0)
    monkeypatch.setattr(inputs, "graph_settings", lambda *_: own)
    for name in ("_batch", "_with_images"):
        monkeypatch.setattr(TrainPlanner, name, lambda *_, **__: None)

    def runs(planner: TrainPlanner, batch: Any, settings: GraphSettings) -> bool:
        assert settings.device_id == (None if settings.device == "cpu" else 0)
        return settings.device not in refusing

    monkeypatch.setattr(TrainPlanner, "_runs", runs)
    planner = object.__new__(TrainPlanner)
    planner._settings, planner._shards = LoaderSettings(), None  # type: ignore[assignment]
    assert planner._decodes(0, 0) is decodes
