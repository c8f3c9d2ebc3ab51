"""The model card of a run agrees with its metrics, its code runs, and a failure to write it stops nothing."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from pipeline.shards.reader import open_shards
from tests.support.shard_fixtures import drawn_jpeg
from tests.support.tool_runs import TINY, losses, metrics, printed, tool
from tools.shared import model_card


def test_the_card_has_the_scores_and_the_data_of_the_run(end_to_end: Path):
    text = (end_to_end / "a" / "model-card.md").read_text()
    last = metrics(end_to_end / "a")[-1]
    scores = f"{last['val_top1']:.2%} | {last['val_top5']:.2%} | {last['val_loss']:.4f}"
    (row,) = [line for line in text.splitlines() if f"step-{last['step']:09d} (last" in line]
    assert row.endswith(f" | {scores} |")
    rows = [line for line in text.splitlines() if line.startswith("| step-")]
    assert len(rows) == (1 if "last and best" in row else 2) and "best)" in rows[-1]
    for split in ("train", "val"):
        assert open_shards(end_to_end / "shards" / split).manifest_sha256 in text
    assert "source2012" in text and "10 of 10 optimizer steps" in text and "quality 90" in text


def test_the_code_in_the_card_runs(
    end_to_end: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    code = re.search(r"```python\n(.*?)```", (end_to_end / "a" / "model-card.md").read_text(), re.DOTALL)
    assert code is not None
    (tmp_path / "photo.jpg").write_bytes(drawn_jpeg(1, 300, 400))
    monkeypatch.chdir(tmp_path)
    exec(compile(code[1], "card", "exec"), {})
    assert "probability=" in capsys.readouterr().out


def test_a_card_that_cannot_be_written_gives_one_warning(
    end_to_end: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The run continues to the same losses. Without a validation set the card says so."""

    def fail(*_: object) -> str:
        raise RuntimeError("no text")

    args = [end_to_end / "shards" / "train", "--runs", tmp_path, "--epochs", 2, *TINY, "--stall-seconds", 0]
    with monkeypatch.context() as patched:
        patched.setattr(model_card, "card", fail)
        done = tool("train", *args, "--run-name", "failing")
    printed(done)
    assert done.stderr.count("model-card.md: could not be written (no text); training continues") == 1
    assert losses(tmp_path / "failing") == losses(end_to_end / "a")
    shutil.rmtree(tmp_path / "failing" / "checkpoints" / "step-000000010")
    printed(tool("train", *args, "--run-name", "failing", "--resume"))
    assert "the run has no validation set" in (tmp_path / "failing" / "model-card.md").read_text()
