"""Any loader on trial: batch sizes, epochs, rules, and the report of simulated and real loaders."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.diagnosis.any_loader import Observed, diagnose, measure_alone, report_of
from pipeline.diagnosis.loader_rules import LIMITS, LoaderEvidence, LoaderFacts, cause_of_slow_loader, facts_of
from pipeline.profiling.any_loader import EndlessLoader, ProcessCpu, ProcessWatch, delay_ratio, images_of
from pipeline.profiling.cpu_time import GROUPS, CpuUse, cpu_mark
from tests.support.simulated_training import BATCH, SimulatedTraining, VirtualClock
from tests.support.tool_runs import ENVIRONMENT


@pytest.fixture(autouse=True)
def forks_leave_garbage_alone():
    """Other tests leave DALI pipelines behind. A worker process that collected one would wait for its threads."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@dataclass
class Pair:
    """A batch as a dataclass."""

    images: torch.Tensor
    labels: torch.Tensor


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(3, 2),
        np.zeros((3, 2)),
        (torch.zeros(3, 2), torch.zeros(3)),
        [torch.zeros(3, 2), torch.zeros(3)],
        {"key": "name", "image": np.zeros((3, 2)), "label": [1, 2, 3]},
        {"image": [object(), object(), object()]},
        [{"data": torch.zeros(3, 2), "label": torch.zeros(3)}],
        (torch.tensor(0.5), torch.zeros(3, 2)),
        ["a", "b", "c"],
        Pair(torch.zeros(3, 2), torch.zeros(3)),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_images_are_counted_by_the_first_array(batch: object):
    assert images_of(batch) == 3


@pytest.mark.parametrize("batch", [7, "text", None, torch.tensor(1.0), {}, ()], ids=repr)
def test_a_batch_whose_images_cannot_be_counted(batch: object):
    with pytest.raises(ValueError, match=r"cannot be counted; .*--batch N"):
        images_of(batch)


def test_a_loader_that_ends_starts_again_and_its_restarts_are_timed():
    """Three batches of a second, and four more seconds before each epoch."""
    clock = VirtualClock()

    def make():
        clock.advance(4)
        for number in range(3):
            clock.advance(1)
            yield number

    loader = EndlessLoader(make, clock)
    assert loader.few(8) == [0, 1, 2, 0, 1, 2, 0, 1]
    assert (loader.epochs_batches, loader.restarts_s) == ([3, 3], [5, 5])
    assert loader.restart_share(7 / 3) == pytest.approx(4 / 7)
    assert EndlessLoader([1, 2]).few(5) == [1, 2, 1, 2, 1]


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (7, "it is a int; expected something to iterate over"),
        (lambda: 7, "it is a int"),
        ([], "no batch at all"),
        ((n for n in range(2)), "ended after 2 batches and cannot start again; pass a function"),
    ],
)
def test_what_is_no_loader(loader: object, message: str):
    with pytest.raises(ValueError, match=message):
        EndlessLoader(loader).few(3)


def test_a_loader_that_can_start_again_is_made_once():
    """Otherwise persistent workers would be lost at the end of every epoch. It ends as other epochs do: no cost."""
    made = []

    def make():
        made.append([1, 2])
        return made[-1]

    loader = EndlessLoader(make, iter(range(100)).__next__)
    assert loader.few(7) == [1, 2, 1, 2, 1, 2, 1] and len(made) == 1

    class Restarted(list):
        """As a DataLoader with persistent workers: `iter` discards what they have prefetched."""

        started = 0

        def __iter__(self):
            self.started += 1
            return super().__iter__()

    again = Restarted([1, 2])
    assert EndlessLoader(again).few(5) == [1, 2, 1, 2, 1] and again.started == 3
    clock = VirtualClock()

    def evenly():
        for number in range(4):
            clock.advance(1)
            yield number

    loader = EndlessLoader(evenly, clock)
    loader.few(13)
    assert loader.restarts_s == [1, 1, 1] and loader.restart_share(1.0) == 0


def test_the_first_batch_of_two_workers_takes_twice_as_long_as_the_others_seem_to():
    """Two workers take 2 s for a batch: the first two arrive after 2 s, six more in 6 s. A restart of 3 s costs one."""
    loader = EndlessLoader([0])
    loader.epochs_batches, loader.restarts_s = [8], [2.0]
    assert loader.restart_share(8 / 8, workers=2) == 0
    loader.restarts_s = [3.0]
    assert loader.restart_share(9 / 8, workers=2) == pytest.approx(1 / 9)
    assert loader.restart_share(9 / 8, workers=8) == 0


class Web:
    """As webdataset.WebLoader: a pipeline whose first stage is a DataLoader."""

    def __init__(self, loader: object) -> None:
        self.pipeline = [loader]


