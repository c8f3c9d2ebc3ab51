"""Scores checkpoints on a shard set: top-1, top-5 and loss of the centre crop, or of ten views averaged.

    python tools/evaluate.py data/imagenet-256/val runs/NAME/checkpoints/step-000910000 --views 10

Prints a line for each checkpoint. The ten views are those of the paper (section 4.1): four corners and the centre, and
their mirror images. The mean image comes from the eigenbasis.json of the training set, which is the folder "train"
beside SHARDS unless --train names another. Exits with 2 on wrong input.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tools.shared.cli import Progress, run, write_json

if TYPE_CHECKING:
    from pipeline.loader.loader import Batch
    from pipeline.loader.settings import Device


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="the shard set to score on")
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT", help="a folder step-... of a run")
    parser.add_argument("--views", type=int, choices=(1, 10), default=1, help="views of an image; default: %(default)s")
    parser.add_argument("--train", type=Path, metavar="SHARDS", help="the training set; default: train beside SHARDS")
    parser.add_argument("--batch", type=int, default=128, metavar="N", help="views at a time; default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a CUDA device")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the scores to FILE")
    args = parser.parse_args()
    if args.batch < 1:
        raise ValueError(f"--batch {args.batch}, expected at least 1")
    return args


def main() -> int:
    """Scores every checkpoint."""
    args = parse()
    # Imported here, so that --help does not wait for torch and DALI.
    import torch

    from model.checkpoint import load_model
    from model.evaluation import evaluate
    from model.recipe import RECIPES
    from pipeline import rgb_pca
    from pipeline.loader.loader import view_loader
    from pipeline.loader.settings import LoaderSettings, check_device
    from pipeline.shards.reader import open_shards

    device: Device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    shards = open_shards(args.shards)
    train = open_shards(args.train or args.shards.parent / "train")
    basis = rgb_pca.load_for(train)
    settings = LoaderSettings(batch=max(1, args.batch // args.views), device=device)
    record = {}
    for path in args.checkpoints:
        model = load_model(path, RECIPES).to(device)
        if model.spec.classes != len(shards.manifest.classes):
            found = f"a network of {model.spec.classes} classes, but {args.shards} has {len(shards.manifest.classes)}"
            raise ValueError(f"{path}: {found}; score on a shard set with the classes of training")
        batches = view_loader(shards, basis, replace(settings, mean=model.recipe.mean), args.views)
        with Progress(path.name, len(shards)) as progress:
            scores = evaluate(model, counted(batches, progress))
        record[str(path)] = asdict(scores)
        figures = f"top-1 {scores.top1:.2%}, top-5 {scores.top5:.2%}, loss {scores.loss:.4f}"
        print(f"{path}: {figures}, {scores.images:,} images")
    write_json(args.json, {"shards": str(args.shards), "views": args.views, "checkpoints": record})
    return 0


def counted(batches: Iterable[Batch], progress: Progress) -> Iterator[Batch]:
    """Yields the batches and counts their images."""
    for batch in batches:
        yield batch
        progress(len(batch.labels))


if __name__ == "__main__":
    run(main)
