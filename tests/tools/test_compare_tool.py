"""tools/compare.py on the report of a real run, and trace.json of that run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.diagnosis.accounting import INPUT_PARTS
from tests.support.tool_runs import printed, tool


def test_a_run_is_compared_with_a_slower_one(end_to_end: Path, tmp_path: Path):
    run, record = end_to_end / "a", tmp_path / "c.json"
    out = printed(tool("compare", run, run / "stall.json", "--json", record))
    assert "no regression" in out and json.loads(record.read_text())["regressions"] == []
    before: dict[str, Any] = json.loads((run / "stall.json").read_text())
    assert len(before["rounds_img_s"]["supply"]) == 5
    before["rounds_img_s"]["supply"] = [99.0, 100.0, 101.0]  # those of a busy machine may explain any decline
    (tmp_path / "before.json").write_text(json.dumps(before))
    slower = json.loads(json.dumps(before))
    slower["supply"] *= 0.3
    slower["environment"]["settings"]["threads"] += 1
    (tmp_path / "slower.json").write_text(json.dumps(slower))
    out = printed(
        tool("compare", tmp_path / "before.json", tmp_path / "slower.json", "--tolerance", 0.5, "--json", record),
        code=1,
    )
    assert "supply -70.0%" in out and "environment.settings.threads" in out
    found = json.loads(record.read_text())
    assert found["regressions"] == ["supply"]
    assert found["figures"]["supply"]["low"] < -0.7 < found["figures"]["supply"]["high"] < 0
    assert "versions" in json.loads((run / "stall.json").read_text())["environment"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not found; expected the folder of a run"),
        ("{", "no JSON"),
        ("[1]", "not a stall report"),
        ("", "no stall.json in this folder; train.py --resume"),  # a folder
    ],
)
def test_wrong_input_gets_one_line(end_to_end: Path, tmp_path: Path, content: str | None, message: str):
    other = tmp_path / "other"
    if content:
        other.write_text(content)
    elif content is not None:
        other.mkdir()
    done = tool("compare", end_to_end / "a", other)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert str(other) in done.stderr


@pytest.mark.parametrize("tolerance", ["1", "-0.1", "nan"])
def test_a_tolerance_is_a_share(end_to_end: Path, tolerance: str):
    done = tool("compare", end_to_end / "a", end_to_end / "a", "--tolerance", tolerance)
    assert done.returncode == 2 and "--tolerance" in done.stderr


def test_the_run_has_a_trace_of_its_steps(end_to_end: Path):
    events = json.loads((end_to_end / "a" / "trace.json").read_text())["traceEvents"]
    assert [one["args"]["step"] for one in events if one["name"] == "step"] == list(range(1, 11))
    assert "end of the epoch: validation, checkpoints" in {one["name"] for one in events}
    stages = {one["name"] for one in events if one["pid"] == 2 and one["ph"] == "X"}
    assert stages and stages <= set(INPUT_PARTS)
    assert {"a"} == {one["args"]["name"] for one in events if one["name"] == "process_name" and one["pid"] == 1}
