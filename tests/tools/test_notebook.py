"""The notebook docs/alexnet.py runs from its first to its last cell, and docs/alexnet.ipynb has the same cells."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT, NOTEBOOK = ROOT / "docs" / "alexnet.py", ROOT / "docs" / "alexnet.ipynb"

# Makes the notebook small enough for a test. Each pattern must match once.
SMALLER = {
    r"^DATA = .*$": "DATA = Path('data')",
    r"^STEPS = .*$": "STEPS = 2",
    r'"0\.125", "--batch", "64"': '"0.05", "--batch", "8", "--log-every", "1"',
    r"LoaderSettings\(batch=64, threads=1\)": "LoaderSettings(batch=8, threads=1)",
    r"window_s=0\.3": "window_s=0.05",
    r"np\.arange\(1000\)": "np.arange(100)",
}
PNG = b"\x89PNG"


def cells(script: str) -> list[tuple[str, str]]:
    """(kind, text) of each cell of a script in jupytext's percent format."""
    _, *parts = re.split(r"^# %%(.*)$", script, flags=re.MULTILINE)
    found = []
    for head, body in zip(parts[::2], parts[1::2], strict=True):
        if "[markdown]" in head:
            text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines())
            found.append(("markdown", text))
        else:
            found.append(("code", body.strip()))
    return found


@pytest.mark.slow
def test_the_notebook_runs(
    end_to_end: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """All cells, at a small size; every figure is a PNG."""
    source = SCRIPT.read_text()
    for pattern, smaller in SMALLER.items():
        source, count = re.subn(pattern, smaller, source, flags=re.MULTILINE)
        assert count == 1, pattern
    (tmp_path / "data").symlink_to(end_to_end / "shards")
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    (tmp_path / "alexnet.py").write_text(source)
    shown: list[bytes] = []
    ipython, screen = ModuleType("IPython"), ModuleType("IPython.display")
    vars(ipython).update(version_info=(9, 0, 0), get_ipython=lambda: None)
    vars(screen).update(Image=lambda data: data, display=shown.append)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", screen)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    runpy.run_path("alexnet.py")
    out = capsys.readouterr().out
    assert len(shown) == 3 and all(png.startswith(PNG) for png in shown)
    assert "60,965,224 parameters" in out and "verdict" in out
    assert "conv2 of tower 0: the same\nconv3 of tower 0: changed" in out


def test_the_notebook_file_has_the_cells_of_the_script():
    """`make notebook` writes it. Outputs are not compared."""
    stored = json.loads(NOTEBOOK.read_text())["cells"]
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in stored] == cells(SCRIPT.read_text())
    assert any(cell.get("outputs") for cell in stored), "run `make notebook`"
