"""Sparse differences as what moves: theta + z * w with gates z, and theta + values at fixed places.

A difference is one vector over all parameters that may differ, in the order of their paths: global pruning is a top-k
of it, the penalty its mean. Two trainables, for any objective:

    gated   {"modules": [{"w", "alpha", "group"}, …]}   first phase; every parameter has a gate
    fixed   {"modules": [{"value"}, …]}                 second phase; only the non-zeros exist, the rest cannot move

Both add to the parts `on`, the models with each module alone switched on. Gradients never reach the model through it,
so that a core which trains beside its modules learns from its own loss. Shapes: N parameters that may differ, P
places of a sparse difference, G tensors, K members of an ensemble that share a difference.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxforget.debiasing.gates import GateConfig, open_probability, sample
from jaxforget.models import Model
from jaxforget.training.sparse import Layout, budget, lay_out, placed, prune, where
from jaxforget.training.step import Parts, PyTree, Trainable
from jaxforget.training.trainable import path_str, subset

GATES = 0x47415445  # what a key is for


@functools.cache
def layout_of(model: Model, patterns: tuple[str, ...] = (".*",)) -> Layout:
    """Lay out the parameters whose path fully matches a pattern. The head never differs: it is shared by all modules.

    Raises UserError for a pattern that matches nothing, or is none.
    """
    return lay_out(model.headless.shapes(), patterns, model.config.stacks)


# ---------------------------------------------------------------------------------------------- trainables
@functools.cache
def gated(
    layout: Layout, config: GateConfig, modules: int = 1, others: tuple[str, ...] = (), *, head: bool = False
) -> Trainable:
    """Train gated differences from 0, and in full the parts at the patterns `others`.

    head: whether the loss with a module on trains what is outside of the layout too, where it moves. combine also gives
    the part `gates`, for the penalty.
    """

    def init(key: jax.Array, parts: Parts) -> tuple[PyTree, Parts]:
        moving, frozen = _others(key, parts, others)
        group = {"group": jnp.full(sum(layout.tensors), config.start)} if config.structured else {}
        one = {"w": jnp.zeros(layout.size), "alpha": jnp.full(layout.size, config.start), **group}
        return {**moving, "modules": [one] * modules}, frozen

    def combine(frozen: Parts, moving: PyTree, key: jax.Array | None = None) -> Parts:
        parts = _joined(frozen, moving)
        keys = [None if key is None else jax.random.fold_in(key, GATES + j) for j in range(modules)]
        return parts | {
            "on": [_switched(layout, parts["model"], difference(layout, config, module, key), head)
                   for module, key in zip(moving["modules"], keys, strict=True)],
            "gates": [{name: x for name, x in module.items() if name != "w"} for module in moving["modules"]],
        }  # fmt: skip

    return Trainable(init, combine)


def difference(layout: Layout, config: GateConfig, module: PyTree, key: jax.Array | None = None) -> jax.Array:
    """Return z * w (N,), with gates drawn by the key or without noise."""
    if "group" in module:
        own_key, group_key = (None, None) if key is None else jax.random.split(key)
        z_N = sample(module["alpha"], config, own_key) * layout.spread(sample(module["group"], config, group_key))
    else:
        z_N = sample(module["alpha"], config, key)
    delta_N = z_N * module["w"]
    if config.straight_through:
        delta_N = delta_N + (module["w"] - jax.lax.stop_gradient(module["w"]))
    return delta_N


def expected_l0(gates: PyTree, config: GateConfig) -> jax.Array:
    """Return the expected number of open gates. A tensor's own gate counts once, not for each of its parameters."""
    return sum(jnp.sum(open_probability(alpha, config)) for alpha in gates.values())


@functools.cache
def fixed(layout: Layout, modules: int = 1, others: tuple[str, ...] = (), *, head: bool = False) -> Trainable:
    """Train the values of sparse differences, and in full the parts at the patterns `others`.

    parts["modules"]: a list of {"place", "value"}, see `sparse`. Places are frozen.
    """

    def init(key: jax.Array, parts: Parts) -> tuple[PyTree, Parts]:
        given = parts["modules"]
        moving, frozen = _others(key, {name: part for name, part in parts.items() if name != "modules"}, others)
        moving["modules"] = [{"value": module["value"]} for module in given[:modules]]
        return moving, frozen | {"modules": [where(layout, module["place"]) for module in given[:modules]]}

    def combine(frozen: Parts, moving: PyTree, key: jax.Array | None = None) -> Parts:
        parts = _joined({name: part for name, part in frozen.items() if name != "modules"}, moving)
        modules = [{**places, **module} for places, module in zip(frozen["modules"], moving["modules"], strict=True)]
        return parts | {
            "on": [_switched(layout, parts["model"], placed(**module), head) for module in modules],
            "modules": [{"place": module["place"], "value": module["value"]} for module in modules],
        }

    return Trainable(init, combine)


def _switched(layout: Layout, model: PyTree, delta_N: jax.Array, head: bool) -> PyTree:
    """Add a difference to a model that learns nothing by it, except its head where wanted."""

    def stopped(path, x):
        return x if head and path_str(path) not in layout.paths else jax.lax.stop_gradient(x)

    return layout.add(jax.tree_util.tree_map_with_path(stopped, model), delta_N)


def _others(key: jax.Array, parts: Parts, patterns: tuple[str, ...]) -> tuple[PyTree, Parts]:
    return subset(*patterns).init(key, parts)


def _joined(frozen: Parts, moving: PyTree) -> Parts:
    return subset().combine(frozen, {name: part for name, part in moving.items() if name != "modules"})


# ------------------------------------------------------------------------------------------------- pruning
def sparse(value_N: np.ndarray, density: float, *, strict: bool = False) -> dict[str, np.ndarray]:
    """Prune a difference to {"place", "value"}, both (P,) with P = round(density * N) whatever the difference.

    Every seed and attribute so runs in one program. Places beyond what was kept are N, N + 1, …: padding.
    """
    kept = prune(value_N, density, strict=strict)
    count, size = budget(density, len(value_N)), len(value_N)
    place_P = np.concatenate([kept, size + np.arange(count - len(kept))]).astype(np.uint32)
    value_P = np.zeros(count, np.float32)
    value_P[: len(kept)] = np.asarray(value_N)[kept]
    return {"place": place_P, "value": value_P}
