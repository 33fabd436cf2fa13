"""Gradient estimators: from per-example losses to one gradient.

Each returns `gradient(losses, trainable, batch, key) -> (report, grads)`, where `losses(trainable, batch, key)`
gives losses_B. Shapes: B examples, M micro-batches.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxforget.models.sharding import pin_rows
from jaxforget.training.step import Batch, Gradient


def microbatches(batch: Batch, size: int) -> Batch:
    """Cut a batch into M parts of `size` rows, (M, size, ...); each part is spread over all devices."""
    return pin_rows(jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), batch), axis=1)


@functools.cache
def mean_gradient(microbatch: int | None = None) -> Gradient:
    """Differentiate the weighted mean  sum_b w_b loss_b / sum_b w_b.

    microbatch: examples differentiated at a time by a scan, or None for all at once. It bounds memory, and on a CPU
    it is also faster. Numerator and denominator are reduced separately, so the result is the mean over the batch
    whatever the split. A row of weight 0 contributes exactly nothing.
    """

    def gradient(losses, trainable, batch, key):
        weight_B = batch["weight"].astype(jnp.float32)
        rows = weight_B.shape[0]
        size = min(microbatch or rows, rows)
        if rows % size:
            raise ValueError(f"microbatch {size} does not divide the batch of {rows} rows")

        def weighted_sum(trainable, part):
            losses_B = losses(trainable, part, key).astype(jnp.float32)
            # where, not only a product: 0 * inf would poison the sum.
            weight_B = part["weight"].astype(jnp.float32)
            return jnp.sum(jnp.where(weight_B > 0, weight_B * losses_B, 0.0))

        differentiate = jax.value_and_grad(weighted_sum)
        if size == rows:
            total, grads = differentiate(trainable, pin_rows(batch))
        else:
            parts_M = microbatches(batch, size)

            def add(carry, part):
                return jax.tree.map(jnp.add, carry, differentiate(trainable, part)), None

            zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, trainable))
            (total, grads), _ = jax.lax.scan(add, zero, parts_M)
        scale = 1.0 / jnp.maximum(jnp.sum(weight_B), jnp.finfo(jnp.float32).tiny)
        return {"loss": total * scale}, jax.tree.map(lambda g: g * scale, grads)

    return gradient
