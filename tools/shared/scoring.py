"""Scores of several checkpoints and of their ensemble on a shard set, in one pass over its images."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.alexnet import AlexNet
from model.checkpoint import load_data, load_model
from model.class_scores import ClassScores, ClassTally
from model.ensemble import weighted_mean
from model.evaluation import Scores, Tally, class_probabilities
from model.parallel.ranks import Ranks
from model.recipe import RECIPES
from pipeline.loader.loader import view_loader
from pipeline.loader.settings import LoaderSettings
from pipeline.rgb_pca import Eigenbasis, eigenbasis_path
from pipeline.shards.reader import ShardSet, open_shards
from tools.shared.checkpoint_data import eigenbasis_of_checkpoint
from tools.shared.cli import Progress


@dataclass(frozen=True)
class TrainedNet:
    """The network of a checkpoint, in evaluation mode on its device.

    Attributes:
        path: the checkpoint.
        model: the network.
        basis: the eigenbasis of its training set, with the mean image.
    """

    path: Path
    model: AlexNet
    basis: Eigenbasis


@dataclass(frozen=True)
class Scoring:
    """What is scored, and how.

    Attributes:
        nets: the networks.
        settings: of the data loader.
        views: views of an image, 1 or 10.
        ranks: this rank among the others; each scores a part of the images.
    """

    nets: list[TrainedNet]
    settings: LoaderSettings
    views: int
    ranks: Ranks


@dataclass(frozen=True)
class Result:
    """Scores over the images of all ranks.

    Attributes:
        paths: the checkpoints.
        each: scores of each checkpoint.
        weights: weights of the ensemble.
        ensemble: scores of the ensemble; of the only checkpoint if there is one.
        by_class: scores by class of the ensemble.
        left_out: damaged images that were left out: the place and the reason of each.
    """

    paths: list[Path]
    each: list[Scores]
    weights: list[float]
    ensemble: Scores
    by_class: ClassScores
    left_out: list[str]


def open_nets(args: argparse.Namespace, device: torch.device) -> tuple[ShardSet, ShardSet | None, list[TrainedNet]]:
    """Opens what the arguments of tools/evaluate.py name: the shard set, the set of --fit-weights, the checkpoints.

    Raises:
        ValueError: a file is damaged, or a checkpoint was trained with other classes or another mean.
    """
    shards = open_shards(args.shards)
    fit_on = open_shards(args.fit_weights) if args.fit_weights else None
    nets = []
    for path in args.checkpoints:
        net = TrainedNet(path, load_model(path, RECIPES).eval().to(device), eigenbasis_of_checkpoint(path))
        for one in (shards, *([fit_on] if fit_on else [])):
            if net.model.spec.classes != len(one.manifest.classes) or not args.force:
                check_classes(path, load_data(path).classes, one)
        if not args.force:
            check_mean(path, net.basis, args.train or args.shards.parent / "train", required=args.train is not None)
        nets.append(net)
    return shards, fit_on, nets


def check_classes(path: Path, classes: list[list[str]], shards: ShardSet) -> None:
    """Raises ValueError if the shard set has other classes than the checkpoint, or another order of them."""
    trained, found = [wnid for wnid, _ in classes], [one.wnid for one in shards.manifest.classes]
    if trained == found:
        return
    remedy = "score on a shard set with the classes of training"
    if len(trained) != len(found):
        raise ValueError(f"{path}: trained on {len(trained)} classes, but {shards.folder} has {len(found)}; {remedy}")
    label = next(label for label, (one, other) in enumerate(zip(trained, found, strict=True)) if one != other)
    differ = f"class {label} is {trained[label]}, but {found[label]} in {shards.folder}"
    raise ValueError(f"{path}: {differ}; {remedy}, or add --force")


def check_mean(path: Path, basis: Eigenbasis, train: Path, required: bool) -> None:
    """Raises ValueError if the eigenbasis of the training set `train` has another mean than that of the checkpoint.

    Args:
        path: the checkpoint.
        basis: its eigenbasis.
        train: the folder of a training set; only its eigenbasis.json is read.
        required: whether the file must be there; otherwise its absence is no error.
    """
    file = eigenbasis_path(train)
    if not file.is_file() and not required:
        return
    try:
        mean = [float(value) for value in json.loads(file.read_text())["mean"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not an eigenbasis ({error}); run: python tools/compute_pca.py {train}") from error
    if mean != basis.mean.tolist():
        shown = [", ".join(f"{value:.1f}" for value in values) for values in (basis.mean, mean)]
        differ = f"trained with the mean {shown[0]}, but {file} has {shown[1]}"
        raise ValueError(f"{path}: {differ}; score on shards made like those of training, or add --force")


def score(scoring: Scoring, shards: ShardSet, weights: list[float]) -> Result:
    """Scores every network and the ensemble with these weights. Every rank must call it."""
    ranks, nets = scoring.ranks, scoring.nets
    each, ensemble = [Tally(ranks.device) for _ in nets], Tally(ranks.device)
    by_class = ClassTally(len(shards.manifest.classes), ranks.device)
    left_out = list[str]()
    for probabilities, labels in _predictions(scoring, shards, "scoring", left_out):
        for tally, own in zip(each, probabilities, strict=True):
            tally.add(own, labels)
        mean = weighted_mean(probabilities, weights)
        ensemble.add(mean, labels)
        by_class.add(mean, labels)
    scores = [tally.scores(ranks) for tally in (*each, ensemble)]
    if not scores[-1].images:
        raise ValueError(f"{shards.folder}: no image of it can be decoded; make the shard set again")
    paths, names = [net.path for net in nets], _of_all_ranks(ranks, left_out)
    return Result(paths, scores[:-1], weights, scores[-1], by_class.scores(ranks), names)


def probabilities_and_labels(scoring: Scoring, shards: ShardSet) -> tuple[list[Tensor], Tensor]:
    """This rank's class probabilities (N, classes) of each network, float32, and labels (N,), all on the CPU."""
    kept: list[list[Tensor]] = [[] for _ in scoring.nets]
    labels = [torch.empty(0, dtype=torch.int64)]
    for probabilities, found in _predictions(scoring, shards, "classifying, to fit the weights", []):
        for parts, own in zip(kept, probabilities, strict=True):
            parts.append(own.float().cpu())
        labels.append(found.cpu())
    none = torch.empty(0, len(shards.manifest.classes))
    return [torch.cat([none, *parts]) for parts in kept], torch.cat(labels)


