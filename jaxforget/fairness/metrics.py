"""Resampled accuracy and group fairness, with intervals. Shapes: N examples, A groups, R resamples, X strata."""

from __future__ import annotations

import functools

import jax
import numpy as np

from jaxforget.metrics.groups import group_metrics

AT_ONCE = 1 << 22  # numbers of the resamples that are measured side by side


def bootstrap_metrics(
    probability_N: np.ndarray,
    label_N: np.ndarray,
    group_N: np.ndarray,
    groups: int,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Return every metric of every resample, (R,) or (R, A) for metrics by group; see `interval`.

    Resamples are stratified: every group and class keeps its number of examples. The rates are conditional on both, and
    no resample loses the few examples that a rate of a small group rests on. The interval of the accuracy is therefore
    that for these numbers. A gap is never negative and noise only widens it: an interval that excludes 0 is no evidence
    of a gap. Which rows a resample takes depends on seed, labels and groups alone, so that the differences between two
    predictors of the same rows are paired.
    """
    probability_N = np.asarray(probability_N)
    cell_N = np.asarray(group_N).astype(np.int64) * 2 + np.asarray(label_N)
    order_N = np.argsort(cell_N, kind="stable")
    cell_N = cell_N[order_N]
    size_X = np.bincount(cell_N, minlength=2 * groups)
    start_X = np.cumsum(size_X) - size_X
    batch = int(max(1, min(resamples, AT_ONCE // max(1, len(cell_N) * 2 * groups))))
    found = jax.device_get(
        _resampled(jax.random.key(seed), probability_N[order_N], cell_N, start_X[cell_N], size_X[cell_N], groups,
                   resamples, batch)  # fmt: skip
    )
    return {name: value_R.astype(np.float64) for name, value_R in found.items()}


def interval(value_R: np.ndarray) -> tuple[float, float]:
    """Return the 95 % percentile interval, (low, high), of resampled values or of their differences."""
    low, high = np.percentile(value_R, (2.5, 97.5))
    return float(low), float(high)


@functools.partial(jax.jit, static_argnames=("groups", "resamples", "batch"))
def _resampled(
    key: jax.Array,
    probability_N: jax.Array,
    cell_N: jax.Array,
    start_N: jax.Array,
    size_N: jax.Array,
    groups: int,
    resamples: int,
    batch: int,
) -> dict[str, jax.Array]:
    def one(key):
        # Rows of a stratum differ by their probability alone: each takes that of a random row of its stratum.
        drawn_N = start_N + jax.random.randint(key, start_N.shape, 0, size_N)
        return group_metrics(probability_N[drawn_N], cell_N % 2, cell_N // 2, groups)

    return jax.lax.map(one, jax.random.split(key, resamples), batch_size=batch)
