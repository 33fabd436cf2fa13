"""Accuracy and group fairness of decisions that may be random. Shapes: N examples, A groups, Y classes (2)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

AT_ONCE = 1 << 22  # numbers of the resamples that are measured side by side


def group_metrics(
    probability_N: jax.Array,
    label_N: jax.Array,
    group_N: jax.Array,
    groups: int,
    weight_N: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Measure expected metrics of outputs that are 1 with the given probability; shares, from 0 to 1.

    Inside jit and vmap too. Hard decisions are probabilities 0 and 1. weight_N: what an example counts for (default 1).
    accuracy and error over all; accuracy_A, selection_A = P(output 1), fpr_A = P(output 1 | label 0) and tpr_A =
    P(output 1 | label 1) by group. Gaps are max - min over groups: eo_max, eo_avg and eo_sum are the larger, the mean
    and the sum of the gaps of fpr and tpr; demographic_parity is that of selection. For two groups eo_avg is the
    average of absolute odds differences. A rate without examples is NaN, and so are the gaps that need it.
    """
    real = jnp.result_type(float)
    probability_N = jnp.asarray(probability_N, real)
    weight_N = jnp.ones_like(probability_N) if weight_N is None else jnp.asarray(weight_N, real)
    cell_N = jnp.asarray(group_N) * 2 + jnp.asarray(label_N)
    member_NX = jax.nn.one_hot(cell_N, 2 * groups, dtype=real)  # X: groups and classes
    # An accelerator's default precision of products, 3 digits, would be too coarse.
    total = functools.partial(jnp.matmul, precision="highest")
    size_AY = total(weight_N, member_NX).reshape(groups, 2)
    ones_AY = total(weight_N * probability_N, member_NX).reshape(groups, 2)
    correct_AY = jnp.stack([size_AY[:, 0] - ones_AY[:, 0], ones_AY[:, 1]], axis=1)
    rate_AY = ones_AY / size_AY
    size_A = jnp.sum(size_AY, axis=1)
    selection_A = jnp.sum(ones_AY, axis=1) / size_A
    gap_Y = jnp.max(rate_AY, axis=0) - jnp.min(rate_AY, axis=0)
    accuracy = jnp.sum(correct_AY) / jnp.sum(size_AY)
    return {
        "accuracy": accuracy,
        "error": 1 - accuracy,
        "eo_max": jnp.max(gap_Y),
        "eo_avg": jnp.mean(gap_Y),
        "eo_sum": jnp.sum(gap_Y),
        "demographic_parity": jnp.max(selection_A) - jnp.min(selection_A),
        "accuracy_A": jnp.sum(correct_AY, axis=1) / size_A,
        "selection_A": selection_A,
        "fpr_A": rate_AY[:, 0],
        "tpr_A": rate_AY[:, 1],
    }


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
def _resampled(key, probability_N, cell_N, start_N, size_N, groups: int, resamples: int, batch: int):
    def one(key):
        # Rows of a stratum differ by their probability alone: each takes that of a random row of its stratum.
        drawn_N = start_N + jax.random.randint(key, start_N.shape, 0, size_N)
        return group_metrics(probability_N[drawn_N], cell_N % 2, cell_N // 2, groups)

    return jax.lax.map(one, jax.random.split(key, resamples), batch_size=batch)
