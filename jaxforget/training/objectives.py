"""Objectives shared by training and unlearning. Shapes: B batch, T tokens, V vocabulary.

Batches hold `tokens_BT`, `labels_BT` (the token to predict from each position, -100 where none is scored) or `label_B`
(the class), and what `Batches` adds, such as `factor_B`: the coefficient of the example's loss (negative ascends).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxforget.data.tokens import IGNORED
from jaxforget.models import Model
from jaxforget.training.step import Objective


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
def next_token(model: Model) -> Objective:
    """Negative log-likelihood a token: losses_B = factor_B * mean over scored tokens of -log p, in nats."""

    def losses(parts, batch, key):
        logp_BT, scored_BT = token_logp(model.batch_logits(parts["model"], batch), batch["labels"])
        return batch["factor"] * -sequence_mean(logp_BT, scored_BT)

    return losses


@functools.cache
def drawn_token(model: Model) -> Objective:
    """next_token with every label replaced by what the model itself draws there, the text before it being the real one.

    The gradients have mean 0 and the Fisher information as covariance. The draws are a function of `draw_B`.
    """

    def losses(parts, batch, key):
        logits_BTV = model.batch_logits(parts["model"], batch).astype(jnp.float32)
        draw = jax.vmap(lambda draw, logits_TV: jax.random.categorical(jax.random.key(draw), logits_TV))
        drawn_BT = draw(batch["draw"], jax.lax.stop_gradient(logits_BTV))
        logp_BT, scored_BT = token_logp(logits_BTV, jnp.where(batch["labels"] != IGNORED, drawn_BT, IGNORED))
        return batch["factor"] * -sequence_mean(logp_BT, scored_BT)

    return losses


@functools.cache
def classification(model: Model) -> Objective:
    """Negative log-likelihood of the class: losses_B = factor_B * -log p(label_B), in nats."""

    def losses(parts, batch, key):
        logp_BC = jax.nn.log_softmax(model.batch_logits(parts["model"], batch).astype(jnp.float32))
        return batch["factor"] * -jnp.take_along_axis(logp_BC, batch["label"][:, None], axis=1)[:, 0]

    return losses


@functools.cache
def masked_token(model: Model, mask_id: int) -> Objective:
    """Negative log-likelihood of masked tokens: losses_B = factor_B * mean over them of -log p, in nats.

    What is masked is a function of `draw_B` alone: (seed, example id, epoch). See `mask_tokens`.
    """

    def losses(parts, batch, key):
        tokens_BT, labels_BT = mask_tokens(batch["tokens"], batch["labels"], batch["draw"], mask_id, model.vocab_size)
        logp_BT, scored_BT = token_logp(model.batch_logits(parts["model"], batch | {"tokens": tokens_BT}), labels_BT)
        return batch["factor"] * -sequence_mean(logp_BT, scored_BT)

    return losses


def mask_tokens(
    tokens_BT: jax.Array, labels_BT: jax.Array, draw_B: jax.Array, mask_id: int, vocab_size: int, rate: float = 0.15
) -> tuple[jax.Array, jax.Array]:
    """Choose tokens to predict and hide them. Returns (tokens_BT, labels_BT), labels -100 where nothing is predicted.

    A position with a label is chosen with probability `rate`, and at least one a row is; of the chosen 80 % become the
    mask, 10 % any token, 10 % stay. Source: arXiv 1810.04805, section 3.1.
    """

    def one(tokens_T, labels_T, draw):
        choice_key, kind_key, token_key = jax.random.split(jax.random.key(draw), 3)
        choice_T = jnp.where(labels_T != IGNORED, jax.random.uniform(choice_key, tokens_T.shape), 2.0)
        chosen_T = (choice_T < rate) | ((choice_T == jnp.min(choice_T)) & (choice_T < 2.0))
        kind_T = jax.random.uniform(kind_key, tokens_T.shape)
        any_T = jax.random.randint(token_key, tokens_T.shape, 0, vocab_size, tokens_T.dtype)
        hidden_T = jnp.where(kind_T < 0.8, mask_id, jnp.where(kind_T < 0.9, any_T, tokens_T))
        return jnp.where(chosen_T, hidden_T, tokens_T), jnp.where(chosen_T, labels_T, IGNORED)

    return jax.vmap(one)(tokens_BT, labels_BT, draw_B)


@functools.cache
def next_token_with_kl(model: Model) -> Objective:
    """`next_token` on the first stream; KL to the reference model, a token, on the others.

    losses_B = factor_B * mean over scored tokens of KL(p_reference || p_theta) in nats, where `stream_B` > 0.
    """

    def losses(parts, batch, key):
        kl_B = batch["stream"] > 0
        logits_BTV = model.batch_logits(parts["model"], batch)
        logp_BT, scored_BT = token_logp(logits_BTV, batch["labels"])
        # Micro-batches of one stream skip the reference model where it is not needed.
        reference_BTV = jax.lax.cond(
            jnp.any(kl_B),
            lambda: model.batch_logits(parts["reference"], batch),
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


def objective_for(task: str, model: Model, mask_id: int | None = None) -> Objective:
    """Return the training objective of a task: causal, seq2seq, classification or masked."""
    if task == "masked":
        return masked_token(model, mask_id)
    return {"causal": next_token, "seq2seq": next_token, "classification": classification}[task](model)
