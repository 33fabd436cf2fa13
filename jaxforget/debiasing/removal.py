"""Losses that take an attribute out of a representation. One function each, and a row of REMOVALS.

    removal(x_BD, attribute_B, weight_B, heads, scale, key) -> losses_B

x_BD: the pooled representation. attribute_B: classes. weight_B: 1 / (C * share of the class), so that classes count
alike, and 0 where the attribute is unknown or the row is padding. scale: how much the model cares against its task.
heads: of metrics/leakage_heads.py, which train in the same step. Shapes: B batch, D width, H heads, C classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxforget.metrics.leakage_heads import head_logp
from jaxforget.training.step import PyTree


class Removal(NamedTuple):
    """A removal loss. couples: rows of a batch depend on each other, so that clipped gradients are none of one row."""

    losses: Callable[..., jax.Array]
    couples: bool = False


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def reverse(x: jax.Array, scale: float) -> jax.Array:
    """Return x; its gradient comes back times -scale. Source: arXiv 1505.07818."""
    return x


reverse.defvjp(lambda x, scale: (x, None), lambda scale, _, g: (jax.tree.map(lambda g: -scale * g, g),))


def adversarial(
    x_BD: jax.Array, attribute_B: jax.Array, weight_B: jax.Array, heads: PyTree, scale: float, key: jax.Array
) -> jax.Array:
    """Cross-entropy of every head, mean over heads, in nats; the model climbs what the heads descend.

    Source: arXiv 2205.15171, released code.
    """
    logp_HBC = head_logp(heads, reverse(x_BD, scale), key)
    return weight_B * _cross_entropy(logp_HBC, attribute_B)


def information(
    x_BD: jax.Array, attribute_B: jax.Array, weight_B: jax.Array, heads: PyTree, scale: float, key: jax.Array
) -> jax.Array:
    """Information about the attribute, I = KL(q(a|x) || uniform), as heads q estimate it; they train beside.

    E_x KL(p(a|x) || p(a)) is the mutual information, and classes weigh alike. Unlike the adversarial loss it ends at 0,
    where heads cannot tell, and never asks for the wrong class. In nats, mean over heads.
    """
    learning = _cross_entropy(head_logp(heads, jax.lax.stop_gradient(x_BD), key), attribute_B)
    logp_HBC = head_logp(jax.lax.stop_gradient(heads), x_BD, key)
    kl_B = jnp.mean(jnp.sum(jnp.exp(logp_HBC) * (logp_HBC + jnp.log(logp_HBC.shape[-1])), axis=-1), axis=0)
    return weight_B * (learning + scale * kl_B)


def mmd(
    x_BD: jax.Array, attribute_B: jax.Array, weight_B: jax.Array, heads: PyTree, scale: float, key: jax.Array
) -> jax.Array:
    """Squared distance of the classes' mean kernel features, biased estimate, summed over pairs of classes.

    Kernel: sum of exp(-|x - y|^2 / (2 s)), s = (1/4, 1/2, 1, 2, 4) times the median squared distance of the batch,
    which takes no gradient. The paper names an objective of this kind and gives no kernel; this one is ours. A pair
    with fewer than two rows of a class counts 0. Every row has the loss of the batch. Source: arXiv 0805.2368, eq. 5.
    """
    x_BD = x_BD.astype(jnp.float32)
    square_B = jnp.sum(jnp.square(x_BD), axis=1)
    distance_BB = jnp.maximum(square_B[:, None] + square_B[None] - 2 * x_BD @ x_BD.T, 0.0)
    known_B = weight_B > 0
    both_BB = known_B[:, None] & known_B[None] & ~jnp.eye(len(known_B), dtype=bool)
    median = jax.lax.stop_gradient(jnp.nanmedian(jnp.where(both_BB, distance_BB, jnp.nan)))
    median = jnp.maximum(jnp.nan_to_num(median, nan=1.0), 1e-6)
    kernel_BB = sum(jnp.exp(-distance_BB / (2.0 * factor * median)) for factor in (0.25, 0.5, 1.0, 2.0, 4.0))
    classes = heads["down"]["bias"].shape[-1]
    member_BC = (attribute_B[:, None] == jnp.arange(classes)[None]) & known_B[:, None]
    count_C = jnp.sum(member_BC, axis=0)
    share_BC = member_BC / jnp.maximum(count_C, 1)[None]
    mean_CC = share_BC.T @ kernel_BB @ share_BC  # mean kernel between rows of two classes
    diagonal_C = jnp.diagonal(mean_CC)
    square_CC = diagonal_C[:, None] + diagonal_C[None] - 2.0 * mean_CC
    valid_CC = (count_C[:, None] > 1) & (count_C[None] > 1) & jnp.triu(jnp.ones_like(mean_CC, bool), 1)
    total = jnp.sum(jnp.where(valid_CC, square_CC, 0.0))
    return scale * jnp.broadcast_to(total, attribute_B.shape)


def _cross_entropy(logp_HBC, attribute_B):
    logp_HB = jnp.take_along_axis(logp_HBC, jnp.maximum(attribute_B, 0)[None, :, None], axis=2)[..., 0]
    return -jnp.mean(logp_HB, axis=0)


REMOVALS = {
    "adversarial": Removal(adversarial),
    "information": Removal(information),
    "mmd": Removal(mmd, couples=True),
}
