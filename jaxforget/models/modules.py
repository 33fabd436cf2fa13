"""The modules that own parameters, each acting by an operation of layers.py.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxforget.models.layers import Draws, attend, embed, layer_norm, linear, rms_norm


class Linear(nnx.Module):
    """Dense layer. kernel: (inputs, outputs), drawn from N(0, std^2); bias: zeros, if any."""

    def __init__(self, inputs: int, outputs: int, draws: Draws, *, std: float, bias: bool):
        self.kernel = nnx.Param(std * draws((inputs, outputs)))
        if bias:
            self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32))
        self.biased = bias

    def __call__(self, x, out_dtype=None):
        bias = self.bias.get_value() if self.biased else None  # not [...]: LowRank and Tapped have no items
        return linear(x, self.kernel.get_value(), bias, out_dtype=out_dtype)


class Embedding(nnx.Module):
    """Table of `rows` vectors, drawn from N(0, std^2)."""

    def __init__(self, rows: int, width: int, draws: Draws, *, std: float):
        self.table = nnx.Param(std * draws((rows, width)))

    def __call__(self, tokens_BT, dtype):
        return embed(self.table.get_value(), tokens_BT, dtype=dtype)

    def attend(self, x_BTD: jax.Array) -> jax.Array:
        return attend(x_BTD, self.table.get_value())


class LayerNorm(nnx.Module):
    def __init__(self, width: int, *, epsilon: float):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x):
        return layer_norm(x, self.scale.get_value(), self.bias.get_value(), epsilon=self.epsilon)


class RMSNorm(nnx.Module):
    def __init__(self, width: int, *, epsilon: float):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x):
        return rms_norm(x, self.scale.get_value(), epsilon=self.epsilon)
