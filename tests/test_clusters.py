"""The recipes of docs/clusters: their syntax, fields and options. tests/tools/test_cluster_commands.py runs them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.test_docs import call, fences, options, tool_of

ROOT = Path(__file__).parent.parent
PAGE, FOLDER = ROOT / "docs/clusters.md", ROOT / "docs/clusters"
SCRIPTS, MANIFESTS = sorted(FOLDER.glob("*.sbatch")), sorted(FOLDER.glob("*.yaml"))
BIN = str(Path(sys.executable).parent)

# Options of sbatch, and what a value must look like.
SBATCH = {
    "job-name": r"\w+",
    "array": r"1-\d+",
    "nodes": r"\d+",
    "ntasks-per-node": r"\d+",
    "gpus-per-node": r"\d+",
    "cpus-per-task": r"\d+",
    "mem": r"\d+G",
    "time": r"\d\d:\d\d:\d\d",
    "signal": r"USR1@\d+",
    "requeue": r"",
    "open-mode": r"append",
    "output": r"[\w%-]+\.log",
}

# Fields of Kubernetes objects; those with ! are required here. A field that is not listed is a mistake.
QUANTITIES = {"cpu!": str, "memory!": str, "nvidia.com/gpu": int}
CONTAINER = {
    "name!": str,
    "image!": str,
    "command!": [str],
    "args!": [str],
    "env!": [{"name!": str, "value": str, "valueFrom": {"resourceFieldRef!": {"resource!": str}}}],
    "resources!": {"requests!": QUANTITIES, "limits!": QUANTITIES},
    "volumeMounts!": [{"name!": str, "mountPath!": str, "readOnly": bool}],
}
VOLUME = {
    "name!": str,
    "persistentVolumeClaim": {"claimName!": str, "readOnly": bool},
    "emptyDir": {"medium": str, "sizeLimit": str},
}
POD = {
    "restartPolicy!": str,
    "terminationGracePeriodSeconds": int,
    "securityContext!": {"runAsUser!": int, "runAsGroup!": int, "fsGroup!": int, "fsGroupChangePolicy": str},
    "containers!": [CONTAINER],
    "volumes!": [VOLUME],
}
JOB_SPEC = {
    "completionMode": str,
    "completions": int,
    "parallelism": int,
    "backoffLimit": int,
    "backoffLimitPerIndex": int,
    "template!": {"spec!": POD},
}
JOBSET_SPEC = {
    "failurePolicy!": {"maxRestarts!": int},
    "network!": {"enableDNSHostnames!": bool, "subdomain!": str},
    "replicatedJobs!": [{"name!": str, "replicas!": int, "template!": {"spec!": JOB_SPEC}}],
}
KINDS = {("batch/v1", "Job"): JOB_SPEC, ("jobset.x-k8s.io/v1alpha2", "JobSet"): JOBSET_SPEC}


def faults(found: Any, schema: Any, at: str) -> list[str]:
    """What does not have the fields and types of a schema."""
    if isinstance(schema, list):
        rows = found if isinstance(found, list) else []
        wrong = [] if isinstance(found, list) else [f"{at}: not a list"]
        return wrong + [fault for n, row in enumerate(rows) for fault in faults(row, schema[0], f"{at}[{n}]")]
    if isinstance(schema, type):
        return [] if type(found) is schema else [f"{at}: {found!r} is not {schema.__name__}"]
    if not isinstance(found, dict):
        return [f"{at}: no fields"]
    fields = {name.rstrip("!"): (rule, name.endswith("!")) for name, rule in schema.items()}
    wrong = [f"{at}.{name}: missing" for name, (_, required) in fields.items() if required and name not in found]
    wrong += [f"{at}.{name}: unknown" for name in found if name not in fields]
    return wrong + [
        fault for name in found if name in fields for fault in faults(found[name], fields[name][0], f"{at}.{name}")
    ]


def job_of(path: Path) -> dict[str, Any]:
    """The spec of the Job in a manifest, or of the only Job in its JobSet."""
    spec = yaml.safe_load(path.read_text())["spec"]
    if "replicatedJobs" in spec:
        (replicated,) = spec["replicatedJobs"]
        spec = replicated["template"]["spec"]
    return dict(spec)


def container_of(path: Path) -> dict[str, Any]:
    (container,) = job_of(path)["template"]["spec"]["containers"]
    return dict(container)


def variables_of(path: Path) -> dict[str, str]:
    """The variables of a manifest's container that have a value there."""
    return {entry["name"]: entry["value"] for entry in container_of(path)["env"] if "value" in entry}


def scripts() -> dict[str, str]:
    """The shell script of each recipe, by the recipe's name."""
    inside = {path.name: container_of(path)["command"][2] for path in MANIFESTS}
    return {**{path.name: path.read_text() for path in SCRIPTS}, **inside}


