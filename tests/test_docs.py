"""The documents compared with the project: commands, Python examples, links, make targets, and the tree of modules.

Every command that README.md, CONTRIBUTING.md and docs/ show has an entry in a table of
tests/support/documented_commands.py. Commands run from a folder that has what the documents assume: shard sets in
data/, made of the test session's small sample.
"""

from __future__ import annotations

import gc
import re
import runpy
import shlex
import shutil
import signal
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from tests.support.checkpoints import save_untrained
from tests.support.documented_commands import EARLIER_NET, ENTRIES, RUN, SAMPLE_NET, SMALL
from tests.support.shard_fixtures import drawn_jpeg

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKING = [*DOCUMENTS, ROOT / "CHANGELOG.md", ROOT / "LOG.md"]
MAX_LINES, MAX_COLUMNS = 150, 120

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:python (?:tools/|-m tests\.)|torchrun |make [a-z]|docker compose )")

# Makes a Python example small.
SMALLER = {r"\bbatch=\d+": "batch=8", r"\bwindow_s=[\d.]+": "window_s=0.05", r"\bnum_workers=1": "num_workers=0"}


def fences(path: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return [block for tag, block in FENCE.findall(path.read_text()) if tag == language]


def commands(path: Path) -> list[str]:
    """Every command of a document without its comment: lines of sh blocks, and code within a sentence or table."""
    found = []
    for block in fences(path, "sh"):
        lines = block.replace("\\\n", " ").splitlines()
        found += [" ".join(line.partition("#")[0].split()) for line in lines]
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", FENCE.sub("", path.read_text()))]
    return [command for command in found if command] + [code for code in inline if COMMAND.match(code)]


def all_commands() -> set[str]:
    return {command for path in DOCUMENTS for command in commands(path)}


def tool_of(command: str) -> str | None:
    """The NAME of tools/NAME.py in a command, if it has one."""
    found = re.search(r"\btools/(\w+)\.py", command)
    return found.group(1) if found else None


def asking(command: str) -> tuple[str, ...] | None:
    """The tool of a command, and the figure that tools/figures.py draws: whose --help lists the options."""
    name = tool_of(command)
    return name and ((name, command.partition(".py ")[2].split()[0]) if name == "figures" else (name,))


def options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))


