"""On a machine without DALI, `--loader webdataset` trains, and `--loader dali` says what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from pipeline import rgb_pca
from pipeline.loader import settings
from tests.support.shard_fixtures import basis_of, sample, write_set
from tests.support.tool_runs import ENVIRONMENT, ROOT, TINY, losses, metrics, printed, tool
from tools.shared import provenance

WITHOUT_DALI = """
import runpy, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "nvidia":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def without_dali(tool: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_DALI, ROOT / "tools" / f"{tool}.py", *args]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=ENVIRONMENT, timeout=300)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    basis = basis_of(write_set(folder, [sample(n) for n in range(17)]))
    rgb_pca.save(basis, rgb_pca.eigenbasis_path(folder))
    return folder


def test_it_trains_validates_and_reports(shards: Path, tmp_path: Path):
    """A whole run; the losses are those with DALI, within what decoders round differently."""
    args = [shards, "--val", shards, "--runs", tmp_path, "--epochs", 1, *TINY]
    done = without_dali("train", *args, "--run-name", "without", "--loader", "webdataset")
    assert done.returncode == 0, done.stderr
    assert "worker processes (webdataset, Pillow)" in done.stdout
    config = json.loads((tmp_path / "without" / "config.json").read_text())
    assert config["must_match"]["decoding"] == {"hw_decoder_load": 0.0, "library": "webdataset"}
    assert (tmp_path / "without" / "stall.json").is_file(), done.stderr
    printed(tool("train", *args, "--run-name", "with", "--stall-seconds", 0))
    for (step, loss), (other_step, other_loss) in zip(
        losses(tmp_path / "without"), losses(tmp_path / "with"), strict=True
    ):
        assert step == other_step and loss == pytest.approx(other_loss, rel=1e-3)
    (checkpoint,) = (tmp_path / "without" / "checkpoints").iterdir()
    printed(tool("evaluate", shards, checkpoint, "--loader", "webdataset", "--json", tmp_path / "scores.json"))
    (scores,) = json.loads((tmp_path / "scores.json").read_text())["checkpoints"].values()
    assert scores["loss"] == pytest.approx(metrics(tmp_path / "without")[-1]["val_loss"], rel=1e-6)
    refused = tool("train", *args, "--run-name", "with", "--loader", "webdataset", "--resume")
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert "library (default), now 'webdataset'" in line and "--accept-decoder-change" in line


def test_dali_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--loader dali: nvidia.dali is not installed.*use --loader webdataset"):
        settings.check_library("dali")


def test_versions_leave_out_what_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    def version(name: str) -> str:
        if "dali" in name:
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(provenance, "version", version)
    assert provenance.library_versions() == {"torch": "1", "numpy": "1", "pillow": "1"}
