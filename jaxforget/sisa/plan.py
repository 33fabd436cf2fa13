"""Which shard and which slice a record belongs to, and for how many epochs each slice's stage trains.

A plan depends on the ids, the seed and the settings, never on the order of the input. It is made once: a deletion
leaves the shard and the slice of every other record as they are. Shapes: N records, S shards, R slices.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxforget import checks
from jaxforget.data.sampling import id_keys, order
from jaxforget.errors import UserError


def epoch_schedule(epochs: int, slices: int) -> tuple[int, ...]:
    """Return the epochs of every stage, (R,): stage i, on slices 1..i, trains e_i = floor(i a) - floor((i-1) a) epochs.

    a = 2 epochs / (R + 1), so that all stages together visit about `epochs` times the records of the shard.
    Raises UserError where a stage would train nothing. Source: the official code of SISA, arXiv 1912.03817.
    """
    checks.at_least(1, named="--", epochs=epochs, slices=slices)
    if 2 * epochs < slices + 1:  # a < 1, and then the first stage is empty; from a = 1 on none is
        raise UserError(
            f"--epochs {epochs} with --slices {slices}: some slice would train for 0 epochs; "
            f"give at least {slices // 2 + 1} epochs, or at most {2 * epochs - 1} slices"
        )
    # Whole numbers: a float i * a can fall just below the integer it stands for.
    passed = [2 * epochs * i // (slices + 1) for i in range(slices + 1)]
    return tuple(after - before for before, after in zip(passed, passed[1:]))


def uniform(ids: Sequence[str], shards: int, slices: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Deal the records out at random. Returns (shard_N, slice_N), int32, counted from 0.

    Sizes of shards differ by at most 1, and so do sizes of slices within a shard.
    Raises UserError where there are too few records for the shards or the slices.
    """
    _check_room(len(ids), shards, slices)
    rank_N = _ranks(ids, seed)
    shard_N = rank_N % shards
    return shard_N.astype(np.int32), _slices(shard_N, rank_N, slices)


def by_deletion_probability(
    ids: Sequence[str], probability_N: np.ndarray, shards: int, slices: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Put records likely to be deleted into few small shards, and there into the last slices. Returns as `uniform`.

    probability_N: of a request to delete each record, in [0, 1]. In ascending order, each shard is filled until its
    expected number of requests reaches its share of what is left, so shard 0 is the largest and the least disturbed.
    Every shard has at least `slices` records. Sizes of slices within a shard differ by at most 1.
    Raises UserError naming the record whose probability is wrong. The idea is that of SISA, arXiv 1912.03817; how much
    a shard takes, for a given number of shards, and the order of slices are ours.
    """
    _check_room(len(ids), shards, slices)
    probability_N = np.asarray(probability_N, np.float64)
    wrong = np.flatnonzero(~((probability_N >= 0) & (probability_N <= 1)))  # NaN fails both comparisons
    if wrong.size:
        raise UserError(
            f"record {ids[wrong[0]]}: its deletion probability is {probability_N[wrong[0]]}; give a number from 0 to 1"
        )
    if not probability_N.any():
        raise UserError("every deletion probability is 0: nothing to tell records apart by; use uniform shards")
    ascending = np.lexsort((_ranks(ids, seed), probability_N))
    expected = np.append(0.0, np.cumsum(probability_N[ascending]))  # requests among the first n records, n = 0..N
    slack = 1e-9 * expected[-1]  # the rounding of this sum must not cost a shard one record more
    ends = [0]
    for later in range(shards - 1, 0, -1):
        share = (expected[-1] - expected[ends[-1]]) / (later + 1)
        reached = int(np.searchsorted(expected, expected[ends[-1]] + share - slack))
        # The later shards keep a record for each slice. This one has it: the least likely records, so no fewer of
        # them than the average of the shards to fill.
        ends.append(min(reached, len(ids) - slices * later))
    ends.append(len(ids))
    shard_N, rank_N = np.empty(len(ids), np.int64), np.empty(len(ids), np.int64)
    shard_N[ascending] = np.repeat(np.arange(shards), np.diff(ends))
    rank_N[ascending] = np.arange(len(ids))
    return shard_N.astype(np.int32), _slices(shard_N, rank_N, slices)


def by_column(
    ids: Sequence[str], value_N: Sequence, slices: int, seed: int
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Give every distinct value, such as a source or a client, a shard of its own; deal out slices at random.

    Returns (shard_N, slice_N, names): names[s] is the value of shard s as text, in sorted order.
    Raises UserError naming a value with fewer records than slices.
    """
    checks.at_least(1, named="--", slices=slices)
    text_N = [str(value) for value in value_N]
    names = tuple(sorted(set(text_N)))
    index = {name: s for s, name in enumerate(names)}
    shard_N = np.asarray([index[text] for text in text_N], np.int64)
    for name, size in zip(names, np.bincount(shard_N)):
        if size < slices:
            raise UserError(f"--slices {slices}: the shard of value {name!r} has {size} records; give at most {size}")
    return shard_N.astype(np.int32), _slices(shard_N, _ranks(ids, seed), slices), names


def _ranks(ids: Sequence[str], seed: int) -> np.ndarray:
    """Rank the records at random by the hash of their id, int64 (N,)."""
    rank_N = np.empty(len(ids), np.int64)
    # Epoch -1, which no training has: slices must not be stretches of the order in which an epoch visits the shard.
    rank_N[order(id_keys(ids), seed, -1)] = np.arange(len(ids))
    return rank_N


def _slices(shard_N: np.ndarray, rank_N: np.ndarray, slices: int) -> np.ndarray:
    """Cut every shard, in order of rank, into slices whose sizes differ by at most 1, int32 (N,)."""
    size_S = np.bincount(shard_N)
    start_S = np.cumsum(size_S) - size_S
    sorted_N = np.lexsort((rank_N, shard_N))
    place_N = np.empty_like(rank_N)  # among the records of the shard
    place_N[sorted_N] = np.arange(len(rank_N)) - start_S[shard_N[sorted_N]]
    # This spreads the remainder over the slices. All of it in the first ones would make every stage larger.
    return (place_N * slices // size_S[shard_N]).astype(np.int32)


def _check_room(records: int, shards: int, slices: int) -> None:
    checks.at_least(1, named="--", shards=shards, slices=slices)
    if shards > records:
        raise UserError(f"--shards {shards}: more shards than records, of which there are {records}")
    smallest = records // shards
    if slices > smallest:
        raise UserError(
            f"--slices {slices}: {records} records in {shards} shards leave one with {smallest}; "
            f"give at most {smallest} slices, or fewer shards"
        )