# ---- syntax and fields --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(scripts()))
def test_a_script_has_no_fault_that_bash_or_shellcheck_finds(name: str):
    subprocess.run(["bash", "-n"], input=scripts()[name], text=True, check=True)
    shellcheck = shutil.which("shellcheck", path=f"{BIN}:{os.environ['PATH']}")
    assert shellcheck, "no shellcheck; install the dev dependencies"
    # SC1091: .venv/bin/activate is not there in a fresh clone
    command = [shellcheck, "--shell", "bash", "--enable", "quote-safe-variables", "--exclude", "SC1091", "-"]
    done = subprocess.run(command, input=scripts()[name], text=True, capture_output=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_the_options_of_sbatch_exist(path: Path):
    lines = re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", path.read_text(), flags=re.MULTILINE)
    assert len(lines) == path.read_text().count("#SBATCH")
    assert [name for name, value in lines if not re.fullmatch(SBATCH.get(name, "unknown"), value)] == []


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_has_the_fields_of_its_kind(path: Path):
    found = yaml.safe_load(path.read_text())
    spec = KINDS[found["apiVersion"], found["kind"]]
    schema = {"apiVersion!": str, "kind!": str, "metadata!": {"name!": str}, "spec!": spec}
    assert faults(found, schema, path.name) == []
    pod = job_of(path)["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # with backoffLimitPerIndex, and so that a failed pod's log stays
    mounted = sorted(mount["name"] for mount in container_of(path)["volumeMounts"])
    assert mounted == sorted(volume["name"] for volume in pod["volumes"])
    resources = container_of(path)["resources"]
    assert resources["requests"] == resources["limits"]


def test_a_wrong_manifest_is_found():
    manifest = yaml.safe_load((FOLDER / "shards.yaml").read_text())
    del manifest["spec"]["template"]["spec"]["restartPolicy"]
    manifest["spec"]["completionmode"], manifest["spec"]["completions"] = "Indexed", "16"
    assert faults(manifest["spec"], JOB_SPEC, "spec") == [
        "spec.completionmode: unknown",
        "spec.completions: '16' is not int",
        "spec.template.spec.restartPolicy: missing",
    ]


def test_numbers_that_belong_together_are_equal():
    """Parts, nodes and GPUs are written twice; the first rank's address consists of the JobSet's names."""
    text = (FOLDER / "shards.sbatch").read_text()
    assert re.search(r"--array=1-(\d+)", text)[1] == re.search(r"PARTS:-(\d+)", text)[1]  # type: ignore[index]
    parts = job_of(FOLDER / "shards.yaml")
    assert variables_of(FOLDER / "shards.yaml")["PARTS"] == str(parts["completions"])
    train, jobset = FOLDER / "train.yaml", yaml.safe_load((FOLDER / "train.yaml").read_text())
    nodes, variables = job_of(train), variables_of(train)
    assert nodes["completions"] == nodes["parallelism"] == int(variables["NODES"])
    assert container_of(train)["resources"]["limits"]["nvidia.com/gpu"] == int(variables["GPUS"])
    (replicated,) = jobset["spec"]["replicatedJobs"]
    host = f"{jobset['metadata']['name']}-{replicated['name']}-0-0.{jobset['spec']['network']['subdomain']}"
    assert variables["MASTER_ADDR"] == host
    assert int(variables["GPUS"]) % 2 == 0  # so that a pair is on one node


# ---- commands -----------------------------------------------------------------------------------------------------


def test_every_option_of_the_scripts_exists(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for name, text in scripts().items():
        (command,) = (line for line in text.replace("\\\n", " ").splitlines() if tool_of(line))
        tool = str(tool_of(command))
        assert call(tool, ["--help"], monkeypatch) == 0
        given = options(command.partition(f"tools/{tool}.py")[2])
        assert given <= options(capsys.readouterr().out), name


def test_every_file_that_the_page_names_is_a_recipe_and_the_other_way_round():
    lines = [line for block in fences(PAGE, "sh") for line in block.splitlines()]
    named = {word.rstrip(")") for line in lines for word in line.split() if word.startswith("docs/")}
    assert named == {str(path.relative_to(ROOT)) for path in (*SCRIPTS, *MANIFESTS)}


@pytest.mark.filterwarnings("ignore")
def test_the_commands_of_dask_exist():
    pytest.importorskip("distributed")
    from distributed.cli import dask_scheduler, dask_worker

    mains = {"scheduler": dask_scheduler.main, "worker": dask_worker.main}
    lines = [line.split() for block in fences(PAGE, "sh") for line in block.splitlines() if line.startswith("dask ")]
    assert sorted(line[1] for line in lines) == sorted(mains)
    for _, name, *arguments in lines:
        mains[name].make_context(name, arguments, resilient_parsing=True)
