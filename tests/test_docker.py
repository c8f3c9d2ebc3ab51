"""The container without Docker: every path, variable and mount that its files name, and the commands that it runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.rank_tools import ended
from tools.run_all import STAGES, RunAllSettings, has_eigenbasis

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
    """The services of compose.yaml, with `settings` as the content of .env; a small copy of how compose reads them."""

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
    """The arguments of every instruction NAME in the Dockerfile."""
    lines = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [line.removeprefix(name).strip() for line in lines if line.startswith(f"{name} ")]


def copied() -> list[str]:
    """Paths of this project that the Dockerfile copies into the image."""
    return [source for line in instructions("COPY") for source in line.split()[:-1]]


# ---- what the files name ------------------------------------------------------------------------------------------


def test_the_dockerfile_lints():
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert hadolint, "no hadolint; install the dev dependencies"
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("files", [[COMPOSE], [COMPOSE, OVERRIDE]])
def test_compose_accepts_its_files(files: list[Path]):
    """If Docker Compose is installed: it accepts the files and reads the services as the other tests do."""
    compose = ["docker", "compose"]
    if not shutil.which("docker") or subprocess.run([*compose, "version"], capture_output=True).returncode:
        pytest.skip("docker compose is not installed")
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
    """The variables of .env.example are those of compose.yaml, and what it sets is the default."""
    text = (ROOT / ".env.example").read_text()
    explained = dict(re.findall(r"^#?([A-Z_]+)=(.*)$", text, flags=re.MULTILINE))
    assert explained.keys() - {"COMPOSE_FILE"} == {name for name, _, _ in VARIABLE.findall(COMPOSE.read_text())}
    for part in explained["COMPOSE_FILE"].split(":"):
        assert (ROOT / part).is_file()
    active = dict(re.findall(r"^([A-Z_]+)=(.*)$", text, flags=re.MULTILINE))
    unset = {name: value for name, value in active.items() if name != "HANG_MINUTES"}  # run_all.py has that default
    assert services(unset) == services({})
    assert RunAllSettings.of({}).hang_minutes == RunAllSettings.of(active).hang_minutes


def test_the_container_sets_the_variables_that_run_all_reads():
    asked = set()

    class Asked(dict[str, str]):
        def get(self, name: str, default: Any = None) -> Any:
            asked.add(name)
            return default

    RunAllSettings.of(Asked())
    for name, service in services({}).items():
        assert name == "folders" or service["environment"].keys() == asked


def test_every_service_has_its_mounts_and_its_stage():
    """Services that write run as the user, on a read-only root file system. The CPU override asks for no GPU."""
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
        assert (ROOT / folders["/imagenet"]).is_dir(), "must exist if IMAGENET is unset"
        assert [name] == service["command"] and name in STAGES
        assert service["user"] == "1000:1000" and service["init"]
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {"/data/", "/runs/", "/.env"} <= set(ignored)
    override = re.sub("!reset", "", OVERRIDE.read_text())
    without = {name: found["environment"] for name, found in yaml.safe_load(override)["services"].items()}
    # An image that announces GPUs would otherwise make training fail: none of them can be used here.
    assert without == {name: {"NVIDIA_VISIBLE_DEVICES": "void"} for name in found.keys() - {"folders"}}
    unreserved = set(re.findall(r"^  (\w+):\n    deploy: !reset", OVERRIDE.read_text(), flags=re.MULTILINE))
    assert unreserved == {name for name, service in found.items() if "deploy" in service}


def test_imagenet_is_mounted_where_the_container_looks():
    mount, _, _ = services({"IMAGENET": "/elsewhere"})["train"]["volumes"]
    assert mount["source"] == "/elsewhere" and mount["read_only"] and not mount["bind"]["create_host_path"]
    assert services({"IMAGENET": "/elsewhere"})["train"]["environment"]["IMAGENET"] == mount["target"]
    assert services({})["train"]["environment"]["IMAGENET"] == ""


def test_the_image_copies_what_exists_and_dockerignore_allows():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().split("\n") if line.startswith("!")}
    assert set(copied()) == allowed
    for path in copied():
        assert (ROOT / path).exists(), path
    (default,) = instructions("ARG")
    assert default == f"BASE={services({})['train']['build']['args']['BASE']}"


def pins(name: str) -> dict[str, str]:
    """Versions by package name; every line of a constraints file is an exact version."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    found = [re.fullmatch(r"([\w.-]+)==([\w.!+]+)", line) for line in lines]
    assert all(found), lines
    return {re.sub("[-_.]+", "-", pin[1].lower()): pin[2] for pin in found if pin}


