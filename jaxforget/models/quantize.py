"""Weights as they come back from 8 or 4 bits. Shapes: L layers, D inputs, F outputs, Q blocks.

What is quantised is what bitsandbytes quantises in a model: the kernels of the blocks. Embeddings, norms, biases and
heads keep their values. A kernel is (D, F) here and (F, D) in files; rows and blocks are those of the files.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxforget.errors import UserError
from jaxforget.models.model import Model, Params

# NormalFloat-4: arXiv 2305.14314, appendix E.
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
       0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip
BLOCK = 64


def quantized(model: Model, params: Params, bits: int) -> Any:
    """Return float32 parameters whose block kernels went through `bits` bits: 8 or 4. Others are as they were."""
    if bits not in QUANTIZE:
        raise UserError(f"quantisation to {bits} bits is unknown; use one of {', '.join(map(str, QUANTIZE))}")

    def through(path, leaf):
        names = [entry.key for entry in path]
        if names[0] not in model.config.stacks or names[-1] != "kernel":
            return leaf
        return np.asarray(QUANTIZE[bits](jnp.asarray(leaf, jnp.float32)))

    return jax.tree_util.tree_map_with_path(through, params)


@jax.jit
def absmax_int8(kernel_LDF: jax.Array) -> jax.Array:
    """Round every row to 255 steps of its largest magnitude: q = round(127 w / max|w|), w' = q max|w| / 127.

    A row is what makes one output (arXiv 2208.07339, vector-wise). Any leading axes.
    """
    top = jnp.max(jnp.abs(kernel_LDF), axis=-2, keepdims=True)
    steps = jnp.round(127.0 * kernel_LDF / jnp.where(top > 0, top, 1.0))
    return steps * top / 127.0


@functools.partial(jax.jit, static_argnames="block")
def nf4(kernel_LDF: jax.Array, block: int = BLOCK) -> jax.Array:
    """Round to the nearest NF4 level times the largest magnitude of a block: `block` values in the order of the file.

    The last block of a layer may be short. Scales stay float32: no double quantisation. Any leading axes.
    """
    w_LFD = jnp.swapaxes(kernel_LDF, -1, -2)
    lead, size = w_LFD.shape[:-2], w_LFD.shape[-1] * w_LFD.shape[-2]
    w_LN = w_LFD.reshape(*lead, size)
    w_LQB = jnp.pad(w_LN, [(0, 0)] * len(lead) + [(0, -size % block)]).reshape(*lead, -1, block)
    top = jnp.max(jnp.abs(w_LQB), axis=-1, keepdims=True)
    levels = np.asarray(NF4, np.float32)
    index = jnp.searchsorted((levels[1:] + levels[:-1]) / 2, w_LQB / jnp.where(top > 0, top, 1.0))
    back_LN = (jnp.asarray(levels)[index] * top).reshape(*lead, -1)[..., :size]
    return jnp.swapaxes(back_LN.reshape(w_LFD.shape), -1, -2)


QUANTIZE = {8: absmax_int8, 4: nf4}