def test_settings_are_read_from_a_dataloader_and_from_what_holds_one():
    loader = DataLoader(Numbers(), num_workers=2, batch_size=4)
    expected = LoaderFacts("torch.utils.data.dataloader.DataLoader", 2, 2, False, False)
    assert facts_of(loader) == expected
    assert replace(facts_of(Web(loader)), kind=expected.kind) == expected
    assert facts_of([1]) == LoaderFacts("builtins.list")


DECODING = LoaderEvidence(
    supply=500,
    demand=2000,
    facts=LoaderFacts("loader", 1, 2, False, False),
    cores=8,
    workers=1,
    worker_cores=0.98,
    main_cores=0.05,
    thread_cores=0,
    neighbour_cores=0,
    trainer_cores=0,
    restart_share=0,
)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({}, "few workers"),
        ({"worker_cores": 0.1}, "waiting"),
        ({"workers": 0, "worker_cores": 0, "main_cores": 0.9}, "one process"),
        ({"workers": 0, "worker_cores": 0, "main_cores": 0.1}, "waiting"),
        ({"workers": 8, "worker_cores": 7.6}, "cores"),
        ({"neighbour_cores": 7}, "neighbours"),
        ({"workers": 6, "worker_cores": 3.6, "main_cores": 0.97}, "main process"),
        ({"restart_share": 0.3}, "epoch ends"),
        ({"restart_share": 0.3, "neighbour_cores": 7}, "neighbours"),
    ],
)
def test_the_rules_name_what_limits_a_loader(changes: dict[str, float], cause: str):
    assert cause_of_slow_loader(replace(DECODING, **changes)).name == cause


def cpu(workers: float = 0.0, main: float = 0.0) -> CpuUse:
    """CPU use over ten seconds, in cores."""
    return CpuUse(10.0, {**dict.fromkeys(GROUPS, 0.0), "main": 10 * main}, 10 * workers, 0.0)


def observed(workers: int, **changes: float) -> Observed:
    facts = LoaderFacts("loader", workers, 2, False, False)
    seen = Observed(facts, BATCH, (ProcessCpu(7, "pt_data_worker", 9.0),), 0, 0.0, 0.0)
    return replace(seen, **changes)


def report(batch_s: float, step_s: float, loader: CpuUse, seen: Observed, trainer_cores: float = 0.0, queue: int = 4):
    """The report of a loader of one batch in `batch_s` on 8 cores, in virtual time."""
    run = SimulatedTraining((batch_s,), step_s=step_s, queue_depth=queue).measure(asynchronous=False)
    measured = replace(run, loader_cpu=loader, replay_cpu=cpu(main=trainer_cores))
    return report_of(measured, seen, 0.95, 8.0)


def test_a_loader_whose_one_worker_decodes_all_the_time():
    """Four times too slow: the report asks for workers, and for as many as the demand requires."""
    found = report(0.08, 0.02, cpu(workers=0.99), observed(1))
    assert found.account.verdict == "input-bound: CPU work" and found.cause.name == "few workers"
    assert found.account.au == pytest.approx(0.25, rel=0.05)
    assert found.account.parts["CPU work"] == pytest.approx(0.75, rel=0.05)
    assert sum(found.account.parts.values()) == pytest.approx(found.account.stall)
    assert found.actions[0].what == "num_workers=5 (now 1)"
    assert found.actions[0].img_s == pytest.approx(found.account.demand)
    assert "num_workers=5" in str(found) and "pt_data_worker" in json.dumps(found.record())


def test_a_loader_whose_workers_wait_for_their_storage():
    found = report(0.08, 0.02, cpu(workers=0.2), observed(2))
    assert found.account.verdict == "input-bound: waiting" and found.cause.name == "waiting"
    assert found.actions[0].what == "num_workers=9 (now 2)"
    assert "faster or local disk" in found.actions[1].what


def test_a_loader_that_uses_every_core_requires_cheaper_images():
    """More workers would help nothing, so they are not proposed; the CPU time that an image may cost is."""
    found = report(0.08, 0.02, cpu(workers=7.7), observed(8))
    assert found.cause.name == "cores" and not any("num_workers" in action.what for action in found.actions)
    took, allowed = 1000 * 7.7 * 0.08 / BATCH, 1000 * 8 * 0.02 / BATCH
    assert f"takes {took:.2f} CPU ms, and the demand allows {allowed:.2f}" in str(found)


