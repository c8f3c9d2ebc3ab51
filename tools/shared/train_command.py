"""All of tools/train.py except its arguments: the ranks meet, agree, open the run folder, train and report."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import warnings
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

from model import checkpoint
from model.parallel.meeting import meet, restarts
from model.parallel.mesh import Place
from model.parallel.ranks import Ranks, start
from model.run_lock import RunLock
from model.runs import CONFIG, LOCK, LOG
from model.trainer import Diverged
from pipeline.loader.settings import Device
from tools.shared.cli import cores
from tools.shared.job import Job, resolve
from tools.shared.provenance import launch
from tools.shared.rank_agreement import first_rank_first, is_lost_connection, require_same, require_same_options
from tools.shared.rank_choice import default_device
from tools.shared.resume_point import choose_checkpoint
from tools.shared.run_output import logged
from tools.shared.stop_signals import StopSignals, exit_code, resume_command
from tools.shared.training_run import TrainingRun, warn

SHORTEST_HANG_S = 30.0  # for torch.distributed's own timeout: its ranks may take this long to meet


def train_from_arguments(args: argparse.Namespace) -> int:
    """Runs tools/train.py with its parsed arguments on this rank and returns the exit code."""
    # The check of the device says it in one line, on the first rank only.
    warnings.filterwarnings("ignore", message="CUDA initialization", category=UserWarning)
    device: Device = args.device or default_device()
    # Twice as long as the watchdog's limit: the watchdog ends a hanging job first, and its message names the rank.
    timeout_s = 2 * max(args.hang_seconds, SHORTEST_HANG_S)
    meeting = meet(timeout_s)
    try:
        require_same_options(meeting, args)  # first: another --layout would build other process groups
        first_rank_first(meeting, lambda: Place.of(meeting.rank, meeting.world, args.layout))
        return _train(args, device, start(args.layout, device, timeout_s, meeting, cores()))
    except RuntimeError as error:
        if meeting.world == 1 or not is_lost_connection(error) or os.environ.get("TRACEBACK"):
            raise
        print(f"train.py: rank {meeting.rank}: another rank ended; its own message says why", file=sys.stderr)
        return 1


def _train(args: argparse.Namespace, device: Device, ranks: Ranks) -> int:
    meeting = ranks.meeting
    job = first_rank_first(meeting, lambda: resolve(args, device, ranks))
    sets = {"train": job.shards.manifest_sha256, "val": job.val.manifest_sha256 if job.val else None}
    require_same(meeting, "data", {f"manifest of the {name} set": digest for name, digest in sets.items()})
    with ExitStack() as stack:
        lock: AbstractContextManager[Any] = RunLock(job.folder.path / LOCK) if ranks.first else nullcontext()
        first_rank_first(meeting, lambda: stack.enter_context(lock))
        signals = stack.enter_context(StopSignals())
        changed = first_rank_first(meeting, lambda: _begin(args, job) if ranks.first else [])
        stack.enter_context(logged(job.folder.path / LOG if ranks.first else None))
        for line in changed:
            print(f"changed    {line}")
        if ranks.any(not (job.folder.path / CONFIG).is_file()) and ranks.first:
            warn(
                f"{job.folder.path}: not all ranks see this run folder; only rank 0 writes to it, so to resume, start "
                f"rank 0 on {platform.node()} again, or put --runs on a file system that all ranks share"
            )
        begin_from = first_rank_first(meeting, lambda: choose_checkpoint(job) if ranks.first else job.resume_from)
        run = TrainingRun(job, signals, begin_from)
        code = train_and_report(run)
        if run.ranks_apart:  # they may wait for one another for ever
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        ranks.leave()
    return code


def _begin(args: argparse.Namespace, job: Job) -> list[str]:
    # Ranks that torchrun restarts after a failure resume by themselves, if the same torchrun started the run.
    resume = args.resume or bool(args.resume_from) or (restarts() > 0 and job.folder.launch() == launch())
    return job.folder.begin(job.config(), resume, ["decoding"] if args.accept_decoder_change else [])


def train_and_report(run: TrainingRun) -> int:
    """Trains from the run's last checkpoint on, measures the stall report, and returns the exit code."""
    job = run.job
    state, checkpoints = run.trainer.state, job.folder.checkpoints
    try:
        finished = run.train()
    except Diverged as error:
        if job.ranks.first:
            print(f"train.py: {error}; checkpoints are in {checkpoints}", file=sys.stderr)
        return 1
    if not finished:
        run.say(f"stopped after optimizer step {state.optimizer_steps:,}; continue with: {resume_command()}")
        return exit_code(run.stopped_by) if run.saved else 1
    stopped_by = run.report() if job.stall_s else 0
    if best := checkpoint.best(checkpoints):
        run.say(f"best checkpoint: {best}")
    run.say(f"run folder: {job.folder.path}")
    return exit_code(stopped_by) if run.saved and stopped_by else int(not run.saved)
