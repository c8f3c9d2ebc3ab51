"""The bound-by line: shares add up, and the part that took most is named."""

from __future__ import annotations

import pytest

from pipeline.shards.bottleneck import StageSeconds, bound_by


@pytest.mark.parametrize(
    ("busy", "workers", "jobs", "part", "advice"),
    [
        (StageSeconds(9, 1, 1, 1, 1), 2, 100, "read", "source's disk"),
        (StageSeconds(1, 1, 1, 1, 9), 2, 100, "write", "destination's disk"),
        (StageSeconds(1, 5, 2, 2, 1), 2, 100, "decode", "2 of 4 cores worked: --workers 4"),
        (StageSeconds(1, 2, 5, 2, 1), 4, 100, "resize", "all 4 cores"),
        (StageSeconds(1, 2, 2, 5, 1), 4, 100, "encode", "--engine"),
        (StageSeconds(0, 1, 1, 1, 0), 2, 3, "idle", "3 shards do not fill 2 workers"),
        (StageSeconds(0, 1, 1, 1, 0), 2, 100, "idle", "fewer --workers"),
    ],
)
def test_the_largest_part_is_named_with_what_would_help(
    busy: StageSeconds, workers: int, jobs: int, part: str, advice: str
):
    found = bound_by(
        busy,
        wall_s=max(10.0, busy.total_s() / workers) if part == "idle" else busy.total_s() / workers,
        workers=workers,
        cores=4,
        jobs=jobs,
    )
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.part == part
    assert advice in found.advice
    assert str(found).startswith(f"bound by {part}: read ")


def test_busy_adds_up():
    total = sum([StageSeconds(1, 2, 3, 4, 5), StageSeconds(1, 1, 1, 1, 1)], StageSeconds())
    assert total == StageSeconds(2, 3, 4, 5, 6)
    assert total.total_s() == 20
