"""Gradient ascent: climb the loss of the forget set.

    L = -mean_b s_b,   s_b = mean over scored tokens of -log p(w_t given w_<t)

Source: Yao et al., arXiv 2402.15159, row 1. The released code averages over sequences, as here.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxforget.training.batches import Stream
from jaxforget.training.objectives import next_token
from jaxforget.unlearning.recipe import Recipe, Setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientAscent:
    """No settings."""

    needs: ClassVar[tuple[str, ...]] = ()

    def recipe(self, setting: Setting) -> Recipe:
        return Recipe((Stream(setting.sets["forget"], setting.rows, -1.0),), next_token(setting.model))