def call(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs tools/NAME.py in this process, which is faster than a new one; returns its exit code."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


# ---- commands ------------------------------------------------------------------------------------------------------


def test_every_command_has_an_entry():
    """Commands of tools, of tests/soak and of Docker; those of make are compared with the Makefile below."""
    shown = {command for command in all_commands() if tool_of(command) or "tests/soak" in command}
    shown |= {command for command in all_commands() if command.startswith("docker ")}
    missing = sorted(shown - ENTRIES)
    assert not missing, "\n".join(["without an entry in RUN, PARSED or DOCKER:", *missing])


def test_every_entry_is_a_command_of_a_document():
    stale = sorted(ENTRIES - all_commands())
    assert not stale, "\n".join(["in no document:", *stale])


def test_every_option_that_is_shown_exists(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Each tool's --help is asked once; a torchrun command has torchrun's options before the script."""
    torchrun = get_args_parser().format_help()
    asked = dict.fromkeys(filter(None, map(asking, all_commands())), "")
    for words in asked:
        assert call(words[0], [*words[1:], "--help"], monkeypatch) == 0
        asked[words] = capsys.readouterr().out
    for command in all_commands():
        if words := asking(command):
            before, _, after = command.partition(f"tools/{words[0]}.py")
            assert options(before) <= options(torchrun), command
            assert options(after) <= options(asked[words]), command


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {command.split()[1] for command in all_commands() if command.startswith("make ")}
    assert {"train", "test", "help"} <= named <= targets


def test_every_file_in_a_command_exists():
    """Scripts and folders of this project; soak scripts have the options that are shown."""
    for command in all_commands():
        for word in command.split():
            if word.startswith(("tools/", "tests/", "docker/")):
                assert (ROOT / word).exists(), command
        if script := re.search(r"tests/soak/\w+\.py", command):
            assert options(command) <= options((ROOT / script.group()).read_text()), command


@pytest.fixture
def workspace(sample: Path, shard_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with what the documents expect: shard sets, checkpoints of `make train`, a photo."""
    for name in ("imagenet-256", "sample-256", "photos-256"):
        shutil.copytree(shard_root, tmp_path / "data" / name)
    for net in (EARLIER_NET, SAMPLE_NET):
        save_untrained(tmp_path / net, shard_root / "train")
    (tmp_path / "photo.jpg").write_bytes(drawn_jpeg(1, 400, 300))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WIDS_CACHE", str(tmp_path / "wids"))
    return tmp_path


def in_workspace(command: str, sample: Path, workspace: Path) -> list[str]:
    """The arguments of a command here: small, with this sample as ImageNet, and with the checkpoint that there is."""
    words = shlex.split(command.partition(".py ")[2]) + shlex.split(SMALL[tool_of(command) or ""])
    if (checkpoints := workspace / "runs/first/checkpoints").is_dir():
        (last,) = checkpoints.iterdir()
        words = [re.sub(r"^.*/step-\d+$", str(last), word) for word in words]
    return [re.sub("^(/folder/of|/data)/imagenet$", str(sample), word) for word in words]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_the_commands_of_a_document_run(
    path: Path, sample: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """In their order, on the sample. A loader may be too slow for a demand: that is exit code 1."""
    for command in (command for command in commands(path) if command in RUN):
        arguments = in_workspace(command, sample, workspace)
        if re.search(r"make_shards\.py \S+ data/imagenet-256", command):
            shutil.rmtree("data/imagenet-256")  # the command makes it
        code = call(str(tool_of(command)), arguments, monkeypatch)
        assert code in ((0, 1) if "--demand" in arguments else (0,)), command + "\n" + capsys.readouterr().err


# every Python block of the documents, except those that contain one of these
NOT_INSTALLED = ("timm.create_dataset", "import wandb", "import trackio")  # timm needs torchvision
EXAMPLES = {
    f"{path.name}-{number}": block
    for path in DOCUMENTS
    for number, block in enumerate(fences(path, "python"), 1)
    if not any(name in block for name in NOT_INSTALLED)
}


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning",  # webdataset leaves a tar open if its iterator is not used up
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore:String specifications for transformations:UserWarning",  # wids warns of its own default
)
@pytest.mark.parametrize("source", list(EXAMPLES.values()), ids=list(EXAMPLES))
def test_a_python_example_runs(source: str, workspace: Path):
    for pattern, smaller in SMALLER.items():
        source = re.sub(pattern, smaller, source)
    exec(compile(source, "example", "exec"), {"__name__": "__main__"})
    gc.collect()  # here, where the warnings above are ignored


# ---- files ---------------------------------------------------------------------------------------------------------


@cache
def tree() -> frozenset[str]:
    """The paths of all files in the tree of docs/architecture.md, whose folders are marked by indentation."""
    (block,) = (b for b in fences(ROOT / "docs" / "architecture.md", "") if b.startswith("pipeline/\n"))
    found, folders = set(), list[str]()
    for line in block.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        if name.endswith("/"):
            folders[depth:] = [name]
        else:
            found.add("".join(folders[:depth]) + name)
    return frozenset(found)


def test_the_tree_names_every_module_and_no_other():
    tops = ("pipeline", "model", "tools")
    there = {str(p.relative_to(ROOT)) for top in tops for p in (ROOT / top).rglob("*.py")}
    there = {name for name in there if not name.endswith("__init__.py")}
    missing, gone = sorted(there - tree()), sorted(tree() - there)
    assert not missing and not gone, f"missing in the tree: {missing}; not on disk: {gone}"


@pytest.mark.parametrize("path", LINKING, ids=lambda path: path.name)
def test_every_link_to_a_file_resolves(path: Path):
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_the_readme_fits_its_limits():
    lines = README.read_text().splitlines()
    wide = [line for line in lines if len(line) > MAX_COLUMNS and not line.startswith("|")]
    assert len(lines) <= MAX_LINES and not wide


def test_pre_commit_hooks_are_the_commands_of_make_lint():
    rule = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert rule is not None
    lint = [line.strip("\t@").replace("$(BIN)", ".venv/bin") for line in rule.group(1).splitlines()]
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    assert [hook["entry"] for hook in repository["hooks"]] == lint
    assert all(hook["language"] == "system" and hook["pass_filenames"] is False for hook in repository["hooks"])


def test_the_workflow_runs_make_test_on_the_oldest_python():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (job,) = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == ["make test"]
    (version,) = (step["with"]["python-version"] for step in job["steps"] if "python-version" in step.get("with", {}))
    assert project["requires-python"] == f">={version}"


def test_the_citation_and_the_changelog_have_the_project_s_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["title"], citation["version"], citation["license"]) == (
        project["name"],
        project["version"],
        project["license"],
    )
    assert f"## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_test_that_the_gpu_page_names_exists():
    names = re.findall(r"`(test_\w+)`", (ROOT / "docs/gpu.md").read_text())
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert names
    assert [name for name in names if f"def {name}(" not in sources] == []
