"""What a module learns: its task, and not to tell an attribute.

    POST    sum_j [ L_task(theta + d_j) + L_removal_j(theta + d_j) ]      the core theta is frozen
    PAR     L_task(theta) + the same                                      the core trains beside its modules
    full    L_task(theta) + L_removal(theta)                              no module: the whole model is debiased

plus lambda times the mean probability of an open gate, in the first phase. Gradients of the sum over j never reach
theta (differences.py), so that a frozen core stays as it is and a moving one learns its own loss alone. In the paper's
PAR the module steps follow the core's step of the same batch and see the core after it; here both see the core before.

Batches hold `label_B`, and `attributes_BJ`: int32, -1 where unknown. Parts: `model`; `on`, the models with a module
switched on; `adversary`, heads of every attribute; `shares`, the training share of each of its classes. Shapes: B
batch, J attributes.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from jaxforget import checks
from jaxforget.debiasing.differences import expected_l0
from jaxforget.debiasing.gates import GateConfig
from jaxforget.debiasing.removal import REMOVALS
from jaxforget.errors import UserError
from jaxforget.metrics.leakage_heads import draw_heads
from jaxforget.models import Model
from jaxforget.training.step import Objective

REMOVAL = 0x52454D4F  # what a key is for


@dataclasses.dataclass(frozen=True, kw_only=True)
class RemovalConfig:
    """How an attribute is taken out."""

    removal: Literal["adversarial", "information", "mmd"] = "adversarial"
    """Heads behind reversed gradients, the information that heads see, or the distance of the groups' features."""
    scale: float = 1.0
    """Weight of removal against the task: of the reversed gradient, or of the loss."""
    heads: int = 5
    """Heads of an attribute."""
    sparsity: float = 0.1
    """Weight of the mean probability of an open gate, in the first phase."""

    def __post_init__(self):
        if self.removal not in REMOVALS:
            raise UserError(f"unknown removal {self.removal!r}; valid names are {', '.join(REMOVALS)}")
        checks.at_least(0, scale=self.scale, sparsity=self.sparsity)
        checks.at_least(1, heads=self.heads)


@functools.cache
def debiasing(
    model: Model,
    config: RemovalConfig,
    targets: tuple[tuple[int, ...], ...],
    *,
    core: bool = False,
    gates: GateConfig | None,
) -> Objective:
    """Return the objective. targets: for every module the attributes it takes out; () leaves it the task alone.

    core: the task loss of the model itself besides. gates: of the first phase, None in the second. Without the part
    `on` the model itself is the one that is debiased.
    """
    removal = REMOVALS[config.removal].losses

    def one(params, attributes, parts, batch, key):
        x_BD = model.pooled(params, batch)
        total_B = nll(model.classify(params, x_BD), batch["label"])
        for j in attributes:
            attribute_B, share_C = batch["attributes"][:, j], parts["shares"][j]
            counts_B = (attribute_B >= 0) & (batch["weight"] > 0)
            weight_B = jnp.where(counts_B, 1.0 / (len(share_C) * share_C[jnp.maximum(attribute_B, 0)]), 0.0)
            own_key = jax.random.fold_in(key, REMOVAL + j)
            total_B += removal(x_BD, attribute_B, weight_B, parts["adversary"][j], config.scale, own_key)
        return total_B

    def losses(parts, batch, key):
        total_B = jnp.zeros(batch["label"].shape, jnp.float32)
        for params, attributes in zip(parts.get("on", [parts["model"]]), targets, strict=True):
            total_B += one(params, attributes, parts, batch, key)
        if core:
            total_B += nll(model.classify(parts["model"], model.pooled(parts["model"], batch)), batch["label"])
        if gates is not None:
            for module in parts["gates"]:
                total_B += config.sparsity * expected_l0(module, gates) / module["alpha"].size
        return batch["factor"] * total_B

    return losses


def switched_on(objective: Objective, module: int = 0) -> Objective:
    """Give any objective the model with a module on: unlearning or fine-tuning by a sparse difference."""
    return lambda parts, batch, key: objective(parts | {"model": parts["on"][module]}, batch, key)


def over_members(objective: Objective, shared: tuple[str, ...] = ("modules", "gates", "shares")) -> Objective:
    """Average an objective over the K models of an ensemble, which share one difference.

    Every part but the shared ones has a leading K: each model keeps its own adversary.
    """

    def losses(parts, batch, key):
        own = {name: part for name, part in parts.items() if name not in shared}
        rest = {name: part for name, part in parts.items() if name in shared}
        losses_KB = jax.lax.map(lambda mine: objective({**rest, **mine}, batch, key), own)
        return jnp.mean(losses_KB, axis=0)

    return losses


def nll(logits_BC: jax.Array, label_B: jax.Array) -> jax.Array:
    """Return -log p of the class, in nats."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits_BC), label_B[:, None], axis=1)[:, 0]


def draw_adversaries(key: jax.Array, config: RemovalConfig, width: int, shares: list) -> list:
    """Draw the heads of every attribute. shares: of its classes, as in the parts."""
    return _drawn(key, config.heads, width, tuple(map(len, shares)))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))  # one small program instead of many
def _drawn(key: jax.Array, heads: int, width: int, classes: tuple[int, ...]) -> list:
    return [draw_heads(jax.random.fold_in(key, j), heads, width, count) for j, count in enumerate(classes)]
