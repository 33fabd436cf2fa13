"""Cross-entropy unlearning: towards the model's own distribution without the true token.

    L_forget = mean over scored tokens of -sum_v p*_v log p_v,   p* = softmax(sg z with z_y = -inf)

This is H(p*) - log(1 - p_y), whose gradient in z_y is p_y: it never runs away. The first tokens of an answer are left
out, as they say little. No retain term. Source: arXiv 2503.01224; one token left out, as in its training settings.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxforget import checks
from jaxforget.data.tokens import IGNORED, Examples
from jaxforget.errors import UserError
from jaxforget.training.batches import Stream
from jaxforget.training.objectives import sequence_mean
from jaxforget.training.step import Batch, Parts
from jaxforget.unlearning import retain
from jaxforget.unlearning.recipe import Recipe, Setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class CEU:
    skip: int = 1
    """Scored tokens at the beginning of each example that are left out."""

    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        checks.at_least(0, skip=self.skip)

    def check(self, setting: Setting) -> None:
        without_first(setting.sets["forget"], self.skip)

    def recipe(self, setting: Setting) -> Recipe:
        forget = without_first(setting.sets["forget"], self.skip)
        stream = Stream(forget, setting.rows, weighting="token")
        return Recipe((stream,), retain.both(setting.model, ceu, "nll"))


def without_first(examples: Examples, skip: int) -> Examples:
    """Leave the first scored tokens out, and examples that have no more. Raises UserError where nothing is left."""
    labels_NT = examples.columns["labels"]
    scored_NT = labels_NT != IGNORED
    labels_NT = np.where(np.cumsum(scored_NT, axis=1) <= skip, IGNORED, labels_NT).astype(np.int32)
    kept = retain.with_columns(examples, labels=labels_NT).take((labels_NT != IGNORED).any(axis=1))
    if not len(kept):
        raise UserError(f"no forget example has more than skip = {skip} scored tokens")
    return kept


def ceu(parts: Parts, batch: Batch, logits_BTV: jax.Array) -> jax.Array:
    """losses_B = mean over scored tokens of the cross-entropy to p*."""
    logits_BTV, labels_BT = logits_BTV.astype(jnp.float32), batch["labels"]
    true_BTV = labels_BT[..., None] == jnp.arange(logits_BTV.shape[-1])[None, None]
    target_BTV = jax.nn.softmax(jnp.where(true_BTV, -jnp.inf, jax.lax.stop_gradient(logits_BTV)))
    cross_BT = -jnp.sum(target_BTV * jax.nn.log_softmax(logits_BTV), axis=-1)
    return sequence_mean(cross_BT, labels_BT != IGNORED)
