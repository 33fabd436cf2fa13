"""Group fairness of decisions that may be random. Shapes: N examples, A groups, Y classes (2)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


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
