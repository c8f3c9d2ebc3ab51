"""The settings of a training run: resolves and checks everything that the arguments of tools/train.py name."""

from __future__ import annotations

import argparse
import platform
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from model import checkpoint
from model.changes import changed
from model.parallel.half_batches import swaps_crops
from model.parallel.ranks import Ranks, cores_of_rank, first_here, ranks_here
from model.recipe import Recipe, lighting_noise, recipe
from model.runs import CONFIG, RunFolder
from model.shapes import NetSpec
from model.step_options import check_step
from model.trainer import LoopSettings
from model.transfer import check_source, with_frozen
from pipeline import rgb_pca
from pipeline.diagnosis.tuning import load_tuned
from pipeline.loader.augment import Lighting
from pipeline.loader.loader import TrainLoader
from pipeline.loader.order import local_batch, steps_per_epoch
from pipeline.loader.settings import Device, LoaderSettings, check_decoder, check_device, check_library, default_threads
from pipeline.rgb_pca import Eigenbasis
from pipeline.shards.reader import ShardSet, open_shards
from tools.shared.cli import Progress, cores
from tools.shared.provenance import git_commit, launch, library_versions

MOST_THREADS = 8  # of one rank's loader; DALI advises 4 to 8 for one GPU


@dataclass(frozen=True)
class Job:
    """Everything that a training run needs, resolved and checked.

    Attributes:
        shards: the train shard set.
        val: the shard set to validate on; None for no validation.
        basis: the RGB PCA (principal component analysis) eigenbasis of `shards`.
        recipe: the settings of 2012, with the scale of the learning rates.
        spec: size of the network.
        loader: settings of the data loader.
        loop: length of the run, and how often it logs and saves.
        folder: where the run writes.
        stall_s: seconds of each measurement of the stall report; 0 for no report.
        hang_s: seconds without progress after which the job ends.
        ranks: this rank among the ranks of the job.
        resume_from: checkpoint to continue from; None for the run's last one.
        init_from: checkpoint whose layers a new run starts with, and which layers; None to start from random weights.
        tensorboard: whether event files for TensorBoard are written.
        prometheus: whether metrics.prom for Prometheus is written.
    """

    shards: ShardSet
    val: ShardSet | None
    basis: Eigenbasis
    recipe: Recipe
    spec: NetSpec
    loader: LoaderSettings
    loop: LoopSettings
    folder: RunFolder
    stall_s: float
    hang_s: float
    ranks: Ranks
    resume_from: Path | None = None
    init_from: tuple[Path, str] | None = None
    tensorboard: bool = False
    prometheus: bool = False

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return self.ranks.device

    def local_loader(self, epoch: int = 0, step: int = 0) -> TrainLoader:
        """Returns a loader of the rows that this rank decodes, from `step` of `epoch` on."""
        place = self.ranks.place
        crops_only = swaps_crops(self.ranks)
        return TrainLoader(self.shards, self.basis, self.loader, epoch, step, place.rank, place.world, crops_only)

    def config(self) -> dict[str, Any]:
        """Returns the content of config.json: the settings that decide the losses, and where the run was started.

        A run can be resumed only with the same `must_match`. Changes of `may_change` are recorded.
        """
        rules = asdict(self.recipe)
        lr_scale = rules.pop("learning_rate_scale")
        return {
            "must_match": {
                "recipe": rules,
                "spec": asdict(self.spec),
                "batch": self.loader.batch,
                "order": [self.loader.order, self.loader.window_shards],
                "seed": self.loop.seed,
                "epochs": self.loop.epochs,
                "precision": self.loop.precision,
                "decoding": decoding(self.loader, self.ranks.place.world),
                "init_from": [str(self.init_from[0]), self.init_from[1]] if self.init_from else None,
                "train_manifest_sha256": self.shards.manifest_sha256,
                "eigenvalues": self.basis.eigenvalues.tolist(),
            },
            "may_change": {
                "lr_scale": lr_scale,
                "val_set": self.val.manifest_sha256 if self.val else None,
                "lrn": self.loop.lrn,
                "cuda_graph": self.loop.cuda_graph,
            },
            "loader": asdict(self.loader),
            "train": str(self.shards.folder),
            "val": str(self.val.folder) if self.val else None,
            "python": platform.python_version(),
            "ranks": asdict(self.ranks.place),
            "launch": launch(),
            "versions": library_versions(),
            "git_commit": git_commit(),
        }