def test_both_constraints_files_agree_and_pin_what_cuda_adds():
    """Both are used together, wherever the environment is installed."""
    always, cuda = pins("constraints.txt"), pins("constraints-cuda.txt")
    assert all(always[name] == cuda[name] for name in always.keys() & cuda.keys())
    assert {"cuda-bindings", "cuda-toolkit", "nvidia-cudnn-cu13", "nvidia-nccl-cu13", "setuptools", "triton"} <= set(
        cuda
    )
    (build,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert build == f"setuptools=={cuda['setuptools']}"
    (install,) = (line for line in instructions("RUN") if "pip install" in line)
    makes = re.findall(r"pip install .*--editable.*", (ROOT / "Makefile").read_text())
    assert makes
    for command in (install, *makes):
        assert re.findall(r"--constraint (\S+)", command) == ["constraints.txt", "constraints-cuda.txt"]
    assert {"constraints.txt", "constraints-cuda.txt"} <= set(copied())


def test_the_image_installs_what_the_project_depends_on():
    """The command in the Dockerfile prints the dependencies, and those of the extras that it names."""
    (extras,) = re.findall(r"python requirements.py ([\w ]+) >", DOCKERFILE.read_text())
    command = [sys.executable, "docker/requirements.py", *extras.split()]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = [line for name in extras.split() for line in project["optional-dependencies"][name]]
    assert sorted(printed) == sorted(project["dependencies"] + optional)


# ---- its commands, without Docker -----------------------------------------------------------------------------------


class Container:
    """The content of the image in a local folder, and its services as local processes."""

    def __init__(self, root: Path, settings: dict[str, str]) -> None:
        self.root, self.settings = root, settings
        for name in ("data", "runs", "tmp", "app"):
            (root / name).mkdir()
        for path in copied():
            if (ROOT / path).is_dir():
                shutil.copytree(ROOT / path, root / "app" / path, ignore=shutil.ignore_patterns("__pycache__"))

    def here(self, value: str, imagenet: Path | None) -> str:
        """A value with the paths of the container replaced by local ones."""
        if value.startswith("/imagenet"):
            return value.replace("/imagenet", str(imagenet), 1)
        return re.sub(r"^/(?=(?:data|runs|tmp|app)\b)", f"{self.root}/", value)

    def start(
        self, service: str, imagenet: Path | None = None, command: list[str] | None = None
    ) -> subprocess.Popen[str]:
        """Starts a service with its entry point, command and environment, or with another `command`."""
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
        """The exit code of the health check."""
        _, *command = services(self.settings)["train"]["healthcheck"]["test"]
        process = self.start("train", command=command)
        process.communicate()
        return process.returncode


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> Container:
    return Container(tmp_path_factory.mktemp("container"), SMALL)


@pytest.mark.slow
def test_up_train_runs_all_stages_and_then_skips_what_is_complete(container: Container):
    """From nothing to the stall report, in the mounted folders only. Health: not started, healthy, hanging."""
    assert container.health() == 1
    out = ended(container.start("train"))
    assert "ranks: no GPU is visible" in out and "verdict" in out
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
    assert "nothing to do" in out and re.search("; (whole|complete)", out) and "this run is complete" in out
    assert times == {path: path.stat().st_mtime_ns for path in (root / "data").rglob("*") if path.is_file()}


@pytest.mark.slow
def test_real_files_are_read_in_place(container: Container, sample: Path):
    """`pca` makes shards and eigenbasis, and replaces the eigenbasis of another set. The sources stay unchanged."""
    before = {path: path.stat().st_mtime_ns for path in sample.iterdir()}
    assert "eigenbasis.json: 47 " in ended(container.start("pca", sample))
    assert {path: path.stat().st_mtime_ns for path in sample.iterdir()} == before
    basis = container.root / "data/imagenet-256/train/eigenbasis.json"
    text = basis.read_text()
    manifest = json.loads(text)["manifest_sha256"]
    basis.write_text(text.replace(manifest, "0" * 64))
    assert not has_eigenbasis(basis.parent)
    ended(container.start("pca", sample))
    assert basis.read_text() == text


@pytest.mark.slow
def test_a_wrong_folder_gets_one_line_and_code_2(container: Container, tmp_path: Path):
    out = ended(container.start("train", tmp_path), code=2)
    assert re.fullmatch(rf"make_shards.py: {tmp_path}: no ImageNet layout here .*\n", out)


def test_the_driver_gives_the_container_its_jpeg_decoder():
    """Without "video" the container has no libnvcuvid, and DALI silently does not use the JPEG engines."""
    [capabilities] = re.findall(r"NVIDIA_DRIVER_CAPABILITIES=(\S+)", DOCKERFILE.read_text())
    assert set(capabilities.split(",")) == {"compute", "utility", "video"}


def test_caches_of_compiled_kernels_are_on_an_executable_mount():
    caches = dict(re.findall(r"(\w+_CACHE_DIR)=(\S+)", DOCKERFILE.read_text()))
    assert set(caches) == {"NUMBA_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"}
    assert all(folder.startswith("/cache/") for folder in caches.values())
    assert any(re.match(r"/cache:(.*,)?exec(,|$)", mount) for mount in services({})["train"]["tmpfs"])
