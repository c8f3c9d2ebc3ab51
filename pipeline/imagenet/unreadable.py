"""Files that seem to hold a split but cannot be read: packed, not downloaded to the end, or of another format.

Each becomes a `Problem` with the way to make it readable, unless something else gives the split.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pipeline.imagenet.devkit import NAME as DEVKIT_NAME
from pipeline.imagenet.entries import ignored, sorted_entries
from pipeline.imagenet.listing import SPLITS
from pipeline.imagenet.parts import Findings, Problem, split_in_file

UNFINISHED = re.compile(r".*\.(part|partial|crdownload|download|incomplete|tmp|aria2)", re.IGNORECASE)
PIECES = re.compile(r"(.*\.(?:zip|7z|tar(?:\.\w+)?|tgz)[._-]?(?:part[._-]?)?)(?:\d{2,3}|[a-z]{2})", re.IGNORECASE)
ARCHIVE = re.compile(r".*\.(zip|7z|rar|tar\.(?:gz|bz2|xz|zst|lz4|lz|lzma|z)|tgz|tbz2?|txz)", re.IGNORECASE)
ORIGINALS = "use the files from which they were made, or write each image into a folder of its class"
PARQUET = "datasets.load_from_disk(FOLDER)['train'].to_parquet('train.parquet'), and so on for validation"
# Pattern of the name -> (what it is, what to do).
FOREIGN = {
    r".*\.arrow": ("an Arrow file of Hugging Face's datasets", f"write parquet files: {PARQUET}"),
    r".*\.tfrecords?.*|\w*(train|validation|val|test)-\d{5}-of-\d{5}": ("a TFRecord file", ORIGINALS),
    r".*\.beton": ("a file of FFCV", ORIGINALS),
    r".*\.rec": ("a RecordIO file of MXNet", ORIGINALS),
    r".*\.mds(\..*)?": ("a shard of MosaicML Streaming", ORIGINALS),
    r".*[._]lmdb|data\.mdb": ("an LMDB database", ORIGINALS),
    r".*\.(h5|hdf5)": ("an HDF5 file", ORIGINALS),
    r".*\.npz|.*data_batch_\d+|val_data": ("an array of pixels, not encoded images", "use the original images"),
}


def why_unreadable(path: Path) -> str | None:
    """What a file is that cannot be read, and what to do; None for every other file."""
    name = path.name
    if DEVKIT_NAME.fullmatch(name):
        return None
    if UNFINISHED.fullmatch(name):
        return "a download that has not ended; finish it, or remove the file"
    if ARCHIVE.fullmatch(name):
        return _unpack(name)
    if re.fullmatch(r".*\.z\d\d", name, re.IGNORECASE):
        return f"one piece of an archive; join the pieces: zip -s 0 {name[:-4]}.zip --out all.zip; then: unzip all.zip"
    if match := PIECES.fullmatch(name):
        whole = re.sub(r"[._-]?(part[._-]?)?$", "", match[1], flags=re.IGNORECASE)
        return f"one piece of an archive; join the pieces, then unpack the archive: cat {match[1]}* > {whole}"
    found = (reason for pattern, reason in FOREIGN.items() if re.fullmatch(pattern, name, re.IGNORECASE))
    return next((f"{what}, which is not read; {fix}" for what, fix in found), None)


def _unpack(name: str) -> str:
    if (suffix := Path(name).suffix.lower()) in (".zip", ".7z", ".rar"):
        tool = {".zip": "unzip", ".7z": "7z x", ".rar": "unrar x"}[suffix]
        fix = f"unpack it there: {tool} {name}"
    elif re.search(r"\.(tar\.gz|tgz)$", name, re.IGNORECASE):
        fix = f"decompress it to a .tar, which is then read in place: gunzip {name}"
    else:
        fix = f"unpack it there: tar -xf {name}"
    return f"packed, so its images cannot be read in place; {fix}"


def problem_of(split: str, path: Path, always: bool = False, other: str | None = None) -> Problem | None:
    """The problem of a file that cannot be read; None for every other file. `other` is a split that can be read."""
    why, without = why_unreadable(path), f", or use --split {other}" if other else ""
    return None if why is None else Problem("webdataset", split, f"{path}: {why}{without}", always)


def unreadable_in(folder: Path) -> Iterator[Path]:
    """The entries of a folder that cannot be read, by name."""
    for entry in sorted_entries(folder):
        if not ignored(entry.name) and why_unreadable(Path(entry.path)):
            yield Path(entry.path)


def find_unreadable(root: Path, findings: Findings) -> None:
    """Adds problems for files that seem to hold a split, or some of its tars, which cannot be read.

    A file without a split in its name counts if nothing else was found. Beside tars, a file of their split counts, too.
    """
    given = {part.split: part.layout for part in findings.parts}
    for folder in (root, root / "data"):
        for path in unreadable_in(folder):
            split = split_in_file(path.name) or ("train" if not given else None)
            if split in SPLITS and given.get(str(split), "webdataset") in ("webdataset", "parquet"):
                beside_tars = given.get(str(split)) is not None and ".tar" in path.name.lower()
                if split not in given or beside_tars or UNFINISHED.fullmatch(path.name):
                    other = next((name for name in given if name != split), None)
                    findings.add(problem_of(str(split), path, always=str(split) in given, other=other))
