"""Settings of the synthetic dataset. Only the standard library is imported, so that `make_sample --help` is fast."""

from __future__ import annotations

from dataclasses import dataclass

MAX_CLASSES = 144  # 12 shapes times 12 patterns; `drawing` checks it


@dataclass(frozen=True)
class SampleSettings:
    """What to draw. Values are checked on construction (ValueError).

    Attributes:
        classes: Number of classes.
        train_images: Training images per class.
        val_images: Validation images per class.
        min_side: Smallest height and width, in pixels.
        max_side: Largest height and width, in pixels.
        seed: Seed of all random choices.
    """

    classes: int = 12
    train_images: int = 150
    val_images: int = 30
    min_side: int = 150
    max_side: int = 600
    seed: int = 2012

    def __post_init__(self) -> None:
        if not 2 <= self.classes <= MAX_CLASSES:
            raise ValueError(f"{self.classes} classes; choose 2 to {MAX_CLASSES}")
        if self.val_images < 1 or self.classes * self.train_images < 8:
            raise ValueError(
                f"{self.train_images} train and {self.val_images} val images for each of {self.classes} classes; "
                f"choose at least 8 train images altogether and 1 val image per class"
            )
        if not 32 <= self.min_side <= self.max_side:
            raise ValueError(f"sides of {self.min_side} to {self.max_side} pixels; choose 32 <= smallest <= largest")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed}; choose 0 or more")

    @property
    def images(self) -> int:
        """Number of images in both splits."""
        return self.classes * (self.train_images + self.val_images)
