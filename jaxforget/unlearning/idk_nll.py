"""Refusals: descend on "I do not know" in place of the answers to forget.

    L_forget = mean over the scored tokens of -log p(refusal given question)

Source: arXiv 2401.06121, as IdkNLL in the released code of arXiv 2506.12618. A question keeps its refusal, drawn once
by (seed, example id).
"""

from __future__ import annotations

import dataclasses

import jax

from jaxforget.training.step import Batch, Parts
from jaxforget.unlearning import answers, retain
from jaxforget.unlearning.recipe import Recipe, Setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class IdkNLL(retain.RetainConfig):
    def check(self, setting: Setting) -> None:
        answers.questions(setting)

    def recipe(self, setting: Setting) -> Recipe:
        refused = setting.encode(answers.refused(setting))
        return retain.recipe(self, setting, refused, nll, "token")


def nll(parts: Parts, batch: Batch, logits_BTV: jax.Array) -> jax.Array:
    """losses_B = mean over scored tokens of -log p."""
    return retain.retain_nll(None, parts, batch, logits_BTV)
