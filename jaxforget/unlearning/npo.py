"""Negative preference optimisation: push sequence likelihoods below the starting model's, ever more weakly.

    L_forget = (2/beta) mean_b log(1 + (pi/pi_ref)^beta),   pi = product of p over the scored tokens

At the starting model the value is (2/beta) ln 2 and the gradient that of ascent on the sum, mean_b log pi; for beta
towards 0 it is ascent. Source: arXiv 2404.05868. beta 0.1, weights 1 and 1: OpenUnlearning's settings.
"""

from __future__ import annotations

import dataclasses
import functools

import jax

from jaxforget import checks
from jaxforget.unlearning import retain
from jaxforget.unlearning.recipe import Loss, Recipe, Setting
from jaxforget.unlearning.reference import reference_logp, sequence_logp


@dataclasses.dataclass(frozen=True, kw_only=True)
class NPO(retain.RetainConfig):
    beta: float = 0.1
    """Sharpness: how far below the starting model a sequence must be to be left alone."""

    def __post_init__(self):
        super().__post_init__()
        checks.positive(beta=self.beta)

    def recipe(self, setting: Setting) -> Recipe:
        forget = setting.sets["forget"]
        forget = retain.with_columns(forget, reference_logp=reference_logp(setting, forget))
        return retain.recipe(self, setting, forget, npo(self.beta), "sequence", prepare_forwards=1)


@functools.cache
def npo(beta: float) -> Loss:
    """losses_B = (2/beta) log(1 + (pi/pi_ref)^beta), with log pi_ref in `reference_logp_B`."""

    def loss(parts, batch, logits_BTV):
        ratio_B = sequence_logp(logits_BTV, batch["labels"]) - batch["reference_logp"]
        return 2.0 / beta * jax.nn.softplus(beta * ratio_B)

    return loss
