"""What tools/evaluate.py prints and writes: scores, the table of classes, the most confused pairs."""

from __future__ import annotations

import argparse
import csv
import io
from dataclasses import asdict
from typing import Any

from model.class_scores import ClassScores
from model.evaluation import Scores
from pipeline.files import write_atomically
from pipeline.imagenet.listing import ClassName
from pipeline.shards.reader import ShardSet
from tools.shared.cli import write_json
from tools.shared.scoring import Result

PRINTED_PAIRS, STORED_PAIRS = 10, 100
COLUMNS = ("label", "wnid", "words", "images", "top1", "top5", "taken_for", "taken_for_words", "taken_for_share")


def write_results(args: argparse.Namespace, result: Result, shards: ShardSet, fit_on: ShardSet | None) -> None:
    """Prints the results, and writes the files that the arguments of tools/evaluate.py name."""
    damaged = f", without {len(result.left_out)} damaged" if result.left_out else ""
    for path, scores in zip(result.paths, result.each, strict=True):
        print(f"{path}: {scores_line(scores)}{damaged}")
    if len(result.paths) > 1:
        print(f"ensemble of {len(result.paths)}, {_how(result, fit_on)}: {scores_line(result.ensemble)}{damaged}")
        if fit_on is not None and fit_on.manifest_sha256 == shards.manifest_sha256:
            print("note: the weights are fitted to the images on which they are scored, so this score is too good")
    classes = shards.manifest.classes
    if args.per_class or args.confusion:
        _print_confused(result.by_class, classes)
    if args.per_class:
        args.per_class.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.per_class, class_table(result.by_class, classes))
    if args.confusion:
        from tools.shared.confusion_figure import write_figure  # needs scipy

        names = [one.words or one.wnid for one in classes]
        write_figure(args.confusion, result.by_class, names, f"{shards.folder}: {scores_line(result.ensemble)}")
    write_json(args.json, _record(args, result, shards, fit_on))


def scores_line(scores: Scores) -> str:
    """Scores as one line of text."""
    return f"top-1 {scores.top1:.2%}, top-5 {scores.top5:.2%}, loss {scores.loss:.4f}, {scores.images:,} images"


def class_table(found: ClassScores, classes: tuple[ClassName, ...]) -> str:
    """The scores of every class as CSV, a line for each class in the order of labels.

    The last columns name the class that most of its images are taken for, and their share. A class without images has
    empty scores, and a class without errors takes no other's place.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for label, one in enumerate(classes):
        images = float(found.images[label])
        row: list[Any] = [label, one.wnid, one.words, round(images)]
        row += [f"{float(hits[label]) / images:.4f}" if images else "" for hits in (found.top1, found.top5)]
        if pair := found.most_confused(label):
            other = classes[pair.taken_for]
            row += [other.wnid, other.words, f"{pair.share:.4f}"]
        table.writerow(row + [""] * (len(COLUMNS) - len(row)))
    return text.getvalue()


def _print_confused(found: ClassScores, classes: tuple[ClassName, ...]) -> None:
    pairs = found.confused_pairs(PRINTED_PAIRS)
    print("most confused:" if pairs else "most confused: none, every image is right")
    for pair in pairs:
        of = f"{pair.images:g} of {float(found.images[pair.label]):g} images ({pair.share:.1%})"
        print(f"  {_name(classes[pair.label])} taken for {_name(classes[pair.taken_for])}: {of}")


def _name(one: ClassName) -> str:
    return f"{one.wnid} {one.words}".strip() if one.words != one.wnid else one.wnid


def _how(result: Result, fit_on: ShardSet | None) -> str:
    if fit_on is None:
        return "mean of probabilities"
    return f"weights {', '.join(f'{weight:g}' for weight in result.weights)} fitted to {fit_on.folder}"


def _record(args: argparse.Namespace, result: Result, shards: ShardSet, fit_on: ShardSet | None) -> dict[str, Any]:
    left_out = {"left_out": result.left_out}
    each = {str(path): asdict(scores) | left_out for path, scores in zip(result.paths, result.each, strict=True)}
    found: dict[str, Any] = {"shards": str(args.shards), "views": args.views, "checkpoints": each}
    if len(result.paths) > 1:
        fitted: dict[str, Any] = {"weights": result.weights, "fitted_to": str(fit_on.folder) if fit_on else None}
        found["ensemble"] = asdict(result.ensemble) | left_out | fitted
    wnids = [one.wnid for one in shards.manifest.classes]
    pairs = result.by_class.confused_pairs(STORED_PAIRS)
    found["confused"] = [asdict(p) | {"wnid": wnids[p.label], "taken_for_wnid": wnids[p.taken_for]} for p in pairs]
    return found
