"""Batched generation with a key/value cache. Shapes: B rows, T prompt tokens, N new tokens, V vocabulary."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxforget.errors import UserError
from jaxforget.models.model import Cache, Model, Params
from jaxforget.models.sharding import place_rows


def generate(
    model: Model,
    params: Params,
    tokens_BT: ArrayLike,
    mask_BT: ArrayLike,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    eos_id: int | tuple[int, ...] | None = None,
    pad_id: int = 0,
    row_ids: ArrayLike | None = None,
    wanted_B: ArrayLike | None = None,
) -> jax.Array:
    """Continue every prompt; return tokens_BN, `pad_id` after the first `eos_id`.

    mask_BT: True at prompt tokens; padding may stand anywhere. temperature: 0 takes the likeliest token,
    otherwise divides the logits. top_p: sample from the fewest likeliest tokens that hold this probability,
    in (0, 1].
    key: needed where temperature > 0. eos_id: one id or several. row_ids: ints that name the rows, default
    0..B-1; row i draws from fold_in(key, row_ids[i]), so its tokens depend on neither padding nor the rest of
    the batch. wanted_B: False for rows that only fill the batch: they get `pad_id` and are not waited for. Raises
    UserError for values outside these ranges, an empty prompt, more tokens than learned positions, or a head
    that does not generate.
    """
    if model.config.head not in ("causal", "seq2seq"):
        raise UserError(f"the model's head is {model.config.head}; only causal and seq2seq heads generate")
    mask_BT = np.asarray(mask_BT, bool)
    tokens_BT = np.asarray(tokens_BT, np.int32)
    lengths_B = mask_BT.sum(axis=1).astype(np.int32)
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if temperature < 0:
        raise UserError(f"temperature is {temperature}; it must be 0 or above")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}; it must be above 0 and at most 1")
    if temperature > 0 and key is None:
        raise UserError("key is missing; sampling with temperature above 0 needs one")
    if (lengths_B == 0).any():
        raise UserError(f"prompt {int(np.argmin(lengths_B))} is empty; every prompt needs at least one token")
    limit = model.config.position_limit
    if limit is not None and lengths_B.max() + max_new_tokens > limit:
        raise UserError(
            f"max_new_tokens is {max_new_tokens} after a prompt of {lengths_B.max()}; this model has {limit} positions"
        )
    # Move each row's tokens to the front. Then the side of the padding leaves no trace, not even in rounding.
    order_BT = np.argsort(~mask_BT, axis=1, kind="stable")[:, : lengths_B.max()]
    tokens_BT = np.take_along_axis(tokens_BT, order_BT, axis=1)
    row_ids = np.arange(len(tokens_BT)) if row_ids is None else np.asarray(row_ids)
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0) if key is None else key, row_ids)
    sampling = {"keys_B": keys_B, "temperature": jnp.float32(temperature or 1.0), "top_p": jnp.float32(top_p)}
    greedy = temperature == 0
    tokens_BT, lengths_B = place_rows((tokens_BT, lengths_B))
    logits_BV, cache, next_B = _prefill(model, params, tokens_BT, lengths_B, max_new_tokens)
    eos_ids = np.atleast_1d(np.asarray(() if eos_id is None else eos_id, np.int32))
    ended_B = np.zeros(len(tokens_BT), bool) if wanted_B is None else ~np.asarray(wanted_B, bool)
    return _decode(model, params, logits_BV, cache, next_B, ended_B, sampling, eos_ids, pad_id, max_new_tokens, greedy)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _prefill(
    model: Model, params: Params, tokens_BT: jax.Array, lengths_B: jax.Array, new: int
) -> tuple[jax.Array, Cache, jax.Array]:
    return model.prefill(params, tokens_BT, lengths_B, new)


@functools.partial(jax.jit, static_argnums=(0, 9, 10))
def _decode(
    model: Model,
    params: Params,
    logits_BV: jax.Array,
    cache: Cache,
    next_B: jax.Array,
    ended_B: jax.Array,
    sampling: dict[str, jax.Array],
    eos_ids: jax.Array,
    pad_id: int,
    new: int,
    greedy: bool,
) -> jax.Array:
    """Draw up to `new` tokens a row, stopping early when every row has ended."""
    B = next_B.shape[0]

    def draw(logits_BV, n):
        if greedy:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        keys_B = jax.vmap(jax.random.fold_in, (0, None))(sampling["keys_B"], n)
        logits_BV = nucleus(logits_BV / sampling["temperature"], sampling["top_p"])
        return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)

    def going(state):
        n, _, _, ended_B, _ = state
        return (n < new) & ~jnp.all(ended_B)

    def step(state):
        n, logits_BV, cache, ended_B, out_BN = state
        token_B = jnp.where(ended_B, pad_id, draw(logits_BV, n))
        out_BN = jax.lax.dynamic_update_slice_in_dim(out_BN, token_B[:, None], n, axis=1)
        ended_B = ended_B | jnp.any(token_B[:, None] == eos_ids[None, :], axis=1)
        position_B1 = (next_B + n)[:, None]
        valid_B1 = jnp.ones((B, 1), bool)
        logits_B1V, cache = model.cached(params, token_B[:, None], cache, position_B1, valid_B1)
        return n + 1, logits_B1V[:, 0], cache, ended_B, out_BN

    out_BN = jnp.full((B, new), pad_id, jnp.int32)
    state = (jnp.int32(0), logits_BV, cache, ended_B, out_BN)
    return jax.lax.while_loop(going, step, state)[-1]


def nucleus(logits_BV: jax.Array, top_p: jax.Array) -> jax.Array:
    """Set to -inf all but the fewest likeliest tokens holding probability top_p. Source: arXiv 1904.09751."""
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    p_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
    # The likeliest token stays whatever top_p is. At 1 all stay: rounding must not drop the tail.
    kept_BV = (before_BV < top_p) | (top_p >= 1.0)
    threshold_B1 = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV >= threshold_B1, logits_BV, -jnp.inf)
