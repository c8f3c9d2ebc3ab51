"""Scores checkpoints on a shard set: top-1, top-5 and loss of the centre crop, or of ten views averaged.

    python tools/evaluate.py data/imagenet-256/val runs/NAME/checkpoints/step-000910000 --views 10

Prints a line for each checkpoint. The ten views are those of the paper (section 4.1): four corners and the centre, and
their mirror images. The classes and the mean image are those that the checkpoint stores, so the training set is not
needed. If SHARDS has other classes, or the training set beside it (the folder "train", or --train) another mean, the
score would mean nothing: that is refused unless --force is given. Exits with 2 on wrong input.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tools.shared.cli import Progress, json_path, parser_of, require_at_least, run, write_json

if TYPE_CHECKING:
    from pipeline.loader.loader import Batch
    from pipeline.loader.settings import Device
    from pipeline.rgb_pca import Eigenbasis
    from pipeline.shards.reader import ShardSet


def parse() -> argparse.Namespace:
    """Parses and checks the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="the shard set to score on")
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT", help="a folder step-... of a run")
    parser.add_argument("--views", type=int, choices=(1, 10), default=1, help="views of an image; default: %(default)s")
    parser.add_argument("--train", type=Path, metavar="SHARDS", help="compare the mean with this set; default: train")
    parser.add_argument("--force", action="store_true", help="score although classes or mean differ")
    parser.add_argument("--on-bad-sample", choices=("stop", "skip"), default="stop", help="skip: score without it")
    parser.add_argument("--batch", type=int, default=128, metavar="N", help="views at a time; default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a CUDA device")
    parser.add_argument("--json", type=json_path, metavar="FILE", help="also write the scores to FILE")
    args = parser.parse_args()
    require_at_least(1, batch=args.batch)
    return args


def main() -> int:
    """Scores every checkpoint."""
    args = parse()
    # Imported here, so that --help does not wait for torch and DALI.
    import torch

    from model.checkpoint import load_data, load_model
    from model.evaluation import evaluate
    from model.recipe import RECIPES
    from pipeline.loader.loader import view_loader
    from pipeline.loader.settings import LoaderSettings, check_device
    from pipeline.shards.reader import open_shards
    from tools.shared.checkpoint_data import eigenbasis_of_checkpoint

    device: Device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    shards = open_shards(args.shards)
    batch = max(1, args.batch // args.views)
    settings = LoaderSettings(batch=batch, device=device, on_bad_sample=args.on_bad_sample)
    record = {}
    for path in args.checkpoints:
        model, basis = load_model(path, RECIPES).to(device), eigenbasis_of_checkpoint(path)
        if model.spec.classes != len(shards.manifest.classes) or not args.force:
            check_classes(path, load_data(path).classes, shards)
        if not args.force:
            check_mean(path, basis, args.train or args.shards.parent / "train", required=args.train is not None)
        batches = view_loader(shards, basis, replace(settings, mean=model.recipe.mean), args.views)
        left_out = list[str]()
        with Progress(path.name, len(shards)) as progress:
            scores = evaluate(model, counted(batches, progress, left_out))
        record[str(path)] = asdict(scores) | {"left_out": left_out}
        figures = f"top-1 {scores.top1:.2%}, top-5 {scores.top5:.2%}, loss {scores.loss:.4f}, {scores.images:,} images"
        print(f"{path}: {figures}{f', without {len(left_out)} damaged' if left_out else ''}")
    write_json(args.json, {"shards": str(args.shards), "views": args.views, "checkpoints": record})
    return 0


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
    from pipeline.rgb_pca import eigenbasis_path

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


def counted(batches: Iterable[Batch], progress: Progress, left_out: list[str]) -> Iterator[Batch]:
    """Yields the batches, counts their images, and collects the damaged samples that they leave out."""
    for batch in batches:
        left_out.extend(batch.left_out)
        yield batch
        progress(len(batch.labels))


if __name__ == "__main__":
    run(main)
