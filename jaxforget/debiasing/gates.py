"""Hard-concrete gates: random numbers in [0, 1] that are exactly 0 or 1 much of the time. Source: arXiv 1712.01312.

    s = sigmoid(log u - log(1 - u) + alpha),  u ~ U(1e-4, 1 - 1e-4)
    z = clip(s (high - low) + low, 0, 1)                  without noise: s = sigmoid(alpha)
    P(z > 0) = sigmoid(alpha - log(-low / high))          summed over gates, the expected L0 norm

The temperature is 1. alpha stays float32, as do its gradients: those of the penalty vanish in half precision.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxforget.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateConfig:
    """Gates of a sparse difference. Defaults: the released code of arXiv 2012.07463 and 2205.15171."""

    low: float = -1.5
    """Lower end of the stretched interval, below 0."""
    high: float = 1.5
    """Upper end of the stretched interval, above 1."""
    start: float = 5.0
    """alpha of every gate before training; 5 is open."""
    structured: bool = False
    """Multiply the gate of every parameter by one gate of its tensor."""
    straight_through: bool = False
    """Let gradients reach values behind closed gates: (1 + z) times that of the sum, as released; else z times."""

    def __post_init__(self):
        if not -math.inf < self.low < 0:
            raise UserError(f"gates.low is {self.low}; it must be below 0 and finite")
        if not 1 < self.high < math.inf:
            raise UserError(f"gates.high is {self.high}; it must be above 1 and finite")
        if not math.isfinite(self.start):
            raise UserError(f"gates.start is {self.start}; it must be finite")


def stretched(alpha: jax.Array, config: GateConfig, u: jax.Array | None = None) -> jax.Array:
    """Return z for noise u in (0, 1), or without noise."""
    noise = 0.0 if u is None else jnp.log(u) - jnp.log1p(-u)
    return jnp.clip(jax.nn.sigmoid(alpha + noise) * (config.high - config.low) + config.low, 0.0, 1.0)


def sample(alpha: jax.Array, config: GateConfig, key: jax.Array | None = None) -> jax.Array:
    """Draw z, or give z without noise where there is no key."""
    if key is None:
        return stretched(alpha, config)
    return stretched(alpha, config, jax.random.uniform(key, alpha.shape, jnp.float32, 1e-4, 1.0 - 1e-4))


def open_probability(alpha: jax.Array, config: GateConfig) -> jax.Array:
    """Return P(z > 0)."""
    return jax.nn.sigmoid(alpha - math.log(-config.low / config.high))
