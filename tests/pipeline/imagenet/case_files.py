"""Writes small ImageNet folders as people have them, from names alone; runs `make_shards` on them."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

from tests.pipeline.imagenet.layout_files import file_of, tar_of

REPOSITORY = Path(__file__).parents[3]
TENCH, SHARK = "n01440764", "n01484850"


@cache
def jpeg(seed: int = 0, kind: str = "JPEG") -> bytes:
    """A small image of random blocks."""
    pixels = np.random.default_rng(seed).integers(0, 255, (3, 4, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((40, 30)).save(file, kind)
    return file.getvalue()


def tree(root: Path, *names: str) -> Path:
    """`root` with an image at each of these paths; a path that ends with / is a folder, `.txt` and so on are text."""
    for seed, name in enumerate(names):
        if name.endswith("/"):
            (root / name).mkdir(parents=True)
        else:
            is_text = name.endswith((".txt", ".csv", ".json", ".xml", ".zip", ".gz"))
            file_of(root / name, b"text" if is_text else jpeg(seed))
    return root


def tar_bytes(members: Iterable[tuple[str, bytes]]) -> bytes:
    """A tar in memory."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def devkit(root: Path, wnids: list[str], truth: list[int], packed: bool = True) -> None:
    """ILSVRC2012's development kit with these classes (ILSVRC2012_ID 1, 2, ...) and ground truth."""
    fields = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)]
    rows = np.array([(n, wnid, f"{wnid} words", 0) for n, wnid in enumerate(wnids, 1)], fields)
    mat = io.BytesIO()
    scipy.io.savemat(mat, {"synsets": rows})
    members = {
        "ILSVRC2012_devkit_t12/data/meta.mat": mat.getvalue(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": "\n".join(map(str, truth)).encode(),
    }
    if packed:
        tar_of(root / "ILSVRC2012_devkit_t12.tar.gz", members.items())
    else:
        for name, data in members.items():
            file_of(root / name, data)


def make_shards(source: Path, out: Path, *options: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command, run as users run it."""
    command = [sys.executable, "tools/make_shards.py", str(source), str(out), "--workers", "1", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False, timeout=120)
    return done.returncode, done.stdout, done.stderr
