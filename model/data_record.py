"""What a checkpoint knows of the data that it was trained on: enough to classify an image without the data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class DataRecord:
    """The data of a training run.

    Attributes:
        classes: [wnid, words] of each class; the position is the label.
        manifest_sha256: identifies the train shard set.
        pixels: number of pixels that the eigenbasis was measured on.
        arrays: the mean image and the RGB eigenbasis, by the names of the eigenbasis.
        versions: versions of the libraries that trained, by name.
        resize: how the images of the shard set were resized and stored, by setting; empty if that is not known.
    """

    classes: list[list[str]]
    manifest_sha256: str
    pixels: int
    arrays: dict[str, Tensor]
    versions: dict[str, str] = field(default_factory=dict)
    resize: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The entries of state.json; `arrays` are in a file of their own."""
        return {
            "classes": self.classes,
            "manifest_sha256": self.manifest_sha256,
            "pixels": self.pixels,
            "versions": self.versions,
            "resize": self.resize,
        }
