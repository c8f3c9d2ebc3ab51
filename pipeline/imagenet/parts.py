"""What detection finds: parts, each of which gives one split, and problems, which say why a split cannot be read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.imagenet.labels import Scan
from pipeline.imagenet.listing import ClassName

_SPLIT = re.compile(
    r"(?:ILSVRC2012_img_|imagenet[-_]?)?(?:(train(?:ing)?)|(val|valid|validation|validate|eval|evaluation|dev))"
    r"(?:[._ -]?(?:set|images?|data))?([._ -]?(?:x|part)?[._ -]?\d+|\.x)?",
    re.IGNORECASE,
)
_SPLIT_WORD = re.compile(r"(?<![a-z])(train|training|validation|val|test)(?![a-z])", re.IGNORECASE)
_NUMBERED = re.compile(r"(.*?)(\d+)(?:-of-(\d+))?(\D*)", re.DOTALL)  # the last number of a file's name
MAX_NUMBERS = 4  # missing numbers that the plan names


@dataclass(frozen=True)
class Part:
    """One way to read one split.

    Attributes:
        layout: One of `source.LAYOUTS`.
        split: `train` or `val`.
        what: What it is, for the plan, such as `1,000 class folders in train`.
        uses: The files and folders that it reads.
        scan: Lists the images under the source's own labels.
        classes: (split, all parts of the layout by split, their scans by split) -> the class of each label.
    """

    layout: str
    split: str
    what: str
    uses: tuple[Path, ...]
    scan: Callable[[], Scan]
    classes: Callable[[str, Mapping[str, Part], Mapping[str, Scan]], Mapping[str, ClassName]]


@dataclass(frozen=True)
class Problem:
    """Why a split that seems to be there cannot be read.

    Attributes:
        layout: The layout whose files they are.
        split: `train` or `val`.
        text: What was found, what is missing and what to do, with a path.
        always: Whether it matters even if another part gives the split.
    """

    layout: str
    split: str
    text: str
    always: bool = False


@dataclass
class Findings:
    """Everything that detection found in a folder."""

    parts: list[Part] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def add(self, *found: Part | Problem | None) -> None:
        """Adds parts and problems; None adds nothing."""
        self.parts += [f for f in found if isinstance(f, Part)]
        self.problems += [f for f in found if isinstance(f, Problem)]


def split_of_folder(name: str) -> str | None:
    """The split that a folder's name means (`Train`, `validation`, `train.X1`); None if it means none."""
    match = _SPLIT.fullmatch(name.strip().removesuffix(".parquet"))  # Spark writes a folder of that name
    return None if match is None else "train" if match[1] else "val"


def is_numbered(name: str) -> bool:
    """Whether a split folder is one of several by its name, such as `train.X1`."""
    match = _SPLIT.fullmatch(name)
    return match is not None and bool(match[3])


def split_in_file(name: str) -> str | None:
    """The split in a file's name: preferably a word of its own (imagenet1k-train-0000), otherwise part of a word."""
    found = _SPLIT_WORD.search(name) or re.search("(train|val)", name, re.IGNORECASE)
    return {"validation": "val", "training": "train"}.get(found[1].lower(), found[1].lower()) if found else None


def split_word(name: str) -> str | None:
    """The split that is a word of its own in a folder's name, such as `val_sorted`; None if there is none."""
    found = _SPLIT_WORD.findall(name)
    return split_in_file(name) if len(found) == 1 else None


def check_complete(files: Sequence[Path]) -> None:
    """Raises ValueError if the names say `-of-00294` and not exactly 294 numbers are there."""
    numbers = [match for path in files if (match := re.search(r"-(\d+)-of-(\d+)", path.name))]
    found, totals = {int(n[1]) for n in numbers}, {int(n[2]) for n in numbers}
    if totals and (totals != {len(files)} or found != set(range(len(files)))):
        missing = min(set(range(max(totals))) - found, default=None)
        what = f"{missing:05d} is missing" if missing is not None else "they belong to different sets"
        raise ValueError(
            f"{files[0]}: {len(files)} files in its split, expected {max(totals)} ({what}); download them all"
        )


def without_numbers(files: Sequence[Path]) -> str:
    """For the plan: which numbers the names of files leave out, as ` (without 2)`; empty if they leave out none."""
    matches = [_NUMBERED.fullmatch(path.name) for path in files]
    if len({(m[1], m[4]) if m else None for m in matches}) != 1 or len(files) < 3:
        return ""
    numbers = {int(m[2]) for m in matches if m}
    missing = sorted(set(range(min(numbers), max(numbers))) - numbers)
    if not missing or len(missing) >= len(numbers):  # more gaps than files: the numbers do not count files
        return ""
    return f" (without {', '.join(map(str, missing[:MAX_NUMBERS]))}{', ...' if len(missing) > MAX_NUMBERS else ''})"


def counted(count: int, noun: str, nouns: str | None = None) -> str:
    """`1 class folder`, `1,000 class folders`. `nouns` is the plural if it is not the noun and an s."""
    return f"{count:,} {noun if count == 1 else nouns or f'{noun}s'}"
