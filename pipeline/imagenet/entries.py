"""What counts as an image file, which entries of a folder are ignored, and the counts of everything that is skipped.

Hidden entries, AppleDouble files (`._NAME`, which macOS writes beside each file on foreign disks) and folders of
operating systems never count. A file counts as an image if its suffix is that of one of FORMATS or, without a suffix,
if its first bytes are those of an image.
"""

from __future__ import annotations

import errno
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from PIL import Image

from pipeline.files import doing

# The formats, by Pillow's names, that are listed as images and decoded. Pillow opens more, but starts other programs
# for some, and takes damaged files for images of formats without a signature. JPEG includes MPO: JPEGs in one file.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
# Names that operating systems, file managers and tools leave behind, in lower case.
CLUTTER = frozenset(
    {"__macosx", "__pycache__", "lost+found", "@eadir", "$recycle.bin", "system volume information", "thumbs.db"}
    | {"desktop.ini", "ehthumbs.db", "icon\r", "#recycle", "#snapshot"}
)
MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8|BM|RIFF....WEBP|II\*\0|MM\0\*|....ftypavif|P[1-6]\s|\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    re.DOTALL,
)
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
EXAMPLES = 5  # names that are kept per reason


@dataclass(frozen=True)
class SkippedFiles:
    """Entries of a source that were skipped for one reason.

    Attributes:
        reason: Such as `hidden` or `suffix .txt`.
        count: Number of entries.
        examples: The first few, in the order of reading.
    """

    reason: str
    count: int
    examples: tuple[str, ...]

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.examples) else ""
        return f"{self.count:,} {self.reason} ({', '.join(self.examples)}{more})"


@dataclass
class Skipped:
    """Counts what is skipped, by reason."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str | os.PathLike[str]) -> None:
        """Counts one entry."""
        self.counts[reason] += 1
        if len(names := self.examples.setdefault(reason, [])) < EXAMPLES:
            names.append(shown(name))

    def record(self) -> tuple[SkippedFiles, ...]:
        """The counts, sorted by reason."""
        return tuple(SkippedFiles(r, n, tuple(self.examples[r])) for r, n in sorted(self.counts.items()))


def shown(name: str | os.PathLike[str]) -> str:
    """A file name for a line of text: characters that cannot be printed are escaped."""
    text = os.fsencode(name).decode(errors="replace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of FORMATS, in lower case with their dot."""
    by_suffix = Image.registered_extensions()  # loads Pillow's plugins, which fills Image.OPEN
    opened = Image.OPEN.keys() & set(FORMATS)
    return frozenset({s.lower() for s, kind in by_suffix.items() if kind in opened} | {".mpo"})


def suffix_of(name: str) -> str:
    """The suffix in lower case. A web query behind it (`a.jpg?w=300`) is no part of it."""
    return os.path.splitext(name)[1].lower().partition("?")[0]


def ignored(name: str) -> str | None:
    """The reason why an entry of that name is ignored, whatever it holds; None if it counts."""
    if name.startswith("._"):
        return "AppleDouble"
    return "hidden" if name.startswith(".") or name.lower() in CLUTTER else None


def ignored_in_path(name: str) -> str | None:
    """As `ignored`, for a member of an archive: each folder of its path counts."""
    return next((reason for part in name.split("/") if part not in ("", ".", "..") and (reason := ignored(part))), None)


def member_skip_reason(tar: Path, name: str, offset: int) -> str | None:
    """Why a member of a tar, whose data begin at `offset`, is no image; None if it is one."""
    for part in name.split("/"):
        if part not in ("", ".", "..") and (reason := ignored(part)):
            return reason
    return _content_reason(tar, name, offset)


def _content_reason(path: str | Path, name: str, offset: int) -> str | None:
    """Why a file or a member is no image by its suffix or, without one, by its first bytes; None if it is one."""
    if suffix := suffix_of(name):
        return None if suffix in image_suffixes() else f"suffix {suffix}"
    with doing("read", path), open(path, "rb") as file:
        file.seek(offset)
        return None if MAGIC.match(file.read(16)) else "no suffix and no image"


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one. A link to itself is none."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def is_dangling(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a link to nowhere, such as to a disk that is not mounted, or to itself."""
    return entry.is_symlink() and not os.path.exists(entry.path)


def text_of(path: Path) -> str:
    """The text of a file. ValueError if it is not UTF-8."""
    try:
        with doing("read", path):
            return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert it: iconv -f LATIN1 -t UTF-8"
        ) from error


def remedy(path: Path) -> str:
    """What to do about a file that is not what its name says."""
    with path.open("rb") as file:
        is_pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    return "it is only a Git LFS pointer; run: git lfs pull" if is_pointer else "download it again"


def skip_reason(entry: os.DirEntry[str]) -> str | None:
    """Why an entry that is no folder is no image; None if it is one, or a link to nowhere, which may have been one."""
    if reason := ignored(entry.name):
        return reason
    if is_dangling(entry):
        return None
    return _content_reason(entry.path, entry.name, 0) if entry.is_file() else "not a regular file"


def sorted_entries(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder by name; empty if it is none."""
    if not folder.is_dir():
        return []
    with doing("list the folder", folder), os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def folders_in(folder: Path) -> list[Path]:
    """The folders in `folder` that are not ignored, by name."""
    return [Path(e.path) for e in sorted_entries(folder) if is_folder(e) and not ignored(e.name)]


def walk_images(
    folder: Path, skipped: Skipped, above: frozenset[str] = frozenset(), deep: bool = True
) -> Iterator[os.DirEntry[str]]:
    """The image files in a folder and below it, and links to nowhere: each folder's files by name, then its folders.

    Links are followed, except to a folder that holds one that is being walked: that is, with it, other classes.

    Args:
        folder: Where to start.
        skipped: Counts everything else.
        above: Real paths of the folders that are being walked.
        deep: Whether folders in `folder` are walked, too.
    """
    real = os.path.realpath(folder)
    if any(path == real or path.startswith(f"{real}{os.sep}") for path in above):
        skipped.add("link to a folder above it", folder)
        return
    inner = []
    for entry in sorted_entries(folder):
        if not ignored(entry.name) and is_folder(entry):
            inner.append(Path(entry.path))
        elif reason := skip_reason(entry):
            skipped.add(reason, entry.path)
        else:
            yield entry
    for path in inner if deep else ():
        yield from walk_images(path, skipped, above | {real})


def has_image(folder: Path) -> bool:
    """Whether there is an image file in a folder or below it."""
    return any(not is_dangling(entry) for entry in walk_images(folder, Skipped()))
