"""Image files as the network sees them: resized and stored as `tools/make_shards.py` does, cut into evaluation views.

A file goes through the same steps as an image of the shard set: decoding, resizing, JPEG encoding with the settings of
the training set, decoding, cropping, subtraction of the mean. So the network gives the same probabilities for a file as
for its sample in a shard set.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.imagenet.entries import FORMATS
from pipeline.loader.augment import Floats, reference_views
from pipeline.shards.settings import ResizeSettings
from pipeline.shards.transcode import Undecodable, decode, transcode


def stored_pixels(path: Path, settings: ResizeSettings) -> NDArray[np.uint8]:
    """The pixels of an image file as a shard set would store them.

    Returns:
        uint8 (H, W, 3), RGB, with a short side of 256.

    Raises:
        ValueError: the file does not exist, cannot be read, or is not an image.
    """
    expected = f"expected an image ({', '.join(FORMATS)})"
    if path.is_dir():
        raise ValueError(f"{path}: a folder, {expected}; name its files, as in {path}/*")
    try:
        pixels: NDArray[np.uint8] = decode(transcode(path.read_bytes(), settings).jpeg, settings)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); {expected}") from error
    except Undecodable as error:
        raise ValueError(f"{path}: {error}; {expected}") from error
    return pixels


def image_views(path: Path, settings: ResizeSettings, mean: Floats, views: int) -> Floats:
    """The evaluation views of an image file.

    Args:
        path: the file.
        settings: how the images of the training set were resized.
        mean: what is subtracted, float32 (3, 224, 224).
        views: 1 for the centre crop, 10 for those of paper section 4.1.

    Returns:
        float32 (views, 3, 224, 224), pixel values 0-255 minus the mean.

    Raises:
        ValueError: as `stored_pixels`.
    """
    return reference_views(stored_pixels(path, settings), mean, views)
