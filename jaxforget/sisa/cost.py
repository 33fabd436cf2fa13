"""What serving deletions costs: expected volumes in closed form, and exact counts for a given plan.

The closed forms are derived for the algorithm of SISA, arXiv 1912.03817, not quoted from it. They assume equal shards
and slices, and that each request falls on a shard and a slice uniformly, independently of the others: for batches this
is drawing with replacement, close to the truth while requests are few beside the records. No shards: shards = 1.
Shapes: N records, S shards, R slices.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def sequential(records: int, shards: int, requests: int) -> float:
    """Return the records to retrain on, an epoch, when every request is served at once. One slice a shard. Derived.

    Request i retrains a shard that has lost (i-1)/S records before, without one more.
    """
    return (records / shards + 1 / (2 * shards) - 1) * requests - requests**2 / (2 * shards)


def batched(records: int, shards: int, requests: int) -> float:
    """Return the records to retrain on, an epoch, when all requests are served together. One slice a shard. Derived."""
    return records * (1 - (1 - 1 / shards) ** requests) - requests


def one_request(records_of_shard: float, slices: int, epochs: int) -> float:
    """Return the visits of records to serve one request in one shard. Derived.

    Every stage is taken to last 2 epochs / (R + 1) epochs, whole or not, and the deleted record, about `epochs`
    visits, is counted as if it stayed. At most 1.5 times cheaper than training the shard anew.
    """
    return epochs * records_of_shard * (2 / 3 + 1 / (3 * slices))


def batched_with_slices(records: int, shards: int, slices: int, epochs: int, requests: int) -> float:
    """Return the visits of records when all requests are served together. Derived.

    Stage i of a shard is redone unless every request misses the shard's first i slices. Stages and deleted records
    as in `one_request`, so with one slice this is `epochs` times `batched`, plus requests * epochs.
    """
    i_R = np.arange(1, slices + 1)
    part_R = i_R / (shards * slices)  # of all records, in the first i slices of one shard
    redone_R = 1 - (1 - part_R) ** requests
    return float(shards * 2 * epochs / (slices + 1) * np.sum(records * part_R * redone_R))


def training_visits(count_SR: np.ndarray, epochs_R: Sequence[int]) -> int:
    """Count the visits of records to train everything: stage j of a shard trains epochs_R[j] epochs on slices 0..j.

    count_SR: records in each slice.
    """
    return int((np.cumsum(count_SR, axis=1) @ np.asarray(epochs_R, np.int64)).sum())


def deletion_visits(shard_N: np.ndarray, slice_N: np.ndarray, deleted_N: np.ndarray, epochs_R: Sequence[int]) -> int:
    """Count the visits of records to delete one batch: in each shard concerned, the stages from the first affected on.

    shard_N, slice_N: the plan of the records that are there. deleted_N: bool; these are visited no more.
    """
    deleted_N, R = np.asarray(deleted_N, bool), len(epochs_R)
    S = int(shard_N.max(initial=-1)) + 1
    cell_N = shard_N.astype(np.int64) * R + slice_N
    deleted_SR = np.bincount(cell_N[deleted_N], minlength=S * R).reshape(S, R)
    kept_SR = np.bincount(cell_N, minlength=S * R).reshape(S, R) - deleted_SR
    redone_SR = np.cumsum(deleted_SR, axis=1) > 0
    return int(((np.cumsum(kept_SR, axis=1) * redone_SR) @ np.asarray(epochs_R, np.int64)).sum())


def simulate(
    shard_N: np.ndarray,
    slice_N: np.ndarray,
    epochs_R: Sequence[int],
    requests: int,
    draws: int,
    *,
    seed: int,
    batch: int | None = None,
    probability_N: np.ndarray | None = None,
) -> np.ndarray:
    """Draw who asks to be deleted and count the visits to serve all of them, int64 (draws,).

    Records are drawn without replacement, in proportion to probability_N (default: alike). batch: requests served
    together (default: all; 1 is one after the other). Raises ValueError where fewer records than requests can be drawn.
    """
    rng = np.random.default_rng(seed)
    N, batch = len(shard_N), max(requests, 1) if batch is None else batch
    weight_N = None if probability_N is None else np.asarray(probability_N, np.float64) / np.sum(probability_N)
    visits = np.zeros(draws, np.int64)
    for draw in range(draws):
        chosen = rng.choice(N, requests, replace=False, p=weight_N)
        for start in range(0, requests, batch):
            here_N = np.ones(N, bool)
            here_N[chosen[:start]] = False
            deleted_N = np.zeros(N, bool)
            deleted_N[chosen[start : start + batch]] = True
            visits[draw] += deletion_visits(shard_N[here_N], slice_N[here_N], deleted_N[here_N], epochs_R)
    return visits
