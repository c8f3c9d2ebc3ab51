"""Classifies image files with a trained network, or writes their features.

    python tools/predict.py photo.jpg --checkpoint runs/sample/checkpoints/step-000000560
    python tools/predict.py photos/*.jpg --checkpoint CHECKPOINT --features fc7 --out features.npy

Prints the most probable classes of each image with their names. Only the checkpoint is needed: it holds the class
names, the mean image and the resize settings of its training set. With --features it writes the activations of a layer
for the centre crops instead, a row for each image in the order of the command line, as float32. Exits with 2 on wrong
input; no file is written then.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.shared.cli import Progress, json_path, parser_of, require_at_least, run, write_json

if TYPE_CHECKING:
    from tools.shared.classifier import Classifier

FILES_AT_ONCE = 80


def arguments() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("images", type=Path, nargs="+", metavar="IMAGE", help="image files: JPEG, PNG, WEBP, GIF, BMP, TIFF")
    add("--checkpoint", type=Path, required=True, metavar="CHECKPOINT", help="a folder step-... of a run")
    add("--views", type=int, choices=(1, 10), default=1, help="views of an image; default: %(default)s")
    add("--top", type=int, default=5, metavar="N", help="classes that are shown; default: %(default)s")
    add("--apply-exif", action="store_true", help="rotate photos as their EXIF says; default: as in training")
    add("--features", metavar="LAYER", help="write the activations of this layer, conv1 to fc8, to --out")
    add("--out", type=json_path, metavar="FILE.npy", help="file of the features")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is a CUDA device")
    add("--json", type=json_path, metavar="FILE", help="also write what is printed to FILE")
    return parser


def check(args: argparse.Namespace) -> None:
    """Checks the options. Raises ValueError that names the option or the file."""
    require_at_least(1, top=args.top)
    if bool(args.features) != bool(args.out):
        raise ValueError("--features and --out belong together: --features fc7 --out features.npy")
    if args.features and args.views != 1:
        raise ValueError("--views 10: features are those of the centre crop; omit --views")
    if args.features and args.json:
        raise ValueError("--json: features are written to --out; omit --json")
    if args.out and args.out.suffix != ".npy":
        raise ValueError(f"--out {args.out}: expected a name that ends with .npy")
    if missing := [str(path) for path in args.images if not path.exists()]:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ValueError(f"{missing[0]}: no such file{more}; expected image files")


def main() -> int:
    """Classifies the images, or writes their features."""
    args = arguments().parse_args()
    check(args)
    # Imported here, so that --help does not wait for torch and DALI.
    from dataclasses import replace

    import torch

    from model.checkpoint import load_data
    from tools.shared.classifier import Classifier

    if not load_data(args.checkpoint).resize:
        found = "does not say how the images of its training set were resized"
        print(f"predict.py: note: {args.checkpoint} {found}; the defaults of make_shards are used", file=sys.stderr)
    classifier = Classifier.load(args.checkpoint, args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.apply_exif:
        classifier.resize = replace(classifier.resize, apply_exif=True)
    if args.features:
        write_features(args, classifier)
    else:
        print_guesses(args, classifier)
    return 0


def print_guesses(args: argparse.Namespace, classifier: Classifier) -> None:
    """Prints the most probable classes of each image, and writes --json."""
    images: dict[str, Any] = {}
    with Progress("classifying", len(args.images)) as progress:
        for files in chunks(args.images):
            for path, guesses in zip(files, classifier.classify(files, args.views, args.top), strict=True):
                images[str(path)] = [asdict(guess) for guess in guesses]
                lines = [f"{guess.probability:8.2%}  {guess.wnid}  {guess.words}" for guess in guesses]
                progress.say("\n".join([str(path), *lines]))
            progress(len(files))
    write_json(args.json, {"checkpoint": str(args.checkpoint), "views": args.views, "images": images})


def write_features(args: argparse.Namespace, classifier: Classifier) -> None:
    """Writes the activations of a layer to --out."""
    import numpy as np
    import torch

    from pipeline.files import published

    with Progress("computing features", len(args.images)) as progress:
        parts = []
        for files in chunks(args.images):
            parts.append(classifier.features(files, args.features))
            progress(len(files))
    features = torch.cat(parts).numpy()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with published(args.out) as file:
        np.save(file, features)
    print(f"{args.out}: {args.features} of {len(features):,} images, float32 {features.shape}")


def chunks(files: list[Path]) -> list[list[Path]]:
    """The files, some at a time."""
    return [files[start : start + FILES_AT_ONCE] for start in range(0, len(files), FILES_AT_ONCE)]


if __name__ == "__main__":
    run(main)
