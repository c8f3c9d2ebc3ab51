"""What a checkpoint stores of its training data, as types of `pipeline`: the eigenbasis and the resize settings."""

from __future__ import annotations

from pathlib import Path

from model.checkpoint import load_data
from pipeline.rgb_pca import Eigenbasis
from pipeline.shards.settings import ResizeSettings

ARRAYS = ("mean", "covariance", "eigenvalues", "eigenvectors", "mean_image")


def eigenbasis_of_checkpoint(path: Path) -> Eigenbasis:
    """The eigenbasis that a checkpoint stores. Raises as `load_data`."""
    data = load_data(path)
    arrays = {name: data.arrays[name].numpy() for name in ARRAYS}
    return Eigenbasis(data.pixels, manifest_sha256=data.manifest_sha256, **arrays)


def resize_settings(path: Path) -> ResizeSettings:
    """How the images of a checkpoint's training set were resized; the defaults if the checkpoint does not say it.

    Raises:
        ValueError: as `load_data`, or the settings are not those of this version.
    """
    stored = load_data(path).resize
    try:
        return ResizeSettings(**stored)
    except TypeError as error:
        raise ValueError(f"{path}: unknown resize settings ({error}); use the version that trained it") from error
