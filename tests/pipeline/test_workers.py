"""Workers: any kind of worker gives the results of a plain loop; errors and dead workers are reported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count, repeat
from pathlib import Path

import psutil
import pytest

from pipeline.workers import IN_PROCESS, JOBS_PER_WORKER, Workers, workers_of

NUMBERS = list(range(23))
ROOT = Path(__file__).parents[2]


def square(number: int) -> int:
    """A job that worker processes can import."""
    return number * number


def die(number: int) -> int:
    """A job that kills its worker."""
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.fixture(params=["alone", "threads", "processes"])
def workers(request: pytest.FixtureRequest):
    """Every kind of worker but a cluster."""
    match request.param:
        case "alone":
            yield IN_PROCESS
        case "threads":
            with ThreadPoolExecutor(3) as pool:
                yield Workers(pool, 3)
        case "processes":
            with workers_of(2, "pipeline.workers") as made:
                yield made


def test_map_gives_the_results_in_order(workers: Workers):
    """As the built-in map does; one of the arguments may be endless."""
    assert list(workers.map(pow, NUMBERS, repeat(2))) == [square(n) for n in NUMBERS]


def test_as_done_gives_every_result_once(workers: Workers):
    """In any order."""
    assert sorted(workers.as_done(square, NUMBERS)) == [square(n) for n in NUMBERS]


def test_arguments_are_taken_only_when_a_job_can_be_queued():
    """From an endless iterable, at most as many are taken as results were requested and jobs are queued."""
    taken: list[int] = []
    with ThreadPoolExecutor(2) as pool:
        results = Workers(pool, 2).as_done(square, (taken.append(n) or n for n in count()))
        for _ in range(10):
            next(results)
        results.close()
    assert len(taken) <= 10 + 2 * JOBS_PER_WORKER + 1


def test_an_error_in_a_job_is_raised_in_the_caller(workers: Workers):
    """With its own type."""
    with pytest.raises(ZeroDivisionError):
        list(workers.map(pow, [2, 0, 3, 4], repeat(-1)))


def test_a_worker_that_dies_is_an_error_that_says_what_to_do():
    """The kernel kills a worker, for example, when memory runs out."""
    with pytest.raises(OSError, match=r"a worker died .* run the same command again"):  # noqa: SIM117
        with workers_of(2, "pipeline.workers") as workers:
            list(workers.as_done(die, NUMBERS))


def test_workers_end_with_a_caller_that_is_killed(tmp_path: Path):
    """SIGKILL leaves the caller no time to stop its workers. They exit all the same, busy or idle."""
    script = (
        "import os, signal, tests_pid; from pipeline.workers import workers_of\n"
        "def main():\n"
        "    with workers_of(2, 'pipeline.workers') as workers:\n"
        "        for pid in workers.as_done(tests_pid.of, range(8)):\n"
        "            print(pid, flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "if __name__ == '__main__': main()\n"
    )
    (tmp_path / "tests_pid.py").write_text("import os\ndef of(number): return os.getpid()\n")
    (tmp_path / "caller.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, tmp_path / "caller.py"], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    for pid in set(done.stdout.split()):
        with suppress(psutil.NoSuchProcess):
            psutil.Process(int(pid)).wait(timeout=60)


def test_large_modules_are_imported_without_garbage_collection():
    """They are kept out of later collections, and collection goes on afterwards."""
    script = (
        "import gc, sys; from pipeline.workers import import_quickly\n"
        "import_quickly('sched'); print('sched' in sys.modules, gc.isenabled(), gc.get_freeze_count() > 0)\n"
        "gc.unfreeze(); import_quickly('sched'); print(gc.get_freeze_count())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "True True True\n0\n", done.stderr


@pytest.mark.parametrize("count", [0, -1])
def test_fewer_than_one_worker_is_an_error(count: int):
    """The message says what was expected."""
    with pytest.raises(ValueError, match=f"{count} workers, expected at least 1"), workers_of(count, ""):
        pass


@pytest.mark.slow  # Dask waits 10 s for a scheduler
def test_a_missing_cluster_is_an_error_that_says_what_to_do():
    """The message names the command that starts a scheduler."""
    pytest.importorskip("distributed")
    with pytest.raises(ValueError, match="no Dask scheduler there"), workers_of(1, "", engine="tcp://127.0.0.1:9"):
        pass
