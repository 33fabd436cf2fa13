"""Deterministic order: a function of (seed, example id, epoch), never of position.

Data order must survive deletion: an example that is gone may not change the order of the others, or
retraining without it would differ for reasons that have nothing to do with it. A shuffled index cannot
promise that, a sort by a hash of each example's own key can.
"""

import hashlib
from collections.abc import Iterable

import numpy as np

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
FACTOR_1 = 0xBF58476D1CE4E5B9
FACTOR_2 = 0x94D049BB133111EB


def id_keys(ids: Iterable[str]) -> np.ndarray:
    """Digest ids to 64-bit keys, uint64 (N,)."""
    digests = [hashlib.blake2b(identity.encode(), digest_size=8).digest() for identity in ids]
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def hash64(*parts: np.ndarray | int) -> np.ndarray:
    """Mix integers or uint64 arrays, broadcast together, into one uint64 hash each.

    The order of the parts matters. With one part this is the first output of SplitMix64 seeded with it.
    Integers are taken modulo 2**64.
    """
    state: np.ndarray = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):  # wrapping around is the point
        for part in parts:
            words = np.asarray(part & MASK if isinstance(part, int) else part).astype(np.uint64)
            state = (state ^ words) + np.uint64(GOLDEN)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(FACTOR_1)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(FACTOR_2)
            state = state ^ (state >> np.uint64(31))
    return np.asarray(state)


def hash_int(*parts: int) -> int:
    """Give hash64 of plain integers as an integer, faster than through arrays."""
    state = 0
    for part in parts:
        state = ((state ^ (part & MASK)) + GOLDEN) & MASK
        state = ((state ^ (state >> 30)) * FACTOR_1) & MASK
        state = ((state ^ (state >> 27)) * FACTOR_2) & MASK
        state ^= state >> 31
    return state


def order(key_N: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Permute examples for one epoch, int64 (N,): indices into key_N in the order of visiting.

    The relative order of two examples depends only on (seed, their keys, epoch). So deleting examples leaves
    the order of the rest unchanged, and shuffling the input leaves the sequence of examples unchanged.
    """
    key_N = np.asarray(key_N, np.uint64)
    return np.lexsort((key_N, hash64(seed, epoch, key_N)))
