"""One prediction from an ensemble: finish(sum_k w_k each(logp_k) / sum_k w_k) for members k with weights w_k.

A member enters by its own term, so where all members at once do not fit memory, such as (K, B, T, V) of language
models, add up w_k * each(logp_k) one member at a time and finish the mean. Shapes: K members, C classes (for a language
model the vocabulary), x any axes between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxforget.errors import UserError


class Aggregation(NamedTuple):
    """How members are averaged; both functions act on the last axis, of classes."""

    each: Callable[[jax.Array], jax.Array]  # logp_xC of one member, nats -> what is averaged over members, (x, C)
    finish: Callable[[jax.Array], jax.Array]  # that average -> probability_xC


def _vote(logp_xC: jax.Array) -> jax.Array:
    return jax.nn.one_hot(jnp.argmax(logp_xC, axis=-1), logp_xC.shape[-1])  # the first, so smallest, of equal classes


def _same(value_xC: jax.Array) -> jax.Array:
    return value_xC


# mean_logits: log p is the logits less a number that is the same for all classes, and softmax drops that number from
# the mean again. So log-probabilities and logits give the same result.
AGGREGATIONS: dict[str, Aggregation] = {
    "majority": Aggregation(each=_vote, finish=_same),
    "mean_probability": Aggregation(each=jnp.exp, finish=_same),
    "mean_logits": Aggregation(each=_same, finish=jax.nn.softmax),
}


def choose(name: str) -> Aggregation:
    """Look up an aggregation. Raises UserError listing the valid names."""
    if name not in AGGREGATIONS:
        raise UserError(f"unknown aggregation {name!r}; valid names are {', '.join(AGGREGATIONS)}")
    return AGGREGATIONS[name]


def aggregate(name: str, logp_KxC: jax.Array, weight_K: Sequence[float] | np.ndarray | None = None) -> jax.Array:
    """Combine members into probability_xC, float32; for `majority` these are shares of the votes.

    logp_KxC: log p of every class by every member, nats. weight_K: known numbers >= 0 (default: 1 each); a member of
    weight 0 is left out, even where its log p is NaN. The argmax of a tied vote is the smallest class.
    Raises ValueError for weights that are negative, not finite, all 0, or not K.
    """
    rule = choose(name)
    weight_K = np.ones(len(logp_KxC)) if weight_K is None else np.asarray(weight_K, np.float64)
    if weight_K.shape != logp_KxC.shape[:1]:
        raise ValueError(f"weight_K has shape {weight_K.shape} for {len(logp_KxC)} members; give one weight each")
    if not (np.all(np.isfinite(weight_K) & (weight_K >= 0)) and np.any(weight_K > 0)):
        raise ValueError(f"weight_K is {weight_K.tolist()}; give numbers >= 0, at least one above 0")
    counted = np.flatnonzero(weight_K)
    weights = jnp.asarray(weight_K[counted], jnp.float32).reshape(-1, *[1] * (logp_KxC.ndim - 1))
    terms = rule.each(jnp.asarray(logp_KxC)[counted].astype(jnp.float32))
    # Divided after the sum: whole votes add up exactly, so that equal shares of the votes are equal numbers.
    return rule.finish(jnp.sum(weights * terms, axis=0) / jnp.sum(weights))
