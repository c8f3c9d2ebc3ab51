"""The import rules of docs/architecture.md and the size limits of CONTRIBUTING.md, held for every source file.

Every import statement of a file counts, also one inside a function. Rules are found by path: a module takes the rule
with the longest matching path, so a new module in a known package has a rule, and a new package needs one.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("pipeline", "model", "tools")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 350, 50

# For each part: the other parts of this project that it may import. A part always may import itself.
BASE = {"pipeline/compiled", "pipeline/files", "pipeline/host", "pipeline/workers", "pipeline/philox"}
IMAGENET = BASE | {"pipeline/imagenet"}
SHARDS = IMAGENET | {"pipeline/shards"}
RGB_PCA = SHARDS | {"pipeline/rgb_pca"}
LOADER = RGB_PCA | {"pipeline/loader"}
PROFILING = LOADER | {"pipeline/profiling"}
DIAGNOSIS = PROFILING | {"pipeline/diagnosis"}
MAY_IMPORT: dict[str, set[str]] = {
    "pipeline/__init__": set(),
    "pipeline/compiled": set(),
    "pipeline/files": set(),
    "pipeline/host": set(),
    "pipeline/workers": set(),
    "pipeline/philox": set(),
    "pipeline/imagenet": IMAGENET,
    "pipeline/synthetic": IMAGENET,
    "pipeline/shards": SHARDS,
    "pipeline/rgb_pca": RGB_PCA,
    "pipeline/loader": LOADER,
    "pipeline/profiling": PROFILING,
    "pipeline/diagnosis": DIAGNOSIS,
    "model": {"model"},
    "tools": {"pipeline", "model", "tools"},
    "tools/shared": {"pipeline", "model", "tools/shared"},
}

# For each part: the third-party packages that it may import.
MAY_USE: dict[str, set[str]] = {
    "pipeline/__init__": set(),
    "pipeline/compiled": {"numba"},
    "pipeline/files": set(),
    "pipeline/host": set(),
    "pipeline/philox": {"numpy"},
    "pipeline/workers": {"distributed"},
    "pipeline/imagenet": {"numpy"},
    "pipeline/imagenet/devkit": {"scipy"},
    "pipeline/imagenet/entries": {"PIL"},
    "pipeline/imagenet/parquet": {"pyarrow"},
    "pipeline/imagenet/parquet_columns": {"pyarrow"},
    "pipeline/synthetic": {"numpy", "PIL", "scipy"},
    "pipeline/shards": {"numpy"},
    "pipeline/shards/job": {"numpy", "torch"},
    "pipeline/shards/transcode": {"numpy", "PIL", "simplejpeg", "torch"},
    "pipeline/shards/verify": {"numpy", "PIL"},
    "pipeline/rgb_pca": {"numba", "numpy", "simplejpeg"},
    "pipeline/loader": {"numpy"},
    "pipeline/loader/bad_samples": {"numpy", "PIL"},
    "pipeline/loader/cpu_kernel": {"numba", "numpy", "nvidia"},
    "pipeline/loader/jpeg_headers": {"numba", "numpy"},
    "pipeline/loader/graphs": {"nvidia"},
    "pipeline/loader/inputs": {"numpy", "nvidia", "torch"},
    "pipeline/loader/loader": {"torch"},
    "pipeline/loader/batch": {"torch"},
    "pipeline/loader/dali_batches": {"numpy", "torch"},
    "pipeline/loader/webdataset_batches": {"numpy", "PIL", "torch", "webdataset"},
    "pipeline/loader/normalise": {"numpy", "torch"},
    "pipeline/loader/reference": {"numpy", "PIL"},
    "pipeline/loader/runner": {"torch"},
    "pipeline/loader/settings": {"torch"},
    "pipeline/profiling": {"numpy"},
    "pipeline/profiling/any_loader": {"psutil"},
    "pipeline/profiling/confidence": {"numpy", "scipy"},
    "pipeline/profiling/cpu_time": {"psutil"},
    "pipeline/profiling/difference": {"scipy"},
    "pipeline/profiling/machine": {"psutil"},
    "pipeline/profiling/throughput": {"numpy", "psutil"},
    "pipeline/diagnosis": set(),
    "pipeline/diagnosis/run_account": {"numpy"},
    "pipeline/diagnosis/stored_shape": {"numpy"},
    "model": {"torch"},
    "model/recipe": set(),
    "model/runs": set(),
    "model/run_lock": set(),
    "model/changes": set(),
    "model/checkpoint": {"safetensors", "torch"},
    "model/transfer": {"safetensors", "torch"},
    "model/lrn_triton": {"torch", "triton"},
    "tools": {"numpy", "psutil", "torch"},
    "tools/bench_baselines": {"numpy", "simplejpeg", "spdl", "torch", "webdataset"},
    "tools/bench_resize": {"numpy", "PIL", "simplejpeg", "skimage", "torch"},
    "tools/shared": {"numpy", "psutil", "torch", "tqdm"},
    "tools/shared/figures": {"matplotlib", "numpy", "PIL", "torch"},
    "tools/shared/confusion_figure": {"numpy", "PIL", "scipy"},
    "tools/shared/chance": set(),
    "tools/shared/learning_curves": set(),
    "tools/shared/learning_rows": set(),
    "tools/shared/baselines": {"numpy", "simplejpeg", "spdl", "torch", "webdataset"},
    "tools/shared/pca_benchmark": {"numpy", "PIL", "simplejpeg"},
    "tools/shared/pillow_loop": {"PIL"},
    "tools/shared/prometheus": {"numpy", "prometheus_client"},
    "tools/shared/resize_benchmark": {"numpy", "PIL", "simplejpeg", "skimage", "torch"},
}


def files(*folders: str) -> list[Path]:
    """Every Python file below `folders`, however deep."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    """A module as the rules spell it: pipeline/loader/order. A package's own __init__ goes by the package."""
    name = str(path.relative_to(ROOT).with_suffix(""))
    return name if name == "pipeline/__init__" else name.removesuffix("/__init__")


