"""Fixtures of the layout tests: the sample dataset's images, and a folder of them in each layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pipeline.imagenet.layout_files import WRITERS, Images, images_of


@pytest.fixture(scope="session")
def images(sample: Path) -> dict[str, Images]:
    """Split -> its images, which every layout must give."""
    return images_of(sample)


@pytest.fixture(scope="session")
def roots(sample: Path, images: dict[str, Images], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Layout -> a folder in it, written at first use. Tests that change it work on a copy."""
    written = {"ilsvrc": sample}

    def root_of(layout: str) -> Path:
        if layout not in written:
            written[layout] = tmp_path_factory.mktemp(layout)
            WRITERS[layout](written[layout], images)
        return written[layout]

    return root_of
