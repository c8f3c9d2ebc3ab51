"""Philox4x32-10, a counter-based random generator: a pure function from counter and key to random words.

Counters are uint32 (..., 4), a key is a seed of 64 bits, out come uint32 (..., 4). No state, so any sample's numbers
can be had at any time, in any order and in any grouping. Pinned by the published test vectors, not by a NumPy version.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), and its Random123 library.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1, added to the key after each round
ROUNDS = 10
CHUNK = 16384  # counters worked on at once: the words in hand stay in the cache, which is four times as fast
_LOW = np.uint64(0xFFFFFFFF)
_WORD_BITS = np.uint64(32)


class Purpose(IntEnum):
    """Last word of every counter. Two uses of random numbers never share one, so they are independent."""

    ORDER = 0
    CROP = 1
    LIGHTING = 2
    SHARDS = 3


def philox(counters: NDArray[np.uint32], seed: int) -> NDArray[np.uint32]:
    """Random words for uint32 counters (..., 4) under `seed`, 0 to 2**64 - 1 (low half first key word)."""
    flat = counters.reshape(-1, 4)
    words = np.empty_like(flat)
    for start in range(0, len(flat), CHUNK):
        words[start : start + CHUNK] = _rounds(flat[start : start + CHUNK], seed)
    return words.reshape(counters.shape)


def _rounds(counters: NDArray[np.uint32], seed: int) -> NDArray[np.uint32]:
    c0, c1, c2, c3 = counters.T.astype(np.uint64)  # each (n,), below 2**32, so that products fit
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(ROUNDS):
        product0, product2 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0 = (product2 >> _WORD_BITS) ^ c1 ^ np.uint64(key[0])
        c2 = (product0 >> _WORD_BITS) ^ c3 ^ np.uint64(key[1])
        c1, c3 = product2 & _LOW, product0 & _LOW
        key = [(word + step) & 0xFFFFFFFF for word, step in zip(key, KEY_STEPS, strict=True)]
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def words_for(ids: ArrayLike, epoch: int, purpose: Purpose, seed: int) -> NDArray[np.uint32]:
    """Four words (N, 4) for each of the integer `ids` (N,), 0 to 2**63 - 1, in `epoch`, 0 to 2**32 - 1."""
    numbers = np.asarray(ids, np.int64).astype(np.uint64)
    counters = np.empty((len(numbers), 4), np.uint32)
    counters[:, 0] = numbers & _LOW
    counters[:, 1] = numbers >> _WORD_BITS
    counters[:, 2] = epoch
    counters[:, 3] = purpose
    return philox(counters, seed)


def below(words: NDArray[np.uint32], bound: int) -> NDArray[np.int64]:
    """Integers 0 to `bound` - 1 from words. Any two values' chances differ by at most 2**-32."""
    return ((words.astype(np.uint64) * np.uint64(bound)) >> _WORD_BITS).astype(np.int64)


def normals(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Standard normals, as many as words (..., even), by Box and Muller's formula in float64; at most 6.8 from 0."""
    uniforms = (words + 0.5) * 2.0**-32  # inside (0, 1), never at its ends
    radius = np.sqrt(-2 * np.log(uniforms[..., 0::2]))
    angle = 2 * np.pi * uniforms[..., 1::2]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).astype(np.float32)


def epoch_order(samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The permutation (samples,) of 0 to samples - 1 that `epoch` visits: sample ids sorted by random 64-bit keys."""
    return np.argsort(random_keys(samples, seed, epoch, Purpose.ORDER), kind="stable")


def random_keys(number: int, seed: int, epoch: int, purpose: Purpose) -> NDArray[np.uint64]:
    """Random 64-bit keys (number,)."""
    words = words_for(np.arange((number + 1) // 2), epoch, purpose, seed)  # four words are two keys
    keys: NDArray[np.uint64] = words.astype("<u4").view("<u8").reshape(-1)[:number]
    return keys