def resolve(args: argparse.Namespace, device: Device, ranks: Ranks) -> Job:
    """Opens and checks everything that the arguments of tools/train.py name.

    Raises:
        ValueError: the device is absent, a shard set is damaged, or arguments contradict each other.
    """
    check_device(device)
    check_library(args.loader)
    check_step(ranks.device, args.precision, args.lrn, args.cuda_graph, ranks.place.world)
    rules = _recipe(args, ranks)
    if args.resume_from and ranks.first and (faults := checkpoint.faults(args.resume_from)):
        raise ValueError("; ".join(faults))
    if args.init_from and not (args.runs / args.run_name / CONFIG).is_file():  # a resumed run does not read it
        check_source(args.init_from, args.width)
    shards, val = _open_both(args)
    spec = NetSpec(len(shards.manifest.classes), args.width)
    epochs = rules.epochs if args.epochs is None else args.epochs
    loader = _loader_settings(args, device, rules, epochs)
    local_batch(loader.batch, ranks.place.world)  # raises ValueError if the ranks cannot share the batch evenly
    steps = steps_per_epoch(len(shards), loader.batch)
    return Job(
        shards=shards,
        val=val,
        basis=rgb_pca.load_for(shards),
        recipe=rules,
        spec=spec,
        loader=loader,
        loop=LoopSettings(
            epochs,
            steps,
            args.seed,
            args.log_every,
            args.precision,
            args.steps,
            args.save_every,
            args.lrn,
            args.cuda_graph,
        ),
        folder=RunFolder(args.runs / args.run_name),
        stall_s=args.stall_seconds,
        hang_s=args.hang_seconds,
        ranks=ranks,
        resume_from=args.resume_from,
        init_from=(args.init_from, args.init_layers) if args.init_from else None,
        tensorboard=args.tensorboard,
        prometheus=args.prometheus,
    )


def _recipe(args: argparse.Namespace, ranks: Ranks) -> Recipe:
    rules = replace(changed(recipe(args.recipe), args.change), learning_rate_scale=args.lr_scale)
    if args.freeze:
        rules = with_frozen(rules, args.freeze)
    if rules.structure == "one-tower" and ranks.place.is_pair:
        raise ValueError("one tower cannot be divided between the ranks of a pair; add --layout data")
    if rules.plateau is not None and args.val is None:
        raise ValueError(f"recipe {rules.name} lowers its learning rates by the validation error; add --val SHARDS")
    return rules


def _open_both(args: argparse.Namespace) -> tuple[ShardSet, ShardSet | None]:
    with Progress("hashing tars", None, "B", quiet=not first_here()) as progress:
        shards = open_shards(args.shards, progress)
        val = open_shards(args.val, progress) if args.val else None
    if val is not None and val.manifest.classes != shards.manifest.classes:
        found = f"its classes differ from those of {shards.folder}"
        raise ValueError(f"{val.folder}: {found}; make both shard sets from one source")
    return shards, val


def _loader_settings(args: argparse.Namespace, device: Device, rules: Recipe, epochs: int) -> LoaderSettings:
    """Settings of speed come from `--threads` if given, otherwise from `--tuned` if given, otherwise from defaults."""
    check_decoder(device, args.hw_decoder_load)
    speed: dict[str, Any] = {"threads": default_loader_threads()}
    if args.tuned:
        speed |= load_tuned(args.tuned)
    if args.threads is not None:
        speed |= {"threads": args.threads}
    return LoaderSettings(
        batch=rules.batch if args.batch is None else args.batch,
        seed=args.seed,
        device=device,
        library=args.loader,
        lighting=Lighting(rules.lighting, rules.lighting_noise),
        lighting_until=first_epoch_without_noise(rules, epochs),
        mean=rules.mean,
        positions=rules.crop_positions,
        order=args.order,
        on_bad_sample=args.on_bad_sample,
        check_crc=args.check_crc,
        hw_decoder_load=args.hw_decoder_load or 0.0,
        **speed,
    )


def decoding(loader: LoaderSettings, ranks: int) -> dict[str, Any]:
    """Returns what decides which decoder gets an image: the library, if it is not DALI; the share of the JPEG engines
    and, if it is not 0, the number of ranks, because DALI divides the batch of each rank."""
    share = loader.hw_decoder_load
    library = {"library": loader.library} if loader.library != "dali" else {}
    return {"hw_decoder_load": share} | ({"ranks": ranks} if share else {}) | library


def default_loader_threads() -> int:
    """Returns the loader's default number of threads for this rank's share of the machine's cores."""
    return default_threads() if ranks_here() == 1 else min(MOST_THREADS, cores_of_rank(cores()) + 1)


def first_epoch_without_noise(rules: Recipe, epochs: int) -> int:
    """Returns the first of `epochs` epochs without PCA lighting noise, or `epochs` if all have noise."""
    return next((epoch for epoch in range(epochs) if lighting_noise(rules, epoch, epochs) == 0), epochs)
