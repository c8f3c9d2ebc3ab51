"""The entries of a folder by kind: class folders, images, tars, parquet files, and what cannot be read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.imagenet.devkit import NAME as DEVKIT_NAME
from pipeline.imagenet.entries import (
    folders_in,
    ignored,
    image_suffixes,
    is_dangling,
    is_folder,
    skip_reason,
    sorted_entries,
    suffix_of,
)
from pipeline.imagenet.ilsvrc import CLASS_TAR, IMAGE_TAR
from pipeline.imagenet.unreadable import why_unreadable


@dataclass(frozen=True)
class Contents:
    """The entries of a folder by kind, without ignored ones.

    Attributes:
        folder: The folder.
        folders: Folders in it.
        images: Names of the image files.
        files: Other files.
        dangling: Links to nowhere that may have been folders.
    """

    folder: Path
    folders: list[Path]
    images: list[str]
    files: list[Path]
    dangling: list[Path]

    @classmethod
    def of(cls, folder: Path) -> Contents:
        """Reads the names in a folder."""
        found = cls(folder, folders_in(folder), [], [], [])
        for entry in sorted_entries(folder):
            if not ignored(entry.name) and not is_folder(entry):
                if is_dangling(entry) and suffix_of(entry.name) not in image_suffixes():
                    found.dangling.append(Path(entry.path))
                elif skip_reason(entry) is None:
                    found.images.append(entry.name)
                else:
                    found.files.append(Path(entry.path))
        return found

    def class_tars(self) -> list[Path]:
        """Tars that are named by a wnid."""
        return [path for path in self.files if CLASS_TAR.fullmatch(path.name)]

    def shards(self) -> list[Path]:
        """Tars of any other name."""
        others = (CLASS_TAR, IMAGE_TAR, DEVKIT_NAME)
        tars = [path for path in self.files if path.suffix.lower() == ".tar" and path.is_file()]
        return [path for path in tars if not any(other.fullmatch(path.name) for other in others)]

    def parquet(self) -> list[Path]:
        """Parquet files, without the tables that img2dataset writes beside its tars."""
        return [p for p in self.files if p.suffix.lower() == ".parquet" and not p.with_suffix(".tar").is_file()]

    def archives(self) -> list[Path]:
        """Files that must be unpacked or decompressed first, or that cannot be read at all."""
        return [path for path in self.files if why_unreadable(path)]
