"""The rate that shares of the peak are shares of."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import timing
from benchmarks.speed.config import Config
from jaxforget.training import cost

CHAIN = 4  # products of a turn

# FLOP/s of dense bfloat16 products, by JAX's name of the device.
STATED = {
    "NVIDIA H200": (790e12, "what a product of random bfloat16 matrices of 8192 x 8192 reaches; 989e12 by data sheet"),
    "TPU v5": (cost.HARDWARE["v5p"].flops, cost.HARDWARE["v5p"].source),
    "TPU v5p": (cost.HARDWARE["v5p"].flops, cost.HARDWARE["v5p"].source),
}


def peak(config: Config, dtype: str) -> dict[str, Any]:
    """Return the peak of the device in FLOP/s with its source: as stated above, else as measured here.

    Measured are products of matrices of random numbers; the fastest turn counts.
    """
    N = config.product
    x, w = (jax.random.normal(key, (N, N), dtype) for key in jax.random.split(jax.random.key(0)))

    @jax.jit
    def chain(x, w):
        return jax.lax.fori_loop(0, CHAIN, lambda i, x: (x @ w) * jnp.asarray(N**-0.5, x.dtype), x)

    seconds, _ = timing.turns({"product": lambda: jax.block_until_ready(chain(x, w))}, config.repeats)
    measured = CHAIN * 2 * N**3 / min(seconds["product"])
    about = f"a {dtype} product of {N} x {N} matrices, the fastest of {config.repeats} turns in this run"
    stated, source = STATED.get(jax.devices()[0].device_kind, (None, None)) if dtype == "bfloat16" else (None, None)
    return {"flops": stated or measured, "source": source or about, "measured_flops": measured}
