"""Whether the classes of the splits are those of one set, and what the plan says about renumbered labels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pipeline.imagenet.listing import Listing


def check_agreement(listed: Sequence[set[str]], used: Sequence[set[str]], root: Path) -> None:
    """Raises ValueError if the splits seem to have the same classes under different names.

    Classes that are all wnids, or all numbers, are those of a common list, whichever of them a split has.

    Args:
        listed: For each split, all of its classes.
        used: For each split, its classes with images.
        root: The source, for the message.
    """
    if len(used) < 2 or not all(used):
        return
    (first, second), kinds = used, [{_kind(name) for name in names} for names in used]
    separate_lists = not listed[0] & listed[1] and (kinds[0] | kinds[1]) not in ({"wnid"}, {"number"})
    if not first & second and (separate_lists or not kinds[0] & kinds[1]):
        raise ValueError(
            f"{root}: the splits have no class in common ({min(first)} and {min(second)}), so labels would not agree;"
            " use --split, or files of one set"
        )
    alike = {_plain(name): name for name in first - second}
    for name in sorted(second - first):
        if (other := alike.get(_plain(name))) is not None:
            raise ValueError(
                f"{root}: class {other!r} is only in one split and {name!r} only in the other, so labels would not"
                " agree; rename one of them"
            )


def renumbered(listing: Listing) -> list[str]:
    """A line of the plan if the source's labels are numbers that change because some are missing."""
    numbers = [int(name.wnid) for name in listing.classes if _kind(name.wnid) == "number"]
    if len(numbers) < len(listing.classes) or (numbers[0] in (0, 1) and numbers[-1] - numbers[0] < len(numbers)):
        return []
    change = f"{numbers[0]} to {numbers[-1]} become 0 to {len(numbers) - 1}"
    if len(numbers) == 1:
        change = f"{numbers[0]} becomes 0"
    return [f"  labels: {change}; --class-list keeps those of a longer list"]


def _kind(name: str) -> str:
    return "wnid" if re.fullmatch(r"n\d+", name) else "number" if name.isdecimal() and name.isascii() else "name"


def _plain(name: str) -> str:
    """A class name without what tools and file systems change: case, spaces, hyphens and underscores."""
    return re.sub(r"[\s_-]+", "", name.casefold())
