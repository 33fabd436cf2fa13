"""A sparse difference for unlearning: which parameters may change, chosen once, before the first step.

They are those where the gradient of the forget set's loss is largest: arXiv 2310.12508 (SalUn), its threshold
given as the share of parameters above it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxforget.models import Model
from jaxforget.models.sharding import host, place
from jaxforget.training.batches import Batches, Stream
from jaxforget.training.gradients import mean_gradient
from jaxforget.training.objectives import next_token
from jaxforget.training.sparse import Layout, budget, lay_out, prune, sparse_difference
from jaxforget.training.step import PyTree, Trainable
from jaxforget.unlearning.recipe import Setting
from jaxforget.unlearning.reference import stored


def candidates(model: Model, patterns: tuple[str, ...], density: float) -> Layout:
    """Lay out the parameters that match a pattern, without patterns all, of which the share `density` may change.

    Raises UserError for a density that none is left by, or a pattern that matches nothing.
    """
    layout = lay_out(model.shapes(), patterns or (".*",), model.config.stacks)
    budget(density, layout.size)
    return layout


def salient(setting: Setting, patterns: tuple[str, ...], density: float) -> Trainable:
    """Let the parameters move where the loss of the forget set, a mean over its tokens, has the largest gradient.

    It takes one pass over the forget set, which no method's FLOPs count; the places are kept on disk.
    """
    layout, forget = candidates(setting.model, patterns, density), setting.sets["forget"]

    def compute():
        batches = Batches((Stream(forget, setting.rows),), 1, setting.seed, "token")
        add = _adding(setting.model, setting.microbatch)
        params = place(setting.params)  # once, not in every step
        total = jax.tree.map(jnp.zeros_like, params)
        for step in range(batches.steps):
            batch = {name: column[0] for name, column in batches.take(step, step + 1, 1).items()}
            total = add(total, params, batch)
        return {"place": prune(layout.join(host(total)), density).astype(np.uint32)}

    found = stored(setting, "places", forget, compute, density=density, paths=layout.paths)
    return sparse_difference(layout, found["place"])


@functools.cache
def _adding(model: Model, microbatch: int | None) -> Callable[..., PyTree]:
    """Return function(total, params, batch) -> total + gradient of the summed loss."""

    def losses(params, batch, key):
        return next_token(model)({"model": params}, batch, key)

    def add(total, params, batch):
        _, grads = mean_gradient(microbatch)(losses, params, batch, None)
        return jax.tree.map(lambda x, g: x + jnp.sum(batch["weight"]) * g, total, grads)

    return jax.jit(add, donate_argnums=0)
