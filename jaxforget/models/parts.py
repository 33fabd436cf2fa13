"""What several families share: plain self-attention, the MLP without a gate, and how a causal model ends.

Shapes: B batch, T tokens, D width, F MLP width, N heads, H head width, V vocabulary, C classes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxforget.models.layers import ACTIVATIONS, Draws, Place, last_token, self_attention
from jaxforget.models.modules import Linear


class Attention(nnx.Module):
    """Self-attention with a dense layer each for queries, keys, values and output."""

    def __init__(self, D: int, heads: int, draws: Draws, *, std: float, bias: bool):
        self.q, self.k, self.v, self.o = (Linear(D, D, draws, std=std, bias=bias) for _ in range(4))
        self.heads = heads

    def __call__(self, x_BTD, place, layer):
        B, T, D = x_BTD.shape
        q, k, v = (part(x_BTD).reshape(B, T, self.heads, -1) for part in (self.q, self.k, self.v))
        y_BTNH, cache = self_attention(q, k, v, place, layer)
        return self.o(y_BTNH.reshape(B, T, D)), cache


class MLP(nnx.Module):
    """Two dense layers around an activation. down_std: of the second, where it differs."""

    def __init__(
        self,
        D: int,
        F: int,
        draws: Draws,
        *,
        std: float,
        activation: str,
        bias: bool = True,
        down_std: float | None = None,
    ):
        self.up = Linear(D, F, draws, std=std, bias=bias)
        self.down = Linear(F, D, draws, std=down_std or std, bias=bias)
        self.activation = activation

    def __call__(self, x_BTD):
        return self.down(ACTIVATIONS[self.activation](self.up(x_BTD)))


def add_head(top: nnx.Module, config: Any, width: int, draws: Draws, *, std: float) -> None:
    """Give the Top of a causal model what its head needs: `score` for classes, `head` for an untied vocabulary."""
    if config.head == "classification":
        top.score = Linear(width, len(config.labels), draws, std=std, bias=False)
    elif config.head == "causal" and not config.tie_word_embeddings:
        top.head = Linear(width, config.vocab_size, draws, std=std, bias=False)


def apply_head(top: nnx.Module, config: Any, x_BTD: jax.Array, place: Place) -> jax.Array:
    """Score the next token (B, T, V), or the class from the last real token (B, C); without a head return x_BTD."""
    if config.head == "none":
        return x_BTD
    if config.head == "classification":
        return top.score(last_token(x_BTD, place.lengths_B), jnp.float32)
    return top.embed.attend(x_BTD) if config.tie_word_embeddings else top.head(x_BTD, jnp.float32)


def head_keys(config: Any, vocabulary: str = "lm_head.weight") -> dict[str, tuple[str, bool]]:
    """Map the Hugging Face names of what `add_head` adds. vocabulary: the name of an untied output head."""
    if config.head == "classification":
        return {"score.weight": ("score/kernel", True)}
    if config.head == "causal" and not config.tie_word_embeddings:
        return {vocabulary: ("head/kernel", True)}
    return {}
