"""Gradient ascent on the forget set plus KL to the starting model on retain text.

    L = w_f * (-mean_b s_b over forget) + w_r * mean_b k_b over retain,
    k_b = mean over scored tokens of KL(p_theta0 || p_theta)

Source: Yao et al., arXiv 2402.15159, rows 6 (retain text of the same domain) and 7 (general text). The released code
adds the two means when one micro-batch holds both kinds (w_f = w_r = 1). It uses cross-entropy against theta0 over all
positions, pads included; that is this KL plus a constant on the same positions. We average over scored tokens only.
"""

from __future__ import annotations

import dataclasses

from jaxforget.training.objectives import next_token_with_kl
from jaxforget.unlearning.ascent_descent import mixed_streams
from jaxforget.unlearning.recipe import Recipe, Setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class AscentKL:
    retain_set: str = "retain"
    """Which set the KL is measured on: `retain` (same domain) or `general`."""
    forget_weight: float = 1.0
    """w_f."""
    retain_weight: float = 1.0
    """w_r, the lambda of the paper."""
    retain_ratio: float = 1.0
    """Retain rows in a batch for each forget row."""

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.retain_set,)

    def recipe(self, setting: Setting) -> Recipe:
        objective = next_token_with_kl(setting.model)
        parts = {"reference": setting.params}
        return Recipe(mixed_streams(self, setting), objective, parts, reference_streams=(1,))
