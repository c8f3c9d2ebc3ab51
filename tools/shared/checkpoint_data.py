"""Makes the data record of a checkpoint: pipeline and model share no type. `inference.checkpoint_data` reads it."""

from __future__ import annotations

from dataclasses import fields

import torch

from inference.checkpoint_data import ARRAYS
from model.data_record import DataRecord
from pipeline.rgb_pca import Eigenbasis
from pipeline.shards.format import Manifest
from pipeline.shards.settings import ResizeSettings
from tools.shared.provenance import library_versions


def classes_of(manifest: Manifest) -> list[list[str]]:
    """[wnid, words] of each class of a shard set."""
    return [[one.wnid, one.words] for one in manifest.classes]


def data_record(manifest: Manifest, basis: Eigenbasis) -> DataRecord:
    """What a checkpoint of a run on this shard set stores of its data."""
    arrays = {name: torch.tensor(getattr(basis, name)).contiguous() for name in ARRAYS}
    names = [field.name for field in fields(ResizeSettings)]
    resize = {name: manifest.settings[name] for name in names if name in manifest.settings}
    return DataRecord(classes_of(manifest), basis.manifest_sha256, basis.pixels, arrays, library_versions(), resize)
