"""Adversarial samples: descend on the forget set towards the likeliest wrong tokens.

    L = mean_b s_b with targets a_t = argmax over v != w_t of p_theta0(v given w_<t)

Source: Yao et al., arXiv 2402.15159, row 3. Labels come from the starting model once and stay fixed.

The released code differs from the definition. At position j it forbids x_j although those logits predict x_{j+1},
and it stores the sample as the label of token j, which supervises the logits before it. `released_code_alignment`
reproduces that.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxforget.data.tokens import IGNORED, Examples
from jaxforget.metrics.language import in_batches
from jaxforget.models import Model, Params
from jaxforget.training.batches import Stream
from jaxforget.training.objectives import next_token
from jaxforget.unlearning.recipe import Recipe, Setting
from jaxforget.unlearning.reference import stored


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdversarialSamples:
    released_code_alignment: bool = False
    """Follow the alignment of the released code instead of the definition."""

    needs: ClassVar[tuple[str, ...]] = ()

    def recipe(self, setting: Setting) -> Recipe:
        model, forget = setting.model, setting.sets["forget"]
        how: dict[str, Any] = {"forbidden_id": setting.pad_id, "released": self.released_code_alignment}

        def compute() -> dict[str, np.ndarray]:
            return {"labels": adversarial_labels(model, setting.params, forget, **how)}

        found = stored(setting, "adversarial_labels", forget, compute, **how)
        relabelled = dataclasses.replace(forget, columns={**forget.columns, **found})
        return Recipe((Stream(relabelled, setting.rows, 1.0),), next_token(model), prepare_forwards=1)


def adversarial_labels(
    model: Model,
    params: Params,
    examples: Examples,
    *,
    forbidden_id: int | None = None,
    released: bool = False,
    batch: int = 32,
) -> np.ndarray:
    """Return (N, T) labels: the starting model's best token other than the true one, at scored positions."""
    tokens_NT, labels_NT = examples.columns["tokens"], examples.columns["labels"]
    # The definition forbids the token to be predicted; the released code the one just read.
    banned_NT = tokens_NT if released else np.where(labels_NT == IGNORED, 0, labels_NT)
    with_banned = dataclasses.replace(examples, columns=examples.columns | {"banned": banned_NT})
    chosen_NT = in_batches(_best(model, forbidden_id), params, with_banned, batch)
    if released:  # the sample made at position j becomes the label of token j, predicted from position j - 1
        chosen_NT = np.roll(chosen_NT, -1, axis=1)
    return np.where(labels_NT == IGNORED, IGNORED, chosen_NT).astype(np.int32)


@functools.cache
def _best(model: Model, forbidden_id: int | None) -> Callable[..., jax.Array]:
    @jax.jit
    def best(params, batch):
        logits_BTV = model.batch_logits(params, batch)
        vocabulary_V = jnp.arange(logits_BTV.shape[-1])
        banned_BTV = batch["banned"][..., None] == vocabulary_V[None, None, :]
        if forbidden_id is not None:
            banned_BTV |= (vocabulary_V == forbidden_id)[None, None, :]
        return jnp.argmax(jnp.where(banned_BTV, -jnp.inf, logits_BTV), axis=-1)

    return best
