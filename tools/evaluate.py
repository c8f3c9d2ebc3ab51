"""Scores checkpoints on a shard set: top-1 and top-5 of the centre crop, or of the paper's ten views averaged.

    python tools/evaluate.py data/imagenet-256/val runs/NAME/checkpoints/step-000910000 --views 10

Prints a line per checkpoint. The eigenbasis (for the mean) is that of the training set: the
train folder beside SHARDS, or --train. Exits with 2 on wrong input.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch

from model.checkpoint import load_model
from model.evaluation import evaluate
from model.recipe import RECIPES
from pipeline import rgb_pca
from pipeline.loader.loader import Batch, view_loader
from pipeline.loader.settings import Device, LoaderSettings
from pipeline.shards.reader import open_shards
from tools.shared.cli import Progress, run, write_json


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, metavar="SHARDS")
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--views", type=int, choices=(1, 10), default=1, help="default: %(default)s")
    parser.add_argument("--train", type=Path, metavar="SHARDS", help="the training set; default: train beside SHARDS")
    parser.add_argument("--batch", type=int, default=128, metavar="N", help="views at once; default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what the screen says")
    return parser.parse_args()


def main() -> int:
    """Scores every checkpoint."""
    args = parse()
    shards = open_shards(args.shards)
    train = open_shards(args.train or args.shards.parent / "train")
    basis = rgb_pca.load(train.folder / "eigenbasis.json", train)
    device: Device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = LoaderSettings(batch=max(1, args.batch // args.views), device=device)
    record = {}
    for path in args.checkpoints:
        model = load_model(path, RECIPES).to(device)
        if model.spec.classes != len(shards.manifest.classes):
            found = len(shards.manifest.classes)
            raise ValueError(f"{path}: a network of {model.spec.classes} classes, but {args.shards} has {found}")
        feed = replace(settings, mean=model.recipe.mean)
        with Progress(path.name, len(shards)) as progress:
            scores = evaluate(model, counted(view_loader(shards, basis, feed, args.views), progress))
        record[str(path)] = asdict(scores)
        told = f"top-1 {scores.top1:.2%}, top-5 {scores.top5:.2%}, loss {scores.loss:.4f}"
        print(f"{path}: {told}, {scores.images:,} images")
    write_json(args.json, {"shards": str(args.shards), "views": args.views, "checkpoints": record})
    return 0


def counted(batches: Iterable[Batch], progress: Progress) -> Iterator[Batch]:
    """The batches, as they pass counted in images."""
    for batch in batches:
        yield batch
        progress(len(batch.labels))


if __name__ == "__main__":
    run(main)
