"""Between the data record of a checkpoint and the types of `pipeline`, which shares none with `model`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch

from model.checkpoint import load_data
from model.data_record import DataRecord
from pipeline.rgb_pca import Eigenbasis
from pipeline.shards.format import Manifest
from pipeline.shards.settings import ResizeSettings
from tools.shared.provenance import library_versions

ARRAYS = ("mean", "covariance", "eigenvalues", "eigenvectors", "mean_image")


def classes_of(manifest: Manifest) -> list[list[str]]:
    """[wnid, words] of each class of a shard set."""
    return [[one.wnid, one.words] for one in manifest.classes]


def data_record(manifest: Manifest, basis: Eigenbasis) -> DataRecord:
    """What a checkpoint of a run on this shard set stores of its data."""
    arrays = {name: torch.tensor(getattr(basis, name)).contiguous() for name in ARRAYS}
    names = [field.name for field in fields(ResizeSettings)]
    resize = {name: manifest.settings[name] for name in names if name in manifest.settings}
    return DataRecord(classes_of(manifest), basis.manifest_sha256, basis.pixels, arrays, library_versions(), resize)


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
