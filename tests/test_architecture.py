"""The arrows between rooms: tools use pipeline and model; those two never meet, and neither knows the tools."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = {path.stem for path in (ROOT / "tools").glob("*.py")}
FORBIDDEN = {"pipeline": {"model", "tools", *TOOLS}, "model": {"pipeline", "tools", *TOOLS}}

# What a room may use beside the standard library and its own package.
MAY_USE = {
    "pipeline/philox.py": {"numpy"},
    "pipeline/page_cache.py": {"numpy"},
    "pipeline/order.py": {"numpy"},
    "pipeline/augment.py": {"numpy"},
    "pipeline/reference.py": {"numpy", "PIL"},
    "pipeline/shards.py": {"numpy"},
    "pipeline/bound_by.py": set(),
    "pipeline/causes.py": set(),
    "pipeline/cpu_groups.py": {"psutil"},
    "pipeline/doctor.py": set(),
    "pipeline/findings.py": set(),
    "pipeline/intervals.py": {"numpy", "scipy"},
    "pipeline/predict.py": set(),
    "pipeline/report_charts.py": set(),
    "pipeline/report_html.py": set(),
    "pipeline/report_picture.py": set(),
    "pipeline/stored_shape.py": {"numpy"},
    "pipeline/tuning.py": set(),
    "pipeline/file_layouts.py": set(),
    "pipeline/labels.py": {"numpy"},
    "pipeline/listing.py": {"numpy"},
    "pipeline/parquet_layout.py": {"pyarrow"},
    "pipeline/resize.py": {"numpy", "PIL", "simplejpeg", "torch"},
    "pipeline/sources.py": set(),
    "pipeline/tar_layouts.py": {"scipy"},
    "pipeline/workers.py": {"distributed"},
    "pipeline/eigenbasis.py": {"numpy", "PIL"},
    "pipeline/stall.py": {"numpy", "psutil"},
    "model/recipe.py": set(),
    "model/batch.py": {"torch"},
    "model/alexnet.py": {"torch"},
    "model/optim.py": {"torch"},
    "model/ranks.py": {"torch"},
    "model/device_clock.py": {"torch"},
    "model/step_profile.py": {"torch"},
    "model/exchange.py": {"torch"},
    "model/watch.py": {"torch"},
    "model/checkpoint.py": {"torch", "safetensors"},
    "model/trainer.py": {"torch"},
}


def imported(path: Path) -> set[str]:
    """Top-level names of all modules that a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(str(node.module).partition(".")[0])
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_pipeline_and_model_never_meet(package: str):
    for path in (ROOT / package).glob("*.py"):
        assert not imported(path) & FORBIDDEN[package], path


@pytest.mark.parametrize("name", MAY_USE)
def test_a_room_uses_what_it_may(name: str):
    used = imported(ROOT / name) - set(sys.stdlib_module_names) - {name.partition("/")[0]}
    assert used <= MAY_USE[name]


def test_maths_names_no_device():
    """Placement is not the network's business: both towers run wherever their tensors are."""
    for name in ("alexnet", "optim"):
        text = (ROOT / "model" / f"{name}.py").read_text()
        assert "cuda" not in text.replace("cuda-convnet", "")
