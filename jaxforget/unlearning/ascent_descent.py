"""Gradient ascent on the forget set plus descent on retain text.

    L = w_f * (-mean_b s_b over forget) + w_r * (mean_b s_b over retain)

Source: Yao et al., arXiv 2402.15159, rows 4 (retain text of the same domain) and 5 (general text). The released code
interleaves both kinds 1:1 and averages the mixed batch with factors -1 and lambda, which gives w_f = 1/2 and
w_r = lambda / 2: the defaults with lambda = 1.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxforget.training.batches import Stream
from jaxforget.training.objectives import next_token
from jaxforget.unlearning.recipe import Recipe, Setting
from jaxforget.unlearning.retain import retain_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class AscentDescent:
    retain_set: str = "retain"
    """Which set is descended on: `retain` (same domain) or `general`."""
    forget_weight: float = 0.5
    """w_f."""
    retain_weight: float = 0.5
    """w_r."""
    retain_ratio: float = 1.0
    """Retain rows in a batch for each forget row."""

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.retain_set,)

    def recipe(self, setting: Setting) -> Recipe:
        return Recipe(mixed_streams(self, setting), next_token(setting.model))


def mixed_streams(config: Any, setting: Setting) -> tuple[Stream, ...]:
    """Fill a batch with forget rows and `retain_ratio` times as many retain rows; weights hold whatever the counts."""
    return (
        Stream(setting.sets["forget"], setting.rows, -config.forget_weight),
        Stream(setting.sets[config.retain_set], retain_rows(config, setting.rows), config.retain_weight),
    )
