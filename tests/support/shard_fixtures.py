"""Settings of the session's synthetic dataset; a tiny shard set, written directly; helpers to look into shard sets."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from pipeline import rgb_pca
from pipeline.imagenet.listing import ClassName
from pipeline.rgb_pca import Eigenbasis
from pipeline.shards.format import Manifest, Sample
from pipeline.shards.reader import ShardSet, open_shards
from pipeline.shards.settings import ShardSettings
from pipeline.shards.writer import publish, write_shard
from pipeline.synthetic.settings import SampleSettings
from pipeline.workers import IN_PROCESS, ignore

# Of the fixtures `sample` and `shard_root`.
SAMPLE = SampleSettings(classes=4, train_images=12, val_images=5, min_side=150, max_side=220, seed=7)
SHARD_SETTINGS = ShardSettings(seed=7, shard_samples=20)

# Of `sample`, for tests that write a shard set with `write_set`.
SIZES = [(256, 256), (341, 256), (256, 384), (300, 256), (256, 257), (257, 256), (512, 256)]  # (width, height)
CLASSES = 5


def drawn_jpeg(number: int, width: int, height: int) -> bytes:
    """A JPEG with smooth colours and hard edges; another number gives another image."""
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(8):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        pen.ellipse((x, y, x + 60, y + 40), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return jpeg_of(image)


def jpeg_of(image: Image.Image) -> bytes:
    """Encodes an image as make_shards does: baseline JPEG, 4:2:0."""
    file = BytesIO()
    image.save(file, "JPEG", quality=90, subsampling="4:2:0")
    return file.getvalue()


def sample(number: int, jpeg: bytes | None = None) -> Sample:
    """Sample `number`, with the bytes `jpeg` in place of its own if given."""
    width, height = SIZES[number % len(SIZES)]
    return Sample(f"drawn_{number:04d}", number % CLASSES, jpeg or drawn_jpeg(number, width, height), width, height)


def write_set(folder: Path, samples: list[Sample], shard_samples: int = 10) -> ShardSet:
    """Writes `samples` as a shard set with `shard_samples` per shard, and opens it."""
    records, parts = [], []
    for shard, start in enumerate(range(0, len(samples), shard_samples)):
        record, rows = write_shard(folder, f"train-{shard:06d}", samples[start : start + shard_samples])
        rows["shard"] = shard
        records.append(record)
        parts.append(rows)
    classes = tuple(ClassName(f"n{label:08d}", f"class {label}") for label in range(CLASSES))

    def manifest_of(index_sha256: str) -> Manifest:
        return Manifest("train", len(samples), classes, tuple(records), index_sha256, {}, {}, ())

    publish(folder, manifest_of, np.concatenate(parts))
    return open_shards(folder)


def basis_of(shards: ShardSet) -> Eigenbasis:
    """The eigenbasis of the shard set."""
    return rgb_pca.measure(shards, IN_PROCESS, ignore)


def files_of(root: Path) -> dict[str, bytes]:
    """Path relative to `root` -> content of every file below it."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def decoded(shards: ShardSet, sample_id: int) -> np.ndarray:
    """A sample's pixels (H, W, 3) uint8, decoded by Pillow."""
    (jpeg,) = shards.jpegs(np.array([sample_id]))
    with Image.open(BytesIO(jpeg.tobytes())) as image:
        return np.asarray(image)
