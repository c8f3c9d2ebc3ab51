"""The settings that decide the bytes of a shard set. Standard library only, so that a command line can import it fast.

The default of every image setting was chosen by measurement: see docs/shards.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field

STORED_SHAPES = ("short-side", "square")
FILTERS = ("lanczos", "bicubic", "area")
SUBSAMPLINGS = ("4:2:0", "4:2:2", "4:4:4")

# The default number of images per shard is the largest power of two that gives MIN_SHARDS shards, within these limits.
MAX_SHARD_SAMPLES = 1024  # the 2012 files held 1024 images each (convdata_jpeg.py)
MIN_SHARD_SAMPLES = 16  # a shard is flushed to disk three times; with fewer images that would take longer than they do
MIN_SHARDS = 48  # three shards for each of 16 workers, so that a small set keeps them all busy


@dataclass(frozen=True)
class ResizeSettings:
    """How an image is resized and stored.

    The field names are written to manifest.json: a rename would break existing shard sets.

    Attributes:
        short_side: Length of the stored image's short side in pixels. 256 is from paper section 2.
        stored: `short-side` keeps the whole image; `square` keeps the central square, on which the 2012 network was
            trained (paper section 2).
        filter: Resampling filter, one of FILTERS.
        quality: JPEG quality, 1 to 100. The 2012 code has a folder named "85"; its author's 2014 tool used 95.
        subsampling: Chroma subsampling, one of SUBSAMPLINGS.
        apply_exif: Whether to rotate or mirror an image as its EXIF orientation says. ImageNet training has always
            ignored that tag.

    Raises:
        ValueError: A field is outside its range.
    """

    short_side: int = 256
    stored: str = "short-side"
    filter: str = "lanczos"
    quality: int = 90
    subsampling: str = "4:2:0"
    apply_exif: bool = False

    def __post_init__(self) -> None:
        if self.stored not in STORED_SHAPES:
            raise ValueError(f"stored shape {self.stored!r}, expected one of {', '.join(STORED_SHAPES)}")
        if self.filter not in FILTERS:
            raise ValueError(f"filter {self.filter!r}, expected one of {', '.join(FILTERS)}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"JPEG quality {self.quality}, expected 1 to 100")
        if self.subsampling not in SUBSAMPLINGS:
            raise ValueError(f"subsampling {self.subsampling!r}, expected one of {', '.join(SUBSAMPLINGS)}")


@dataclass(frozen=True)
class ShardSettings:
    """Everything that decides the bytes of a shard set, apart from its source and the library versions.

    The field names are written to manifest.json: a rename would break existing shard sets.

    Attributes:
        resize: How each image is stored.
        seed: Seed of the order in which samples are written.
        shard_samples: Images per shard; None: chosen by `samples_per_shard`.

    Raises:
        ValueError: `shard_samples` is below 1.
    """

    resize: ResizeSettings = field(default_factory=ResizeSettings)
    seed: int = 2012
    shard_samples: int | None = None

    def __post_init__(self) -> None:
        if self.shard_samples is not None and self.shard_samples < 1:
            raise ValueError(f"{self.shard_samples} samples per shard, expected at least 1")

    def samples_per_shard(self, images: int) -> int:
        """The number of images per shard of a split. It depends on the split, never on the number of workers."""
        if self.shard_samples is not None:
            return self.shard_samples
        size = MAX_SHARD_SAMPLES
        while size > MIN_SHARD_SAMPLES and size * MIN_SHARDS > images:
            size //= 2
        return size
