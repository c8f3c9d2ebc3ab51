"""Philox4x32-10 gives the published words; uniform and normal numbers made of them have the right distribution."""

import numpy as np
import pytest

from pipeline.philox import Purpose, below, normals, philox, words_for

# Random123's known answers for philox4x32-10: counter, key, words.
KNOWN_ANSWERS = [
    ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, 0xFFFFFFFF_FFFFFFFF, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        0x299F31D0_A4093822,
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "seed", "words"), KNOWN_ANSWERS)
def test_known_answers(counter, seed, words):
    """The words are those that the authors of the generator published."""
    assert philox(np.array(counter, np.uint32), seed).tolist() == words


def test_counters_are_independent_of_their_neighbours():
    """A counter's words depend neither on the other counters of the call, nor on the shape, nor on chunk borders."""
    counters = np.arange(4 * 40_000, dtype=np.uint32).reshape(40_000, 4)
    together = philox(counters, 7)
    for row in (0, 16_383, 16_384, 39_999):
        assert np.array_equal(philox(counters[row], 7), together[row])
    assert np.array_equal(philox(counters.reshape(100, 400, 4), 7), together.reshape(100, 400, 4))


def test_words_are_never_used_twice():
    """Another id, epoch, purpose or seed gives other words, also for ids beyond 32 bits."""
    ids = [0, 1, 2**32, 2**32 + 1]
    parts = [words_for(ids, epoch, purpose, seed) for epoch in (0, 1) for purpose in Purpose for seed in (0, 1, 2**32)]
    rows = np.concatenate(parts)
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_below_is_uniform():
    """Every value below the bound is about equally frequent. The extreme words give the extreme values."""
    words = words_for(np.arange(33_000), 0, Purpose.CROP, 0)[:, 0]
    counts = np.bincount(below(words, 33), minlength=33)
    assert len(counts) == 33
    assert ((counts - 1000) ** 2 / 1000).sum() < 62.5  # chi-square, 32 degrees: exceeded once in a thousand seeds
    assert below(np.array([0, 0xFFFFFFFF], np.uint32), 33).tolist() == [0, 32]


def test_normals_are_normal():
    """Moments and tail are those of a standard normal; columns are uncorrelated; extreme words give finite numbers."""
    drawn = normals(words_for(np.arange(100_000), 0, Purpose.LIGHTING, 0))
    assert drawn.dtype == np.float32
    assert abs(drawn.mean(axis=0)).max() < 0.015
    assert np.allclose(np.cov(drawn.T), np.eye(4), atol=0.02)
    assert abs((np.abs(drawn) > 1.96).mean() - 0.05) < 0.002
    extremes = normals(np.array([[0, 0, 0xFFFFFFFF, 0xFFFFFFFF]], np.uint32))
    assert np.isfinite(extremes).all()
