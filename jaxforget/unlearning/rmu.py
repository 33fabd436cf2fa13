"""RMU: steer the hidden states of forget text towards one random direction, and keep those of retain text.

    L_forget = mean_b of the mean over answer tokens and dimensions of (h - c u)^2
    L_retain = the same of (h - h_ref)^2

h is what block `layer` returns, u has entries of U[0, 1) scaled to norm 1 and is drawn once by the seed. Answer tokens
are the scored ones themselves, not the positions that predict them. Source: arXiv 2403.03218, in the form of the
released code of arXiv 2506.12618; that divides sums of shape (B,) by counts of shape (B, 1), which makes it
mean(S) mean(1/n). c is 2 in its YAML file and 20 in its class; all parameters move. `positions=all` is the original
code's mean over all positions, padding included; it moved the down projections of three blocks (`--trainable`).

Only the blocks up to `layer` are computed. So the starting model runs beside, up to the same block, as the part
`reference`: hidden states of all retain text would take T x D numbers an example. FLOPs count whole passes.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxforget import checks
from jaxforget.data.tokens import IGNORED
from jaxforget.errors import UserError
from jaxforget.models import Model, Params
from jaxforget.training.objectives import sequence_mean
from jaxforget.training.step import Objective
from jaxforget.unlearning import retain
from jaxforget.unlearning.recipe import Recipe, Setting

DIRECTION = 0x524D55  # what a key is for


@dataclasses.dataclass(frozen=True, kw_only=True)
class RMU(retain.RetainConfig):
    retain_loss: str = "activations"
    """activations: the hidden states of the starting model. nll: of retain text. kl: to the starting model on it."""
    layer: int | None = None
    """Block whose result is steered, from 0. Not given: 7, or the middle one of a model with fewer than 14 blocks."""
    steer: float = 2.0
    """c, the length of the target."""
    positions: str = "answer"
    """answer: hidden states of scored tokens. all: of every position, as in the original code."""

    RETAIN_LOSSES: ClassVar[tuple[str, ...]] = ("activations", "nll", "kl")

    def __post_init__(self):
        super().__post_init__()
        checks.at_least(0, steer=self.steer)
        checks.one_of(("answer", "all"), positions=self.positions)

    def check(self, setting: Setting) -> None:
        self.blocks(setting.model)

    def blocks(self, model: Model) -> int:
        """Return how many blocks are computed. Raises UserError for a layer that the model does not have."""
        depth = model.config.stacks["blocks"]
        if self.layer is None:
            return min(7, depth // 2) + 1
        if not 0 <= self.layer < depth:
            raise UserError(f"layer is {self.layer}; the model has blocks 0 to {depth - 1}")
        return self.layer + 1

    def recipe(self, setting: Setting) -> Recipe:
        model, blocks = setting.model, self.blocks(setting.model)
        over: retain.Weighting = "sequence" if self.retain_loss == "activations" else "token"
        streams = retain.streams(self, setting, setting.sets["forget"], "sequence", over)
        target_D = self.steer * direction(setting.seed, width(model, setting.params, blocks))
        parts = {"target": target_D}
        compared = self.retain_loss != "nll" and len(streams) > 1
        if compared:
            parts["reference"] = setting.params if self.retain_loss == "kl" else first_blocks(setting.params, blocks)
        objective = rmu(model, blocks, self.positions, self.retain_loss)
        return Recipe(streams, objective, parts, reference_streams=(1,) if compared else ())


def direction(seed: int, width: int) -> jax.Array:
    """Draw u, float32 (D,)."""
    u_D = jax.random.uniform(jax.random.fold_in(jax.random.key(seed), DIRECTION), (width,))
    return u_D / jnp.linalg.norm(u_D)


def width(model: Model, params: Params, blocks: int) -> int:
    """Return D."""
    one = {"tokens": jnp.zeros((1, 1), jnp.int32), "length": jnp.ones(1, jnp.int32)}
    return jax.eval_shape(lambda params: model.stream(params, one, blocks), params).shape[-1]


def first_blocks(params: Params, blocks: int) -> Params:
    """Leave out the blocks that are not computed."""
    return {**params, "blocks": jax.tree.map(lambda x: x[:blocks], params["blocks"])}


@functools.cache
def rmu(model: Model, blocks: int, positions: str, retain_loss: str) -> Objective:
    """Squared distance to `target` on the first stream, the retain loss on the second, times factor_B."""

    def distance(h_BTD, target, batch):
        square_BT = jnp.mean(jnp.square(h_BTD.astype(jnp.float32) - target), axis=-1)
        if positions == "all":
            return jnp.mean(square_BT, axis=-1)
        # labels[t] is the token at t + 1, whose own state counts.
        answer_BT = jnp.pad(batch["labels"][:, :-1] != IGNORED, ((0, 0), (1, 0)))
        return sequence_mean(square_BT, answer_BT)

    def losses(parts, batch, key):
        h_BTD = model.stream(parts["model"], batch, blocks)
        forget_B = distance(h_BTD, parts["target"][None, None], batch)
        if retain_loss != "activations":
            logits_BTV = retain.on_stream(1, batch, lambda: model.batch_logits(parts["model"], batch))
            retain_B = retain.RETAIN[retain_loss](model, parts, batch, logits_BTV)
        elif "reference" in parts:
            was_BTD = retain.on_stream(1, batch, lambda: model.stream(parts["reference"], batch, blocks))
            retain_B = distance(h_BTD, jax.lax.stop_gradient(was_BTD).astype(jnp.float32), batch)
        else:  # no retain rows
            retain_B = jnp.zeros_like(forget_B)
        return batch["factor"] * jnp.where(batch["stream"] == 0, forget_B, retain_B)

    return losses