def test_a_loader_that_loses_its_time_between_epochs():
    found = report(0.08, 0.02, cpu(workers=3.0), observed(4, restart_share=0.5, epoch_ends=3, restart_s=2.0))
    assert found.account.verdict == "input-bound: epoch ends"
    assert "persistent_workers=True" in found.actions[0].what
    assert found.actions[0].img_s == pytest.approx(3200, rel=0.01)
    assert "ended 3 times; the next batch took 2.00 s, 50% of the loader's time" in str(found)


def test_a_loader_that_keeps_up():
    found = report(0.005, 0.02, cpu(workers=2.0), observed(2))
    assert found.account.verdict == "compute-bound" and found.cause.name == "none" and not found.actions


def test_a_loader_without_prefetch_works_only_while_the_trainer_does_not():
    """As fast as the trainer alone, half as fast together: a worker process would overlap the two."""
    clock, made = VirtualClock(), iter(range(10**6))

    def loader():
        for number in made:
            clock.advance(0.02)
            yield [number] * BATCH

    def step(batch: list[int]) -> None:
        clock.advance(0.02)

    found = diagnose(loader(), step, window_s=4, rounds=3, clock=clock)
    assert found.account.au == pytest.approx(0.5) and found.account.verdict == "contention"
    assert found.observed.batch == BATCH and found.observed.workers == 0
    assert found.account.supply == pytest.approx(BATCH / 0.02)
    assert found.cause.name == "no prefetch" and "make batches ahead" in found.actions[0].what


class Numbers(Dataset):
    """Images whose decoding is emulated by arithmetic."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, number: int) -> torch.Tensor:
        ends_s = time.process_time() + 0.0005
        while time.process_time() < ends_s:
            pass
        return torch.zeros(3, 8, 8)


def test_a_torch_dataloader_is_diagnosed():
    """Real, with a worker process that is started again for every epoch; no figure is asserted."""
    found = diagnose(DataLoader(Numbers(), batch_size=8, num_workers=1), len, window_s=0.1, rounds=2)
    assert found.account.verdict.startswith(("input-bound: ", "contention")) and found.account.au < 0.95
    assert found.observed.facts.num_workers == 1 and found.observed.epoch_ends > 0
    assert sum(process.cpu_s for process in found.observed.processes) > 0
    assert "DataLoader(num_workers=1, prefetch_factor=2" in str(found)
    json.dumps(found.record(), allow_nan=False)


def test_a_loader_alone_in_this_process():
    evidence, seen = measure_alone(DataLoader(Numbers(), batch_size=8), window_s=0.05, rounds=2)
    assert evidence.workers == 0 and evidence.supply > 0 and cause_of_slow_loader(evidence).name in LIMITS
    assert seen.batch == 8 and seen.facts.num_workers == 0


def test_worker_processes_of_a_dataloader_count_as_the_loader():
    """Not as other ranks, which the report would call them otherwise."""
    batches = iter(DataLoader(Numbers(), batch_size=8, num_workers=1))
    before = cpu_mark()
    assert len(list(zip(range(7), batches, strict=False))) == 7
    used = before.until(cpu_mark())
    del batches
    assert used.groups_s["loader"] > 0 and used.own_s >= sum(used.groups_s.values())


def test_cpu_time_of_children_that_have_ended_is_counted():
    watch = ProcessWatch()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.2: pass"], check=True)
    assert sum(use.cpu_s for use in watch.children()) >= 0.15  # the kernel counts hundredths of a second
    assert watch.own().cpu_s >= 0


def test_waiting_for_a_core_is_told_from_sleeping():
    """By the kernel's word on each process: 3 s of waiting for 1 s of work is a worker that other processes slow down;
    without such waiting it sleeps. A process that ended in between says nothing."""
    assert delay_ratio([ProcessCpu(1, "a", 1.5, 2.0), ProcessCpu(2, "b", 0.5, 4.0), ProcessCpu(0, "ended", 9.0)]) == 3
    assert delay_ratio([ProcessCpu(0, "ended", 9.0)]) is None
    use = ProcessCpu(1, "a", 5.0, 7.0).since(ProcessCpu(1, "a", 2.0, 3.0))
    assert (use.cpu_s, use.delay_s) == (3.0, 4.0)
    busy = replace(DECODING, worker_cores=0.25, neighbour_cores=7.5)
    assert cause_of_slow_loader(replace(busy, delay_ratio=3.0)).name == "neighbours"
    assert cause_of_slow_loader(replace(busy, delay_ratio=0.1)).name == "waiting"


def test_nothing_of_torch_or_dali_is_imported():
    """A loader of plain lists is diagnosed where neither is installed."""
    code = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "nvidia", "numba", "webdataset"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
from pipeline.diagnosis.any_loader import diagnose
print(diagnose([[1, 2, 3]] * 4, len, window_s=0.01, rounds=2))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0 and done.stdout.startswith("verdict "), done.stderr
