"""SimNPO: negative preference optimisation without a reference, by the loss a token.

    L_forget = -(2/beta) mean_b log sigmoid(beta (s_b - delta) - margin),   s_b = mean over scored tokens of -log p

Source: arXiv 2410.07163, whose margin gamma stands outside of beta; OpenUnlearning has beta * delta in its place. At
s_b = delta without a margin the value is (2/beta) ln 2. beta 4.5, w_f 0.125 and delta 0 are OpenUnlearning's; the
released code uses beta 2.5 and w_f 0.1375 for TOFU's forget05.
"""

from __future__ import annotations

import dataclasses
import functools

import jax

from jaxforget import checks
from jaxforget.training.objectives import sequence_mean, token_logp
from jaxforget.unlearning import retain
from jaxforget.unlearning.recipe import Loss, Recipe, Setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimNPO(retain.RetainConfig):
    forget_weight: float = 0.125
    """w_f, gamma in OpenUnlearning."""
    beta: float = 4.5
    """Sharpness."""
    delta: float = 0.0
    """Loss a token, in nats, that the forget set should exceed."""
    margin: float = 0.0
    """The margin of the paper, outside of beta: the same as a delta of margin / beta."""

    def __post_init__(self):
        super().__post_init__()
        checks.positive(beta=self.beta)

    def recipe(self, setting: Setting) -> Recipe:
        loss = simnpo(self.beta, self.delta, self.margin)
        return retain.recipe(self, setting, setting.sets["forget"], loss, "sequence")


@functools.cache
def simnpo(beta: float, delta: float = 0.0, margin: float = 0.0) -> Loss:
    """losses_B = -(2/beta) log sigmoid(beta (s_B - delta) - margin)."""

    def loss(parts, batch, logits_BTV):
        logp_BT, scored_BT = token_logp(logits_BTV, batch["labels"])
        over_B = beta * (-sequence_mean(logp_BT, scored_BT) - delta) - margin
        return -2.0 / beta * jax.nn.log_sigmoid(over_B)

    return loss
