"""The container without its engine: every path, variable and mount that its files name, and its very commands."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from model import checkpoint
from tests.support.rank_tools import TINY, ended, losses, wait_for_step
from tools import run_all as road
from tools.run_all import STAGES, STOPPED, Settings, choose_ranks

ROOT = Path(__file__).parent.parent
COMPOSE, OVERRIDE, DOCKERFILE = ROOT / "compose.yaml", ROOT / "docker/compose.cpu.yaml", ROOT / "docker/Dockerfile"
VARIABLE = re.compile(r"\$\{(\w+)(:[-+])([^}]*)\}")
MOUNTS = {"/imagenet", "/data", "/runs"}
SMALL = {
    "WORKERS": "1",
    "SAMPLE_OPTIONS": "--classes 3 --train 16 --val 4",
    "SHARD_OPTIONS": "--shard-samples 20",
    "TRAIN_OPTIONS": "--width 0.05 --batch 8 --steps 2 --log-every 1 --stall-seconds 0.1",
}


def services(settings: dict[str, str]) -> dict[str, Any]:
    """compose.yaml's services, with `settings` where .env would have them: a plain twin of compose's own reading."""

    def value(found: re.Match[str]) -> str:
        name, how, other = found.groups()
        if how == ":+":
            return other if settings.get(name) else ""
        return settings.get(name) or other

    def filled(node: Any) -> Any:
        match node:
            case dict():
                return {name: filled(part) for name, part in node.items()}
            case list():
                return [filled(part) for part in node]
            case str():
                return VARIABLE.sub(value, node).replace("$$", "$")
        return node

    found: dict[str, Any] = filled(yaml.safe_load(COMPOSE.read_text())["services"])
    return found


def instructions(name: str) -> list[str]:
    """What follows the instruction NAME in the Dockerfile."""
    lines = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [line.removeprefix(name).strip() for line in lines if line.startswith(f"{name} ")]


def copied() -> list[str]:
    """Paths of this folder that the image has, by where they end up in /app."""
    return [source for line in instructions("COPY") for source in line.split()[:-1]]


# ---- the choice of ranks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "batch", "ranks", "why"),
    [
        (0, 128, 1, "NO GPU IS VISIBLE HERE: BOTH TOWERS TRAIN ON THE CPU"),
        (1, 128, 1, "1 GPU: both towers on one"),
        (2, 128, 2, "2 GPUs: the tower pair, a tower on each"),
        (3, 128, 2, "3 GPUs: the tower pair, a tower on each; 1 STAY IDLE"),
        (4, 128, 4, "4 GPUs: a mesh of 2 tower pairs on 4 of them"),
        (6, 128, 4, "mesh of 2 tower pairs on 4 of them; 2 STAY IDLE: more pairs cannot share a batch of 128 evenly"),
        (8, 128, 8, "8 GPUs: a mesh of 4 tower pairs on 8 of them"),
        (2, 127, 1, "2 GPUs: both towers on one; 1 STAY IDLE"),
    ],
)
def test_ranks_follow_the_gpus(gpus: int, batch: int, ranks: int, why: str):
    choice = choose_ranks(gpus, batch)
    assert choice.ranks == ranks
    assert why in choice.why and "\n" not in choice.why


def test_the_ranks_are_the_most_that_train_would_accept():
    """Pairs that share the batch evenly, or one rank alone; no larger number of GPUs would do."""
    for gpus in range(17):
        for batch in (1, 2, 6, 48, 96, 127, 128, 256):
            fits = [n for n in range(1, gpus + 1) if (n == 1 or n % 2 == 0) and batch % n == 0]
            assert choose_ranks(gpus, batch).ranks == max(fits, default=1)
            fits = [n for n in range(1, gpus + 1) if batch % n == 0]
            assert choose_ranks(gpus, batch, layout="data").ranks == max(fits, default=1)
            assert choose_ranks(gpus, batch, device="cpu").ranks == 1


def test_the_choice_reads_the_options_of_the_training(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(road, "gpus_here", lambda: 6)
    assert road.ranks_for([]).ranks == 4
    assert road.ranks_for(["--steps", "9", "--batch=96", "--save-every", "1"]).ranks == 6
    assert road.ranks_for(["--layout", "data", "--batch", "90"]).why == "6 GPUs: both towers on each of 6"
    assert road.ranks_for(["--device", "cpu"]).ranks == 1


# ---- what the files name ------------------------------------------------------------------------------------------


def test_the_dockerfile_lints():
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert hadolint, "no hadolint; install the dev dependencies"
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("files", [[COMPOSE], [COMPOSE, OVERRIDE]])
def test_compose_accepts_its_files(files: list[Path]):
    """Where a compose command is there; and then it reads the services as the other tests do."""
    compose = ["docker", "compose"]
    if not shutil.which("docker") or subprocess.run([*compose, "version"], capture_output=True).returncode:
        pytest.skip("no docker compose here")
    options = [option for file in files for option in ("-f", str(file))]
    command = [*compose, "--env-file", "/dev/null", *options, "config"]
    subprocess.run([*command, "-q"], check=True)
    text = subprocess.run([*command, "--format", "json"], check=True, capture_output=True, text=True).stdout
    ours = services({})
    for name, service in json.loads(text)["services"].items():
        assert service.get("environment") == ours[name].get("environment")
        assert [mount["target"] for mount in service["volumes"]] == [mount["target"] for mount in ours[name]["volumes"]]
        assert ("deploy" in service) == ("deploy" in ours[name] and len(files) == 1)


def test_every_setting_is_explained():
    """.env.example has each variable of compose.yaml and no other; what it sets there is the default."""
    text = (ROOT / ".env.example").read_text()
    explained = dict(re.findall(r"^#?([A-Z_]+)=(.*)$", text, flags=re.MULTILINE))
    assert explained.keys() - {"COMPOSE_FILE"} == {name for name, _, _ in VARIABLE.findall(COMPOSE.read_text())}
    for part in explained["COMPOSE_FILE"].split(":"):
        assert (ROOT / part).is_file()
    active = dict(re.findall(r"^([A-Z_]+)=(.*)$", text, flags=re.MULTILINE))
    unset = {name: value for name, value in active.items() if name != "HANG_MINUTES"}  # road.py has that default
    assert services(unset) == services({})
    assert Settings.of({}).hang_minutes == Settings.of(active).hang_minutes


def test_the_container_s_environment_is_what_the_road_reads():
    asked = set()

    class Asked(dict[str, str]):
        def get(self, name: str, default: Any = None) -> Any:
            asked.add(name)
            return default

    Settings.of(Asked())
    for name, service in services({}).items():
        assert name == "folders" or service["environment"].keys() == asked


def test_every_service_has_its_mounts_and_its_stage():
    """Writing services run as the user, on a root file system that is read-only; without a GPU none is asked for."""
    found = services({})
    assert found.keys() == {"train", "shards", "pca", "bench", "folders"}
    for name, service in found.items():
        folders = {mount["target"]: mount["source"] for mount in service["volumes"]}
        assert service["read_only"] and service["build"]["context"] == "."
        assert (ROOT / service["build"]["dockerfile"]) == DOCKERFILE
        if name == "folders":
            assert set(folders) == {"/data", "/runs"}
            assert all(folder in service["command"][0] for folder in folders)
            continue
        assert set(folders) == MOUNTS
        assert {service["environment"]["DATA"], service["environment"]["RUNS"]} < MOUNTS
        assert (ROOT / folders["/imagenet"]).is_dir(), "must be there where IMAGENET is unset"
        assert [name] == service["command"] and name in STAGES
        assert service["user"] == "1000:1000" and service["init"]
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {"/data/", "/runs/", "/.env"} <= set(ignored)
    unreserved = set(re.findall(r"^  (\w+):\n    deploy: !reset", OVERRIDE.read_text(), flags=re.MULTILINE))
    assert unreserved == {name for name, service in found.items() if "deploy" in service}


def test_imagenet_is_mounted_where_the_container_looks():
    mount, _, _ = services({"IMAGENET": "/elsewhere"})["train"]["volumes"]
    assert mount["source"] == "/elsewhere" and mount["read_only"] and not mount["bind"]["create_host_path"]
    assert services({"IMAGENET": "/elsewhere"})["train"]["environment"]["IMAGENET"] == mount["target"]
    assert services({})["train"]["environment"]["IMAGENET"] == ""


def test_the_image_copies_what_is_there_and_let_in():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().split("\n") if line.startswith("!")}
    assert set(copied()) == allowed
    for path in copied():
        assert (ROOT / path).exists(), path
    (default,) = instructions("ARG")
    assert default == f"BASE={services({})['train']['build']['args']['BASE']}"


def test_the_image_installs_what_the_project_depends_on():
    """The command of the Dockerfile prints the dependencies and those of the extras that it names."""
    (extras,) = re.findall(r"python requirements.py ([\w ]+) >", DOCKERFILE.read_text())
    command = [sys.executable, "docker/requirements.py", *extras.split()]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = [line for name in extras.split() for line in project["optional-dependencies"][name]]
    assert sorted(printed) == sorted(project["dependencies"] + optional)


# ---- its commands, here -------------------------------------------------------------------------------------------


class Container:
    """What the image holds, in a folder of this machine, and its services as processes of this machine."""

    def __init__(self, root: Path, settings: dict[str, str]) -> None:
        self.root, self.settings = root, settings
        for name in ("data", "runs", "tmp", "app"):
            (root / name).mkdir()
        for path in copied():
            if (ROOT / path).is_dir():
                shutil.copytree(ROOT / path, root / "app" / path, ignore=shutil.ignore_patterns("__pycache__"))

    def here(self, value: str, imagenet: Path | None) -> str:
        """A value with the container's paths as this machine has them."""
        if value.startswith("/imagenet"):
            return value.replace("/imagenet", str(imagenet), 1)
        return re.sub(r"^/(?=(?:data|runs|tmp|app)\b)", f"{self.root}/", value)

    def start(
        self, service: str, imagenet: Path | None = None, command: list[str] | None = None
    ) -> subprocess.Popen[str]:
        """Starts a service as its files say: entry point, command and environment."""
        found = services({**self.settings, "IMAGENET": str(imagenet or "")})[service]
        (entry,) = instructions("ENTRYPOINT")
        python, *rest = command or [*json.loads(entry), *found["command"]]
        assert python == "python"
        image = dict(pair.split("=", 1) for line in instructions("ENV") for pair in shlex.split(line))
        inside = {**image, **found["environment"]}
        environment = {name: self.here(value, imagenet) for name, value in inside.items() if name != "PATH"}
        machine = {"PATH": os.environ["PATH"], "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, *rest],
            cwd=self.root / "app",
            env={**machine, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def health(self) -> int:
        """The exit code of the healthcheck."""
        _, *command = services(self.settings)["train"]["healthcheck"]["test"]
        process = self.start("train", command=command)
        process.communicate()
        return process.returncode


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> Container:
    return Container(tmp_path_factory.mktemp("container"), SMALL)


def test_up_train_goes_the_whole_road_and_then_skips_what_is_there(container: Container):
    """From nothing to the stall report, in the mounted folders only; health: not begun, alive, hanging."""
    assert container.health() == 1
    out = ended(container.start("train"))
    assert "ranks: NO GPU IS VISIBLE HERE" in out and "verdict" in out
    root = container.root
    assert (root / "runs/sample/stall.json").is_file() and (root / "data/sample-256/train/eigenbasis.json").is_file()
    assert {path.name for path in root.iterdir()} == {"data", "runs", "tmp", "app"}
    assert not list((root / "app").rglob("*.pyc"))
    assert container.health() == 0
    metrics = root / "runs/sample/metrics.jsonl"
    old_s = metrics.stat().st_mtime - 16 * 60
    os.utime(metrics, (old_s, old_s))
    assert container.health() == 1
    times = {path: path.stat().st_mtime_ns for path in (root / "data").rglob("*") if path.is_file()}
    out = ended(container.start("train"))
    assert "nothing to do" in out and "; whole" in out and "this run is complete" in out
    assert times == {path: path.stat().st_mtime_ns for path in (root / "data").rglob("*") if path.is_file()}


def test_real_files_are_sharded_where_they_are(container: Container, sample: Path):
    """`pca` goes as far as the eigenbasis and renews one of another set; the sources stay as they were."""
    before = {path: path.stat().st_mtime_ns for path in sample.iterdir()}
    assert "eigenbasis.json: 47 pictures" in ended(container.start("pca", sample))
    assert {path: path.stat().st_mtime_ns for path in sample.iterdir()} == before
    basis = container.root / "data/imagenet-256/train/eigenbasis.json"
    text = basis.read_text()
    manifest = json.loads(text)["manifest_sha256"]
    basis.write_text(text.replace(manifest, "0" * 64))
    assert not road.has_eigenbasis(basis.parent)
    ended(container.start("pca", sample))
    assert basis.read_text() == text


def test_a_wrong_folder_gets_one_line_and_code_2(container: Container, tmp_path: Path):
    out = ended(container.start("train", tmp_path), code=2)
    assert re.fullmatch(rf"make_shards.py: {tmp_path}: no ImageNet layout here .*\n", out)


def test_a_folder_of_somebody_else_gets_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # tests may run as root, who may write anywhere
    with pytest.raises(ValueError, match=r"may not write there; change that, or \(Docker\) USER_ID and GROUP_ID in"):
        road.writable(tmp_path / "new")


def test_bench_measures_what_train_would_be_fed_by(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Its tools, and their arguments, are there."""
    called: list[list[str]] = []

    class Steps:
        def tool(self, *args: object) -> int:
            called.append([str(arg) for arg in args])
            return 0

    monkeypatch.setattr(road, "gpus_here", lambda: 1)
    assert road.take("bench", Settings.of({"DATA": str(tmp_path)}), Steps()) == 0  # type: ignore[arg-type]
    assert [name for name, *_ in called] == ["bench_loader", "bench_baselines"]
    for name, shards, *options in called:
        assert shards == str(tmp_path / "sample-256/train")
        text = (ROOT / "tools" / f"{name}.py").read_text()
        assert all(option in text for option in options)


# ---- stopping -----------------------------------------------------------------------------------------------------

STEPS = "import os, signal, sys; from road import Steps; steps = Steps()"


def start_steps(code: str, *args: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", f"{STEPS}; {code}", *map(str, args)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_saves_and_ends_with_0(ranks: int, shard_root: Path, tmp_path: Path):
    """Sent to the one process that the container starts; torchrun's ranks get it too."""
    args = [
        "train",
        shard_root / "train",
        "--runs",
        tmp_path,
        "--run-name",
        "a",
        "--steps",
        100,
        "--device",
        "cpu",
        *TINY,
    ]
    process = start_steps(f"sys.exit(steps.tool(*sys.argv[1:], ranks={ranks}))", *args)
    wait_for_step(tmp_path / "a", 2, process)
    process.send_signal(signal.SIGTERM)
    out = ended(process)
    last = losses(tmp_path / "a")[-1][0]
    assert f"stopped after update {last}" in out and last < 100
    assert checkpoint.optimizer_steps(tmp_path / "a/checkpoints") == last


def test_sigterm_between_two_tools_starts_no_further_one(tmp_path: Path):
    code = "os.kill(os.getpid(), signal.SIGTERM); sys.exit(steps.tool('make_sample', sys.argv[1]))"
    ended(start_steps(code, tmp_path / "sample"), code=STOPPED)
    assert not (tmp_path / "sample").exists()


def test_a_tool_that_a_signal_ends_gives_the_shell_s_code(tmp_path: Path):
    """A kill -9 (no memory left, say) is a failure of the whole."""
    kill = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    code = f"popen = road.subprocess.Popen; road.subprocess.Popen = lambda _: popen({kill})"
    ended(start_steps(f"import road; {code}; sys.exit(steps.tool('make_sample'))"), code=137)
