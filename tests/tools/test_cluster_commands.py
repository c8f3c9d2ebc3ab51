"""The commands of the recipes in docs/clusters, run here with small sets.

Schedulers are replaced: `srun` and `scontrol` by scripts, Kubernetes by the variables and signals that a pod gets.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.rank_tools import TINY, ended, losses, wait_for_step
from tests.support.shard_fixtures import files_of
from tests.test_clusters import BIN, FOLDER, ROOT, container_of, variables_of

SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
SLURM_PROCID=0 SLURM_LOCALID=0 exec "$@"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo localhost; else echo "$@" >> scontrol.log; fi
"""


class Cluster:
    """A folder with the project, its environment, and the replaced commands of Slurm."""

    def __init__(self, root: Path, sample: Path) -> None:
        self.root, self.imagenet, self.data, self.runs = root, sample, root / "set", root / "runs"
        for name, text in {
            ".venv/bin/activate": f"PATH={root}/bin:{BIN}:$PATH\n",
            "bin/srun": SRUN,
            "bin/scontrol": SCONTROL,
        }.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
            (root / name).chmod(0o755)
        (root / "tools").symlink_to(ROOT / "tools")

    def start(self, command: list[str], **variables: object) -> subprocess.Popen[str]:
        """Starts a command in the folder, with the variables of a job."""
        folders = {"IMAGENET": self.imagenet, "DATA": self.data, "RUNS": self.runs, "RUN": "first"}
        variables.setdefault("PATH", f"{BIN}:{os.environ['PATH']}")
        own = {name: str(value) for name, value in {**folders, **variables}.items()}
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **own}
        how: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=self.root, env=environment, **how)

    def sbatch(self, name: str, *args: object, **variables: object) -> subprocess.Popen[str]:
        """Runs a script as Slurm does on the first node of a job."""
        return self.start(["bash", str(FOLDER / name), *map(str, args)], **variables)

    def pod(self, name: str, *args: object, **variables: object) -> subprocess.Popen[str]:
        """Runs the command of a manifest's container; its fixed folder of ImageNet is that of the sample."""
        container = container_of(FOLDER / name)
        shell, flags, script, *rest = container["command"]
        command = [shell, flags, script.replace("/imagenet ", f"{self.imagenet} "), *rest, *container["args"]]
        return self.start(
            [*command, *map(str, args)],
            **{**variables_of(FOLDER / name), "DATA": self.data, "RUNS": self.runs, **variables},
        )


@pytest.fixture
def cluster(sample: Path, tmp_path: Path) -> Cluster:
    return Cluster(tmp_path, sample)


@pytest.mark.slow
def test_tasks_of_an_array_and_pods_make_one_set_together(cluster: Cluster, shard_root: Path):
    """Tasks 3 and 1 of an array of three at the same time, then the pod of part 2; then the eigenbasis, both ways."""
    small = ("--split", "train", "--seed", 7, "--shard-samples", 20, "--workers", 1)
    tasks = [cluster.sbatch("shards.sbatch", *small, PARTS=3, SLURM_ARRAY_TASK_ID=n) for n in (3, 1)]
    assert all("part " in ended(task) for task in tasks)
    pod = cluster.pod("shards.yaml", *small, PARTS=3, WORKERS=1, JOB_COMPLETION_INDEX=1)
    assert "47 samples in 3 shards" in ended(pod)
    expected = files_of(shard_root / "train")
    ended(cluster.sbatch("eigenbasis.sbatch", "--workers", 1))
    assert files_of(cluster.data / "train") == expected
    (cluster.data / "train/eigenbasis.json").unlink()
    ended(cluster.pod("eigenbasis.yaml", WORKERS=1))
    assert files_of(cluster.data / "train") == expected


STEPS = (
    "--steps",
    12,  # two epochs of five steps, and two steps
    "--device",
    "cpu",
    *TINY,
)


@pytest.mark.slow
def test_a_job_of_slurm_that_is_stopped_goes_back_to_the_queue_and_continues(cluster: Cluster, shard_root: Path):
    cluster.data = shard_root
    slurm = {"SLURM_JOB_ID": 71_234, "SLURM_JOB_NODELIST": "n1", "SLURM_NTASKS": 1, "SLURM_NTASKS_PER_NODE": 1}
    job = cluster.sbatch("train.sbatch", *STEPS, **slurm)
    wait_for_step(cluster.runs / "first", 2, job)
    (rank,) = (p for p in psutil.Process(job.pid).children(recursive=True) if "tools/train.py" in p.cmdline())
    rank.send_signal(signal.SIGUSR1)
    assert "stopped after optimizer step" in ended(job)
    assert (cluster.root / "scontrol.log").read_text() == "requeue 71234\n"
    ended(cluster.sbatch("train.sbatch", *STEPS, **slurm))
    assert [step for step, _ in losses(cluster.runs / "first")] == list(range(1, 13))
    assert (cluster.root / "scontrol.log").read_text().count("requeue") == 1


# Takes the place of python in a pod: a rank that notes its place, and ends when it is stopped or is the one that fails.
RANK = """import json, os, signal, sys
from pathlib import Path

place = {name: int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
run, rank = Path(os.environ["RUNS"], os.environ["RUN"]), place["RANK"]

def stop(number, frame):
    with (run / "train.log").open("a") as log:
        log.write(f"stopped after optimizer step {rank}\\n")
    sys.exit(0)

signal.signal(signal.SIGTERM, stop)
Path(f"rank-{rank}.new").write_text(json.dumps([place, sys.argv[1:]]))
Path(f"rank-{rank}.new").rename(f"rank-{rank}.json")
if os.environ["ENDS"] == "stopped":
    signal.pause()
sys.exit(int(os.environ["ENDS"]) if rank == 2 else 0)
"""


@pytest.mark.parametrize(("ends", "code"), [("stopped", 75), ("3", 3), ("0", 0)])
def test_the_shell_of_a_pod_passes_sigterm_to_its_ranks_and_says_how_they_ended(ends: str, code: int, cluster: Cluster):
    """Ranks 2 and 3 are those of the second pod. 75 says that the run was stopped, so that it is started again."""
    (cluster.runs / "first").mkdir(parents=True)
    (cluster.runs / "first/train.log").write_text("stopped after optimizer step 1\na line\nanother\nrun folder: x\n")
    (cluster.root / "bin/python").write_text(f"#!{sys.executable}\n{RANK}")
    (cluster.root / "bin/python").chmod(0o755)
    place = {"NODES": 2, "GPUS": 2, "JOB_COMPLETION_INDEX": 1, "ENDS": ends}
    pod = cluster.pod("train.yaml", "--epochs", 5, PATH=f"{cluster.root}/bin:{os.environ['PATH']}", **place)
    records = [cluster.root / f"rank-{rank}.json" for rank in (2, 3)]
    while not all(record.is_file() for record in records):
        assert pod.poll() in (None, code), ended(pod)
        os.sched_yield()
    if ends == "stopped":
        pod.send_signal(signal.SIGTERM)
    ended(pod, code=code)
    for rank, record in zip((2, 3), records, strict=True):
        found, arguments = json.loads(record.read_text())
        assert found == {"RANK": rank, "LOCAL_RANK": rank - 2, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}
        assert arguments[:2] == ["tools/train.py", f"{cluster.data}/train"] and arguments[-2:] == ["--epochs", "5"]
