"""Damages stored images in 20 ways and checks that no loader ends its process with a signal.

    python -m tests.soak.damaged_images [--rounds 20] [--seed 1]

Each round damages a third of a small shard set in place and runs every loader on it in a process of its own: training
that stops, training that skips, evaluation, and the shortened loaders that time a stage. A loader may stop with one
line that names a damaged sample, or skip it. A signal, a traceback or a wrong pixel of an intact image is a failure.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from pipeline import rgb_pca
from pipeline.loader.loader import TrainLoader, stage_loader, view_loader
from pipeline.loader.reference import reference_batch
from pipeline.loader.settings import LoaderSettings
from pipeline.shards.reader import ShardSet, open_shards
from pipeline.workers import IN_PROCESS
from tests.support.shard_fixtures import sample, write_set

Bytes = NDArray[np.uint8]
SAMPLES, BATCH = 96, 16
HEADER_BYTES = 640  # about where the scan of a stored image starts
LOADERS = ("stop", "skip", "view", "ten views", "read", "decode")


def _overwrite(start: int, length: int, values: Callable[[np.random.Generator, int], Bytes]) -> Callable[..., None]:
    def damage(jpeg: Bytes, rng: np.random.Generator) -> None:
        first = start if start >= 0 else int(rng.integers(0, max(1, len(jpeg) - length)))
        part = jpeg[first : first + length if length else None]
        part[:] = values(rng, len(part))

    return damage


def _constant(value: int) -> Callable[[np.random.Generator, int], Bytes]:
    return lambda rng, count: np.full(count, value, np.uint8)


def _noise(rng: np.random.Generator, count: int) -> Bytes:
    return rng.integers(0, 256, count, np.uint8)


def _text(rng: np.random.Generator, count: int) -> Bytes:
    return rng.integers(32, 127, count, np.uint8)


def _cut(share: float) -> Callable[..., None]:
    def damage(jpeg: Bytes, rng: np.random.Generator) -> None:
        jpeg[int(len(jpeg) * share) :] = 0

    return damage


def _flip_header_bits(flips: int) -> Callable[..., None]:
    def damage(jpeg: Bytes, rng: np.random.Generator) -> None:
        for place in rng.integers(0, min(HEADER_BYTES, len(jpeg)), flips):
            jpeg[place] ^= np.uint8(1 << rng.integers(8))

    return damage


def _swap_halves(jpeg: Bytes, rng: np.random.Generator) -> None:
    half = len(jpeg) // 2
    jpeg[: 2 * half] = np.roll(jpeg[: 2 * half], half)


WAYS: dict[str, Callable[..., None]] = {
    "zeros": _overwrite(0, 0, _constant(0)),
    "ones": _overwrite(0, 0, _constant(0xFF)),
    "text": _overwrite(0, 0, _text),
    "noise": _overwrite(0, 0, _noise),
    "start, then zeros": _overwrite(2, 0, _constant(0)),
    "start, then ones": _overwrite(2, 0, _constant(0xFF)),
    "start, then noise": _overwrite(2, 0, _noise),
    "start lost": _overwrite(0, 2, _constant(0)),
    "first 100 bytes zero": _overwrite(0, 100, _constant(0)),
    "bytes 100 to 300 noise": _overwrite(100, 200, _noise),
    "bytes 20 to 640 ones": _overwrite(20, 620, _constant(0xFF)),
    "cut at half": _cut(0.5),
    "cut at 1 %": _cut(0.01),
    "cut before the end": _cut(0.99),
    "1 header bit": _flip_header_bits(1),
    "8 header bits": _flip_header_bits(8),
    "64 header bits": _flip_header_bits(64),
    "a page of zeros": _overwrite(-1, 4096, _constant(0)),
    "noise anywhere": _overwrite(-1, 64, _noise),
    "halves swapped": _swap_halves,
}


def damage_set(shards: ShardSet, rng: np.random.Generator) -> list[int]:
    """Damages a third of the images in their tars; returns their ids."""
    ids = rng.permutation(len(shards))[: len(shards) // 3]
    for sample_id in ids.tolist():
        row = shards.index[sample_id]
        path = shards.tars[row["shard"]]
        before = path.stat()
        tar = np.memmap(path, np.uint8, "r+")
        jpeg = tar[row["offset"] : row["offset"] + row["size"]]
        WAYS[list(WAYS)[rng.integers(len(WAYS))]](jpeg, rng)
        tar.flush()
        os.utime(
            path, ns=(before.st_atime_ns, before.st_mtime_ns)
        )  # a changed time would have the tar hashed on opening
    return sorted(ids.tolist())


def run_loader(folder: Path, kind: str) -> None:
    """Runs one loader over the set; in a process of its own."""
    shards = open_shards(folder)
    basis = rgb_pca.load_for(shards)
    settings = LoaderSettings(
        batch=BATCH, threads=2, on_bad_sample="stop" if kind == "stop" else "skip", max_bad_samples=SAMPLES
    )
    damaged = set(map(int, (folder / "damaged.txt").read_text().split()))
    try:
        if kind in ("stop", "skip"):
            with TrainLoader(shards, basis, settings) as loader:
                for batch in islice(loader, 2 * loader.steps_per_epoch):
                    intact = np.flatnonzero(~np.isin(batch.ids.numpy(), list(damaged)))
                    expected, divisor = reference_batch(shards, basis, settings, batch.epoch, batch.ids.numpy()[intact])
                    assert np.abs(batch.images.numpy()[intact] - expected).max() * divisor < 1e-3
                assert kind == "skip" or not damaged
        elif kind in ("view", "ten views"):
            sum(len(batch.ids) for batch in view_loader(shards, basis, settings, 1 if kind == "view" else 10))
        else:
            sum(len(ids) for ids in islice(stage_loader(shards, basis, settings, kind), 12))  # type: ignore[arg-type]
    except ValueError as error:
        print(error)


def main() -> int:
    """Damages sets and runs the loaders; returns 1 if one ended otherwise than by itself."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="shard sets to damage (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the damages (default: %(default)s)")
    parser.add_argument("--loader", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.loader:
        run_loader(Path(arguments.loader[1]), arguments.loader[0])
        return 0
    failures, images, rng = 0, 0, np.random.default_rng(arguments.seed)
    for number in range(arguments.rounds):
        with TemporaryDirectory() as name:
            shards = write_set(Path(name), [sample(n) for n in range(SAMPLES)])
            rgb_pca.save(rgb_pca.measure(shards, IN_PROCESS, lambda n: None), rgb_pca.eigenbasis_path(Path(name)))
            ids = damage_set(shards, rng)
            (Path(name) / "damaged.txt").write_text(" ".join(map(str, ids)))
            images += len(ids)
            for kind in LOADERS:
                command = [sys.executable, "-m", "tests.soak.damaged_images", "--loader", kind, name]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    failures += 1
                    print(f"round {number}, {kind}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    print(f"{arguments.rounds} sets, {images} damaged images, {len(LOADERS)} loaders each: {failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
