"""Members: one step over a leading K axis. Shards, seeds, leave-one-out runs and learning rates are all members."""

from __future__ import annotations

import functools
from typing import Literal

import jax

from jaxforget.training.step import Step

Members = Literal["auto", "map", "vmap"]


@functools.cache
def members(step: Step, how: Members = "auto") -> Step:
    """Lift a step to K members: every leaf of state, batch and metrics gains a leading K; `frozen` is shared.

    map runs members one after the other inside one program and rounds exactly as separate runs do. vmap batches
    them, which fills an accelerator but may round differently. auto is map on a CPU and vmap elsewhere.
    """
    how = ("map" if jax.default_backend() == "cpu" else "vmap") if how == "auto" else how

    def init(key_K, parts):
        """Start K members from the same parts; only their keys differ."""
        states, frozen = zip(*(step.init(key, parts) for key in key_K), strict=True)
        return jax.tree.map(lambda *x: jax.numpy.stack(x), *states), frozen[0]

    def update(state_K, frozen, batch_K):
        if how == "vmap":
            return jax.vmap(step.update, in_axes=(0, None, 0))(state_K, frozen, batch_K)
        return jax.lax.map(lambda one: step.update(one[0], frozen, one[1]), (state_K, batch_K))

    return Step(init, update, jax.vmap(step.combine, in_axes=(None, 0)))
