"""Philox4x32-10, the counter-based random generator behind every random choice; draws and permutations made of it.

The file has three layers:

1. Generator: `philox` maps counters, uint32 (..., 4), and a 64-bit seed to random words, uint32 (..., 4).
2. Draws: `words_for` builds the counters from (sample id, epoch, purpose); `below` and `normals` turn words into
   uniform integers and normal numbers.
3. Permutation: `epoch_order` sorts the sample ids of an epoch by random keys.

The generator has no state: every number is a pure function of its counter and seed, so it can be computed at any time,
in any order and in any batch. The published test vectors define the words; they do not depend on the NumPy version.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), and its Random123 library.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUND_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1, added to the key after each round
PHILOX_ROUNDS = 10
COUNTERS_PER_CHUNK = 16384  # intermediate words of one chunk fit in the CPU cache: four times as fast as one pass
_LOW_WORD = np.uint64(0xFFFFFFFF)
_WORD_BITS = np.uint64(32)

# ---- generator ----------------------------------------------------------------------------------------------------


def philox(counters: NDArray[np.uint32], seed: int) -> NDArray[np.uint32]:
    """Random words for counters.

    Args:
        counters: uint32 (..., 4).
        seed: 0 to 2**64 - 1; its low half is the first key word.

    Returns:
        Words, uint32 in the shape of `counters`.
    """
    flat = counters.reshape(-1, 4)
    words = np.empty_like(flat)
    for start in range(0, len(flat), COUNTERS_PER_CHUNK):
        chunk = slice(start, start + COUNTERS_PER_CHUNK)
        words[chunk] = _philox_rounds(flat[chunk], seed)
    return words.reshape(counters.shape)


def _philox_rounds(counters: NDArray[np.uint32], seed: int) -> NDArray[np.uint32]:
    """The ten rounds, on counters (n, 4)."""
    c0, c1, c2, c3 = counters.T.astype(np.uint64)  # each (n,); below 2**32, so products fit into 64 bits
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(PHILOX_ROUNDS):
        product0, product2 = ROUND_MULTIPLIERS[0] * c0, ROUND_MULTIPLIERS[1] * c2
        c0 = (product2 >> _WORD_BITS) ^ c1 ^ np.uint64(key[0])
        c2 = (product0 >> _WORD_BITS) ^ c3 ^ np.uint64(key[1])
        c1, c3 = product2 & _LOW_WORD, product0 & _LOW_WORD
        key = [(word + increment) & 0xFFFFFFFF for word, increment in zip(key, KEY_INCREMENTS, strict=True)]
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


# ---- draws --------------------------------------------------------------------------------------------------------


class Purpose(IntEnum):
    """What random numbers are for: the last word of every counter.

    Different purposes never share a counter, so their random numbers are independent.
    """

    ORDER = 0  # the order of samples in an epoch
    CROP = 1  # crop position and mirroring
    LIGHTING = 2  # PCA (principal component analysis) lighting noise
    SHARDS = 3  # the order of shards in windowed reading


def words_for(ids: ArrayLike, epoch: int, purpose: Purpose, seed: int) -> NDArray[np.uint32]:
    """Four random words for each id.

    Args:
        ids: Integers (N,), 0 to 2**63 - 1.
        epoch: 0 to 2**32 - 1.
        purpose: What the words are for.
        seed: 0 to 2**64 - 1.

    Returns:
        Words, uint32 (N, 4).
    """
    numbers = np.asarray(ids, np.int64).astype(np.uint64)
    counters = np.empty((len(numbers), 4), np.uint32)
    counters[:, 0] = numbers & _LOW_WORD
    counters[:, 1] = numbers >> _WORD_BITS
    counters[:, 2] = epoch
    counters[:, 3] = purpose
    return philox(counters, seed)


def below(words: NDArray[np.uint32], bound: int) -> NDArray[np.int64]:
    """Uniform integers 0 to `bound` - 1, one per word. The probabilities of two values differ by at most 2**-32."""
    return ((words.astype(np.uint64) * np.uint64(bound)) >> _WORD_BITS).astype(np.int64)


def normals(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Standard normal numbers from words (..., even), as many as there are words.

    Box-Muller formula in float64. With 32-bit words no result is farther than 6.8 from 0.
    """
    uniforms = (words + 0.5) * 2.0**-32  # strictly inside (0, 1), so the logarithm is finite
    radius = np.sqrt(-2 * np.log(uniforms[..., 0::2]))
    angle = 2 * np.pi * uniforms[..., 1::2]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).astype(np.float32)


# ---- permutation --------------------------------------------------------------------------------------------------


def epoch_order(samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order in which `epoch` visits the samples: a permutation (samples,) of 0 to samples - 1.

    The sample ids are sorted by random 64-bit keys.
    """
    return np.argsort(random_keys(samples, seed, epoch, Purpose.ORDER), kind="stable")


def random_keys(number: int, seed: int, epoch: int, purpose: Purpose) -> NDArray[np.uint64]:
    """Random 64-bit sort keys (number,)."""
    words = words_for(np.arange((number + 1) // 2), epoch, purpose, seed)  # four words make two keys
    keys: NDArray[np.uint64] = words.astype("<u4").view("<u8").reshape(-1)[:number]
    return keys