def rule_of(name: str, rules: dict[str, set[str]]) -> str | None:
    """The longest path in `rules` that is `name` or a folder above it; None if there is none."""
    parts = name.split("/")
    return next((path for n in range(len(parts), 0, -1) if (path := "/".join(parts[:n])) in rules), None)


def within(name: str, folders: set[str]) -> bool:
    """Whether a module is one of `folders` or lies below one."""
    return any(name == folder or name.startswith(f"{folder}/") for folder in folders)


def exists(dotted: str) -> bool:
    path = ROOT / dotted.replace(".", "/")
    return path.with_suffix(".py").is_file() or path.is_dir()


@cache
def imports(path: Path) -> frozenset[str]:
    """Dotted names of all modules that a file imports, wherever in the file; `from a import b` gives a.b if that is
    one of this project's modules."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            module = str(node.module)
            own = {f"{module}.{alias.name}" for alias in node.names if module.split(".")[0] in PACKAGES}
            found = {dotted for dotted in own if exists(dotted)}
            names |= found
            if len(found) < len(node.names):
                names.add(module)
    return frozenset(names)


def own_imports(path: Path) -> set[str]:
    """The project's modules that a file imports, as the rules spell them."""
    return {dotted.replace(".", "/") for dotted in imports(path) if dotted.split(".")[0] in (*PACKAGES, "tests")}


def test_every_module_has_a_rule():
    """A new package, or a new module beside the packages of pipeline/, needs an entry in both tables above."""
    names = [name_of(path) for path in files(*PACKAGES)]
    without = [name for name in names if rule_of(name, MAY_IMPORT) is None or rule_of(name, MAY_USE) is None]
    assert not without
    assert rule_of("pipeline/new_module", MAY_IMPORT) is None  # the instrument: pipeline/ itself has no rule to inherit


@pytest.mark.parametrize("rules", [MAY_IMPORT, MAY_USE], ids=["MAY_IMPORT", "MAY_USE"])
def test_every_rule_has_a_module(rules: dict[str, set[str]]):
    names = {name_of(path) for path in files(*PACKAGES)}
    assert not [rule for rule in rules if not any(within(name, {rule}) for name in names)]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_follow_the_data_flow(package: str):
    """No module imports a part that is downstream of it; pipeline and model never meet; neither imports tools."""
    wrong = []
    for path in files(package):
        rule = rule_of(name_of(path), MAY_IMPORT)
        assert rule is not None, path
        allowed = MAY_IMPORT[rule] | {rule}
        wrong += [f"{name_of(path)} -> {used}" for used in own_imports(path) if not within(used, allowed)]
    assert not wrong


@pytest.mark.parametrize("package", PACKAGES)
def test_third_party_packages_are_used_where_the_table_allows_them(package: str):
    wrong = []
    for path in files(package):
        rule = rule_of(name_of(path), MAY_USE)
        assert rule is not None, path
        used = {dotted.split(".")[0] for dotted in imports(path)} - set(sys.stdlib_module_names) - {*PACKAGES, "tests"}
        wrong += [f"{name_of(path)} -> {package}" for package in sorted(used - MAY_USE[rule])]
    assert not wrong


def test_no_modules_import_each_other_in_a_circle():
    graph = {name_of(path): own_imports(path) - {name_of(path)} for path in files(*PACKAGES)}
    tuple(TopologicalSorter(graph).static_order())


def test_the_rules_see_imports_inside_functions(tmp_path: Path):
    """The instrument itself: all three forms of import are found, at any depth."""
    source = "import torch.nn\n\ndef f():\n    from pipeline import rgb_pca\n    from model.optim import Momentum2012\n"
    (tmp_path / "a.py").write_text(source)
    assert imports(tmp_path / "a.py") == {"torch.nn", "pipeline.rgb_pca", "model.optim"}


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Each function of a file as `file:line name`, with its number of lines."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("folder", [*PACKAGES, "tests"])
def test_files_are_short(folder: str):
    sizes = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files(folder)}
    assert not {name: lines for name, lines in sizes.items() if lines >= MAX_FILE_LINES}


@pytest.mark.parametrize("package", PACKAGES)
def test_functions_fit_a_screen(package: str):
    sizes = dict(pair for path in files(package) for pair in functions(path))
    assert not {name: lines for name, lines in sizes.items() if lines >= MAX_FUNCTION_LINES}


@pytest.mark.parametrize("name", ["alexnet", "dropout", "optim", "response_norm", "shapes"])
def test_maths_names_no_device(name: str):
    """The network's maths runs on whatever device its tensors are on; where that is, is decided elsewhere."""
    assert "cuda" not in (ROOT / "model" / f"{name}.py").read_text().replace("cuda-convnet", "")
