"""The form that most methods share: L = w_f L_forget + w_r L_retain, a loss on either kind of row.

Forget rows are the first stream of a batch and retain rows the second. L_retain is the negative log-likelihood of
retain text, or the KL to the starting model on it; both are means over all scored tokens of the batch's retain rows.
Source: the released code of arXiv 2506.12618 (OpenUnlearning), whose w_f is gamma and whose w_r is alpha. It averages
the KL over all positions, prompt and padding included; we over scored tokens.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxforget import checks
from jaxforget.data.tokens import IGNORED, Examples
from jaxforget.errors import UserError
from jaxforget.models import Model
from jaxforget.training.batches import Stream, Weighting
from jaxforget.training.objectives import kl_divergence, sequence_mean, token_logp
from jaxforget.training.step import Batch, Objective, Parts
from jaxforget.unlearning.recipe import Loss, Recipe, Setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetainConfig:
    """Weights and the retain term."""

    forget_weight: float = 1.0
    """w_f, gamma in OpenUnlearning."""
    retain_weight: float = 1.0
    """w_r, alpha in OpenUnlearning. 0 leaves the retain term out."""
    retain_loss: str = "nll"
    """nll: of retain text. kl: to the starting model on it."""
    retain_set: str = "retain"
    """Which set must stay known: `retain` (same domain) or `general`."""
    retain_ratio: float = 1.0
    """Retain rows in a batch for each forget row."""

    RETAIN_LOSSES: ClassVar[tuple[str, ...]] = ("nll", "kl")

    def __post_init__(self):
        checks.at_least(0, forget_weight=self.forget_weight, retain_weight=self.retain_weight)
        checks.positive(retain_ratio=self.retain_ratio)
        checks.one_of(self.RETAIN_LOSSES, retain_loss=self.retain_loss)
        checks.one_of(("retain", "general"), retain_set=self.retain_set)

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.retain_set,) if self.retain_weight else ()


def retain_rows(config: Any, forget_rows: int) -> int:
    """Return the retain rows of a batch with this many forget rows."""
    return max(1, round(config.retain_ratio * forget_rows))


def streams(
    config: RetainConfig, setting: Setting, forget: Examples, weighting: Weighting, retained: Weighting = "token"
) -> tuple[Stream, ...]:
    """Return the forget rows and, where they count, the retain rows of a batch.

    weighting, retained: over what the two losses are means, sequences or scored tokens. Raises UserError for an empty
    retain set.
    """
    first = Stream(forget, setting.rows, config.forget_weight, weighting)
    if not config.retain_weight:
        return (first,)
    retain = setting.sets[config.retain_set]
    if not len(retain):
        raise UserError(f"the {config.retain_set} set is empty; give it records, or set retain_weight to 0")
    rows = retain_rows(config, setting.rows)
    return first, Stream(with_columns_of(forget, retain), rows, config.retain_weight, retained)


def with_columns(examples: Examples, **columns: np.ndarray) -> Examples:
    """Add or replace columns."""
    return dataclasses.replace(examples, columns={**examples.columns, **columns})


def with_columns_of(other: Examples, examples: Examples) -> Examples:
    """Add the columns that another set has besides, filled with what says nothing."""
    blank = {
        name: np.full((len(examples), *column.shape[1:]), IGNORED if name.endswith("labels") else 0, column.dtype)
        for name, column in other.columns.items()
        if name not in examples.columns
    }
    return with_columns(examples, **blank)


def reference_parts(config: RetainConfig, setting: Setting) -> dict[str, object]:
    """Return the part that a KL reads: the starting model."""
    return {"reference": setting.params} if config.retain_loss == "kl" and config.retain_weight else {}


def recipe(
    config: RetainConfig, setting: Setting, forget: Examples, forget_loss: Loss, weighting: Weighting, **more: Any
) -> Recipe:
    """Join a forget loss, forget_loss(parts, batch, logits_BTV) -> losses_B, with the retain term of the config."""
    parts = reference_parts(config, setting)
    return Recipe(
        streams(config, setting, forget, weighting), both(setting.model, forget_loss, config.retain_loss),
        **{"parts": parts, "reference_streams": (1,) if parts else (), **more},
    )  # fmt: skip


@functools.cache
def both(model: Model, forget_loss: Loss, retain_loss: str) -> Objective:
    """The forget loss on the first stream, the retain loss on the second; losses_B are multiplied by factor_B."""

    def losses(parts, batch, key):
        logits_BTV = model.batch_logits(parts["model"], batch)
        forget_B = forget_loss(parts, batch, logits_BTV)
        retain_B = RETAIN[retain_loss](model, parts, batch, logits_BTV)
        return batch["factor"] * jnp.where(batch["stream"] == 0, forget_B, retain_B)

    return losses


def retain_nll(model: Model | None, parts: Parts, batch: Batch, logits_BTV: jax.Array) -> jax.Array:
    """-log p a scored token, (B,)."""
    logp_BT, scored_BT = token_logp(logits_BTV, batch["labels"])
    return -sequence_mean(logp_BT, scored_BT)


def retain_kl(model: Model, parts: Parts, batch: Batch, logits_BTV: jax.Array) -> jax.Array:
    """KL(p_reference || p_theta) a scored token, (B,)."""
    if "reference" not in parts:  # no retain rows
        return jnp.zeros(batch["factor"].shape)
    reference_BTV = on_stream(1, batch, lambda: model.batch_logits(parts["reference"], batch))
    return sequence_mean(kl_divergence(reference_BTV, logits_BTV), batch["labels"] != IGNORED)


RETAIN = {"nll": retain_nll, "kl": retain_kl}


def on_stream(index: int, batch: Batch, compute: Callable[[], jax.Array]) -> jax.Array:
    """Return compute(), or zeros of that shape where the micro-batch has no row of the stream."""
    shape = jax.eval_shape(compute)
    return jax.lax.cond(jnp.any(batch["stream"] == index), compute, lambda: jnp.zeros(shape.shape, shape.dtype))
