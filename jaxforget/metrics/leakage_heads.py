"""Small heads that predict an attribute from a representation, several at once: adversaries and attackers.

Dropout, dense, tanh, dropout, dense; the shape of the released code of arXiv 2205.15171. Shapes: H heads, B batch, D
width, C classes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

DROPOUT = 0.3


def draw_heads(key: jax.Array, heads: int, width: int, classes: int) -> dict[str, Any]:
    """Draw heads from U(-1 / sqrt(inputs), 1 / sqrt(inputs)), kernels and biases: every leaf has a leading H."""
    bound = width**-0.5

    def one(key):
        keys = jax.random.split(key, 4)
        shapes = {"up": ((width, width), (width,)), "down": ((width, classes), (classes,))}
        return {
            name: {
                "kernel": jax.random.uniform(keys[2 * i], kernel, jnp.float32, -bound, bound),
                "bias": jax.random.uniform(keys[2 * i + 1], bias, jnp.float32, -bound, bound),
            }
            for i, (name, (kernel, bias)) in enumerate(shapes.items())
        }

    return jax.vmap(one)(jax.random.split(key, heads))


def head_logp(
    heads_H: dict[str, Any], x_BD: jax.Array, key: jax.Array | None = None, dropout: float = DROPOUT
) -> jax.Array:
    """Return log p of every class by every head, float32 (H, B, C). Without a key nothing is dropped."""

    def one(head, key):
        keys = (None, None) if key is None else jax.random.split(key)
        h_BD = jnp.tanh(_dense(head["up"], _dropped(x_BD.astype(jnp.float32), keys[0], dropout)))
        return jax.nn.log_softmax(_dense(head["down"], _dropped(h_BD, keys[1], dropout)))

    count = jax.tree.leaves(heads_H)[0].shape[0]
    if key is None:
        return jax.vmap(lambda head: one(head, None))(heads_H)
    return jax.vmap(one)(heads_H, jax.random.split(key, count))


def _dense(layer, x_BD):
    return x_BD @ layer["kernel"] + layer["bias"][None]


def _dropped(x_BD: jax.Array, key: jax.Array | None, rate: float) -> jax.Array:
    if key is None or not rate:
        return x_BD
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x_BD.shape), x_BD / (1.0 - rate), 0.0)
