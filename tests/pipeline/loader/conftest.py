"""Fixtures of the loader's tests: a small intact shard set and its eigenbasis."""

import pytest

from tests.support.loader_fixtures import SAMPLES
from tests.support.shard_fixtures import basis_of, sample, write_set


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A shard set of images of seven shapes; the loader's tests do not change it."""
    return write_set(tmp_path_factory.mktemp("loader_shards"), [sample(number) for number in range(SAMPLES)])


@pytest.fixture(scope="session")
def basis(shards):
    """The eigenbasis of `shards`."""
    return basis_of(shards)
