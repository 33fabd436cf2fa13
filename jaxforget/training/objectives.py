"""Objectives shared by training and unlearning. Shapes: B batch, T tokens, V vocabulary.

Batches hold `tokens_BT`, `labels_BT` (the token to predict from each position, -100 where none is scored) and,
optionally, `factor_B`: the coefficient of the example's loss (-1 ascends).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxforget.data.tokens import IGNORED


def token_logp(logits_BTV: jax.Array, labels_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return log p of every label in nats (0 where ignored) and the mask of scored positions, both (B, T)."""
    scored_BT = labels_BT != IGNORED
    logits_BTV = logits_BTV.astype(jnp.float32)
    picked_BT = jnp.take_along_axis(logits_BTV, jnp.where(scored_BT, labels_BT, 0)[..., None], axis=-1)[..., 0]
    logp_BT = picked_BT - jax.nn.logsumexp(logits_BTV, axis=-1)
    return jnp.where(scored_BT, logp_BT, 0.0), scored_BT


def sequence_mean(values_BT: jax.Array, scored_BT: jax.Array) -> jax.Array:
    """Average over the scored positions of each sequence; 0 for a sequence without any."""
    count_B = jnp.sum(scored_BT, axis=-1)
    return jnp.sum(jnp.where(scored_BT, values_BT, 0.0), axis=-1) / jnp.maximum(count_B, 1)


@functools.cache
def next_token(model):
    """Negative log-likelihood a token: losses_B = factor_B * mean over scored tokens of -log p, in nats."""

    def losses(parts, batch, key):
        logp_BT, scored_BT = token_logp(model.logits(parts["model"], batch["tokens"]), batch["labels"])
        return batch["factor"] * -sequence_mean(logp_BT, scored_BT)

    return losses


@functools.cache
def next_token_with_kl(model):
    """`next_token` on the first stream; KL to the reference model, a token, on the others.

    losses_B = factor_B * mean over scored tokens of KL(p_reference || p_theta) in nats, where `stream_B` > 0.
    """

    def losses(parts, batch, key):
        kl_B = batch["stream"] > 0
        logits_BTV = model.logits(parts["model"], batch["tokens"])
        logp_BT, scored_BT = token_logp(logits_BTV, batch["labels"])
        # Micro-batches of one stream skip the reference model where it is not needed.
        reference_BTV = jax.lax.cond(
            jnp.any(kl_B),
            lambda: model.logits(parts["reference"], batch["tokens"]),
            lambda: jnp.zeros_like(logits_BTV),
        )
        kl_BT = kl_divergence(reference_BTV, logits_BTV)
        return batch["factor"] * sequence_mean(jnp.where(kl_B[:, None], kl_BT, -logp_BT), scored_BT)

    return losses


def kl_divergence(reference_BTV: jax.Array, logits_BTV: jax.Array) -> jax.Array:
    """KL(softmax(reference) || softmax(logits)) at every position, nats. No gradient reaches the reference."""
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(reference_BTV).astype(jnp.float32))
    log_q = jax.nn.log_softmax(logits_BTV.astype(jnp.float32))
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