def _predictions(
    scoring: Scoring, shards: ShardSet, what: str, left_out: list[str]
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Yields, for each batch of this rank, the class probabilities of every network and the labels.

    Networks with the same mean image share a data loader, so each image is decoded once for all of them. Damaged images
    are added to `left_out`.
    """
    ranks, nets = scoring.ranks, scoring.nets
    loader_of = [next(n for n, one in enumerate(nets) if _same_mean(one, net)) for net in nets]
    place, used = ranks.place, sorted(set(loader_of))
    loaders = [
        view_loader(
            shards,
            nets[n].basis,
            replace(scoring.settings, mean=nets[n].model.recipe.mean),
            scoring.views,
            place.rank,
            place.world,
        )
        for n in used
    ]
    with Progress(what, -(-len(shards) // ranks.place.world), quiet=not ranks.first) as progress:
        for batches in zip(*loaders, strict=True):
            first = batches[0]
            assert all(torch.equal(batch.ids, first.ids) for batch in batches)
            left_out.extend(first.left_out)
            if len(first.labels):
                images = [batches[used.index(n)].images for n in loader_of]
                found = [class_probabilities(net.model, own) for net, own in zip(nets, images, strict=True)]
                yield [each for each in found if each is not None], first.labels
            progress(len(first.labels) + len(first.left_out))


def _same_mean(one: TrainedNet, other: TrainedNet) -> bool:
    """Whether the same mean is subtracted from the images of two networks, which then can share a data loader."""
    same = [np.array_equal(getattr(one.basis, name), getattr(other.basis, name)) for name in ("mean", "mean_image")]
    return all(same) and one.model.recipe.mean == other.model.recipe.mean


def _of_all_ranks(ranks: Ranks, names: list[str]) -> list[str]:
    """On the first rank the names of all ranks, in their order; on the others their own. Every rank must call it."""
    if ranks.store is None:
        return names
    ranks.store.set(f"left out/{ranks.place.rank}", json.dumps(names))
    ranks.any(False)  # all have written theirs
    if ranks.first:
        names = [name for rank in range(ranks.place.world) for name in json.loads(ranks.store.get(f"left out/{rank}"))]
    ranks.any(False)  # the rank that hosts the store must not end before all have read it
    return names
