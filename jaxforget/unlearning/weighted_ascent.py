"""Ascent weighted token by token: how much a token is pushed down depends on its own probability.

    WGA      L_forget = mean over scored tokens of sg(p^beta) log p
    SatImp   L_forget = mean over scored tokens of sg(p^beta1 (1 - p)^beta2) log p

With exponents 0 both are gradient ascent on the token mean. For beta > 0 the loss and its gradient vanish where p is
0: what is forgotten is left alone. Sources: arXiv 2502.19301 (WGA) and 2505.11953 (SatImp), in the form of the
released code of arXiv 2506.12618. SatImp's weights 1 and 0.1 are those of the class and the README there; its YAML
file has them the other way round.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxforget import checks
from jaxforget.training.objectives import sequence_mean, token_logp
from jaxforget.unlearning import retain
from jaxforget.unlearning.recipe import Loss, Recipe, Setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class WGA(retain.RetainConfig):
    beta: float = 1.0
    """Exponent of the probability; the more, the sooner a token is left alone."""

    def __post_init__(self):
        super().__post_init__()
        checks.at_least(0, beta=self.beta)

    def recipe(self, setting: Setting) -> Recipe:
        return retain.recipe(self, setting, setting.sets["forget"], weighted(self.beta, 0.0), "token")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SatImp(retain.RetainConfig):
    retain_weight: float = 0.1
    """w_r, alpha in OpenUnlearning. 0 leaves the retain term out."""
    beta1: float = 5.0
    """Exponent of the probability: saturation."""
    beta2: float = 1.0
    """Exponent of its complement: importance."""

    def __post_init__(self):
        super().__post_init__()
        checks.at_least(0, beta1=self.beta1, beta2=self.beta2)

    def recipe(self, setting: Setting) -> Recipe:
        return retain.recipe(self, setting, setting.sets["forget"], weighted(self.beta1, self.beta2), "token")


@functools.cache
def weighted(beta1: float, beta2: float) -> Loss:
    """losses_B = mean over scored tokens of sg(p^beta1 (1 - p)^beta2) log p."""

    def loss(parts, batch, logits_BTV):
        logp_BT, scored_BT = token_logp(logits_BTV, batch["labels"])
        weight_BT = jnp.exp(beta1 * logp_BT) * (-jnp.expm1(logp_BT)) ** beta2
        return sequence_mean(jax.lax.stop_gradient(weight_BT) * logp_BT, scored_BT)

    return loss
