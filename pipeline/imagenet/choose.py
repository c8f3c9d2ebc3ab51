"""Decides what to read: which folder holds the layout, which part gives each split, and what is not used."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from pipeline.imagenet.detect import find, find_without_split, innermost
from pipeline.imagenet.entries import folders_in, ignored, sorted_entries
from pipeline.imagenet.listing import SPLITS
from pipeline.imagenet.parquet import ColumnNames
from pipeline.imagenet.parts import Findings, Part
from pipeline.imagenet.unreadable import find_unreadable

FOLDER_LAYOUTS = ("folders", "kaggle")
MAX_DEPTH = 8  # folders that may be around the layout
MAX_PROBED = 20  # folders beside each other that may hold the layout


def descend(root: Path, columns: ColumnNames) -> tuple[Path, Findings]:
    """The folder that holds the layout, which is `root` or below it, and what was found there.

    Raises:
        ValueError: One of several folders in `root` holds a layout; the message names it.
    """
    folder, findings = _probe(root, columns, MAX_DEPTH)
    if not findings.parts and not findings.problems:
        folder = root
        inner = [path for path in folders_in(root) if not re.fullmatch(r"n\d{8}", path.name)][:MAX_PROBED]
        found = [where for path in inner for where, f in [_probe(path, columns, MAX_DEPTH)] if f.parts]
        if len(found) == 1 and len(folders_in(root)) > 1:
            raise ValueError(
                f"{root}: a layout in its folder {found[0].relative_to(root)}, beside others; run make_shards.py with"
                f" {found[0]} as SOURCE"
            )
        if len(found) > 1:
            names = ", ".join(str(path) for path in found)
            raise ValueError(f"{root}: several sources in it ({names}); run make_shards.py with one of them as SOURCE")
        folder = innermost(root)
        find_without_split(folder, findings)
    find_unreadable(folder, findings)
    return folder, findings


def _probe(root: Path, columns: ColumnNames, depth: int) -> tuple[Path, Findings]:
    """The folder that holds the layout, if it is `root` or the only folder in it, and so on."""
    findings, inner = find(root, columns), folders_in(root)
    if findings.parts or findings.problems or len(inner) != 1 or not depth:
        return root, findings
    folder, below = _probe(inner[0], columns, depth - 1)
    return (folder, below) if below.parts or below.problems else (root, findings)


def decide(findings: Findings, layout: str | None, split: str | None, root: Path) -> dict[str, Part]:
    """Split -> the part that gives it.

    Class folders have precedence over the tars of image-net.org, which often remain beside them.

    Args:
        findings: What was found.
        layout: The only layout to use; None uses all.
        split: The only split that must be readable; None requires all that seem to be there.
        root: The source's folder.

    Raises:
        ValueError: A required split has a problem, or two parts give it.
    """
    chosen = {}
    for name in SPLITS:
        parts = [p for p in findings.parts if p.split == name and layout in (None, p.layout)]
        problems = [p for p in findings.problems if p.split == name and layout in (None, p.layout)]
        if any(part.layout in FOLDER_LAYOUTS for part in parts):
            parts = [part for part in parts if part.layout != "ilsvrc"]
        always = [problem for problem in problems if problem.always]
        if split in (None, name):
            if always or (problems and not parts):
                raise ValueError((always or problems)[0].text)
            if len(parts) > 1:
                raise ValueError(_ambiguous(name, parts, root))
        if len(parts) == 1 and not always:
            chosen[name] = parts[0]
    return chosen


def _ambiguous(split: str, parts: list[Part], root: Path) -> str:
    found = "; ".join(f"{part.what}, layout {part.layout}" for part in parts)
    layouts = list(dict.fromkeys(part.layout for part in parts))
    choices = " or ".join(f"--layout {layout}" for layout in layouts)
    fix = f"choose with {choices}, or move one away" if len(layouts) > 1 else "move one away"
    return f"{root}: {len(parts)} sources for {split} ({found}); {fix}"


def unused_entries(root: Path, parts: Mapping[str, Part]) -> Iterator[Path]:
    """The entries of `root`, and of the folders in it that are read in part, that no part reads."""
    used = {path for part in parts.values() for path in part.uses}
    above = {parent for path in used for parent in path.parents}

    def visit(folder: Path) -> Iterator[Path]:
        for entry in sorted_entries(folder):
            path = Path(entry.path)
            if path in above and path not in used:
                yield from visit(path)
            elif path not in used and not ignored(entry.name):
                yield path

    return visit(root)
