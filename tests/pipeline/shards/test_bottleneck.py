"""The bottleneck of a sharding run: shares add up to 1, and the part that took most time is named."""

from __future__ import annotations

import pytest

from pipeline.shards.bottleneck import StageSeconds, find_bottleneck


@pytest.mark.parametrize(
    ("spent", "workers", "jobs", "part", "advice"),
    [
        (StageSeconds(9, 1, 1, 1, 1), 2, 100, "read", "source's disk"),
        (StageSeconds(1, 1, 1, 1, 9), 2, 100, "write", "destination's disk"),
        (StageSeconds(1, 5, 2, 2, 1), 2, 100, "decode", "2 of 4 cores were used: --workers 4"),
        (StageSeconds(1, 2, 5, 2, 1), 4, 100, "resize", "all 4 cores"),
        (StageSeconds(1, 2, 2, 5, 1), 4, 100, "encode", "--engine"),
        (StageSeconds(0, 1, 1, 1, 0), 2, 3, "idle", "3 shards are too few to keep 2 workers busy"),
        (StageSeconds(0, 1, 1, 1, 0), 2, 100, "idle", "fewer --workers"),
    ],
)
def test_the_largest_part_is_named_with_advice(spent: StageSeconds, workers: int, jobs: int, part: str, advice: str):
    found = find_bottleneck(
        spent,
        wall_s=max(10.0, spent.total_s() / workers) if part == "idle" else spent.total_s() / workers,
        workers=workers,
        cores=4,
        jobs=jobs,
    )
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.part == part
    assert advice in found.advice
    assert str(found).startswith(f"bound by {part}: read ")


def test_stage_seconds_add_up():
    total = sum([StageSeconds(1, 2, 3, 4, 5), StageSeconds(1, 1, 1, 1, 1)], StageSeconds())
    assert total == StageSeconds(2, 3, 4, 5, 6)
    assert total.total_s() == 20
