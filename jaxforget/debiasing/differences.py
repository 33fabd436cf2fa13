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
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxforget.debiasing.gates import GateConfig, open_probability, sample
from jaxforget.errors import UserError
from jaxforget.training.step import Parts, PyTree, Trainable
from jaxforget.training.trainable import path_str, subset

GATES = 0x47415445  # what a key is for


class Layout(NamedTuple):
    """Which parameters may differ, and where they stand in the vector: row-major, one path after the other."""

    paths: tuple[str, ...]  # sorted
    shapes: tuple[tuple[int, ...], ...]
    tensors: tuple[int, ...]  # of each path: the layers of stacked blocks, else 1

    @property
    def sizes(self) -> np.ndarray:
        return np.asarray([int(np.prod(shape)) for shape in self.shapes], np.int64)

    @property
    def size(self) -> int:
        return int(self.sizes.sum())

    def split(self, vector_N) -> dict[str, jax.Array]:
        """Return path -> array."""
        parts = jnp.split(vector_N, np.cumsum(self.sizes)[:-1].tolist())
        return {path: part.reshape(shape) for path, part, shape in zip(self.paths, parts, self.shapes, strict=True)}

    def add(self, params: PyTree, vector_N) -> PyTree:
        """Add a difference. Parameters may have leading axes more than the layout, which then share the difference."""
        found = self.split(vector_N)

        def one(path, x):
            delta = found.get(path_str(path))
            return x if delta is None else x + jnp.broadcast_to(delta, x.shape).astype(x.dtype)

        return jax.tree_util.tree_map_with_path(one, params)

    def spread(self, group_G) -> jax.Array:
        """Give every parameter the number of its tensor."""
        sizes_G = np.repeat(self.sizes // np.asarray(self.tensors), self.tensors)
        return jnp.repeat(group_G, sizes_G, total_repeat_length=self.size)


@functools.cache
def layout_of(model, patterns: tuple[str, ...] = (".*",)) -> Layout:
    """Lay out the parameters whose path fully matches a pattern. The head never differs: it is shared by all modules.

    Raises UserError for a pattern that matches nothing, or is none.
    """
    leaves = [(path_str(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(model.headless.shapes())]
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"gates pattern {pattern!r} is not a regular expression: {error}") from None
        if not any(re.fullmatch(pattern, path) for path, _ in leaves):
            raise UserError(f"gates pattern {pattern!r} matches no parameter; paths look like {leaves[0][0]!r}")
    chosen = sorted((path, leaf.shape) for path, leaf in leaves if any(re.fullmatch(p, path) for p in patterns))
    stacks = model.config.stacks
    found = Layout(*zip(*((path, shape, stacks.get(path.split("/")[0], 1)) for path, shape in chosen), strict=True))
    if found.size >= 2**31:  # places are 32 bits
        raise UserError(f"{found.size} parameters may differ; at most {2**31 - 1} can: name fewer by --differs")
    return found


# ---------------------------------------------------------------------------------------------- trainables
@functools.cache
def gated(layout: Layout, config: GateConfig, modules: int = 1, others: tuple[str, ...] = (), *, head: bool = False):
    """Train gated differences from 0, and in full the parts at the patterns `others`.

    head: whether the loss with a module on trains what is outside of the layout too, where it moves. combine also gives
    the part `gates`, for the penalty.
    """

    def init(key, parts: Parts):
        moving, frozen = _others(key, parts, others)
        group = {"group": jnp.full(sum(layout.tensors), config.start)} if config.structured else {}
        one = {"w": jnp.zeros(layout.size), "alpha": jnp.full(layout.size, config.start), **group}
        return {**moving, "modules": [one] * modules}, frozen

    def combine(frozen: Parts, moving: PyTree, key=None) -> Parts:
        parts = _joined(frozen, moving)
        keys = [None if key is None else jax.random.fold_in(key, GATES + j) for j in range(modules)]
        return parts | {
            "on": [_switched(layout, parts["model"], difference(layout, config, module, key), head)
                   for module, key in zip(moving["modules"], keys, strict=True)],
            "gates": [{name: x for name, x in module.items() if name != "w"} for module in moving["modules"]],
        }  # fmt: skip

    return Trainable(init, combine)


def difference(layout: Layout, config: GateConfig, module: PyTree, key=None) -> jax.Array:
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
def fixed(layout: Layout, modules: int = 1, others: tuple[str, ...] = (), *, head: bool = False):
    """Train the values of sparse differences, and in full the parts at the patterns `others`.

    parts["modules"]: a list of {"place", "value"}, see `sparse`. Places are frozen.
    """

    def init(key, parts: Parts):
        given = parts["modules"]
        moving, frozen = _others(key, {name: part for name, part in parts.items() if name != "modules"}, others)
        moving["modules"] = [{"value": module["value"]} for module in given[:modules]]
        return moving, frozen | {"modules": [_where(layout, module["place"]) for module in given[:modules]]}

    def combine(frozen: Parts, moving: PyTree, key=None) -> Parts:
        parts = _joined({name: part for name, part in frozen.items() if name != "modules"}, moving)
        modules = [{**where, **module} for where, module in zip(frozen["modules"], moving["modules"], strict=True)]
        return parts | {
            "on": [_switched(layout, parts["model"], _placed(**module), head) for module in modules],
            "modules": [{"place": module["place"], "value": module["value"]} for module in modules],
        }

    return Trainable(init, combine)


def dense(layout: Layout, place_P, value_P) -> jax.Array:
    """Return the difference as a vector (N,). Places from N on are padding."""
    return _placed(jnp.asarray(value_P), **_where(layout, place_P))


def _where(layout: Layout, place_P) -> dict[str, jax.Array]:
    """Return the places, and for each of the N parameters its value's place among the P, or P where it has none."""
    place_P, count = jnp.asarray(place_P), len(place_P)
    source_N = jnp.full(layout.size, count, jnp.int32).at[place_P].set(jnp.arange(count, dtype=jnp.int32), mode="drop")
    return {"place": place_P, "source": source_N}


@jax.custom_vjp
def _placed(value, place, source):
    """Put values in their places: a gather both ways. A scatter takes a CPU several times as long as the model."""
    return jnp.take(jnp.pad(value, (0, 1)), source)


_placed.defvjp(
    lambda value, place, source: (_placed(value, place, source), place),
    lambda place, g: (jnp.take(g, place, mode="fill", fill_value=0.0), None, None),
)


def _switched(layout: Layout, model: PyTree, delta_N, head: bool) -> PyTree:
    """Add a difference to a model that learns nothing by it, except its head where wanted."""

    def stopped(path, x):
        return x if head and path_str(path) not in layout.paths else jax.lax.stop_gradient(x)

    return layout.add(jax.tree_util.tree_map_with_path(stopped, model), delta_N)


def _others(key, parts: Parts, patterns: tuple[str, ...]):
    return subset(*patterns).init(key, parts)


def _joined(frozen: Parts, moving: PyTree) -> Parts:
    return subset().combine(frozen, {name: part for name, part in moving.items() if name != "modules"})


# ------------------------------------------------------------------------------------------------- pruning
def budget(density: float, size: int) -> int:
    """Return how many of N parameters a module may change. Raises UserError unless it is one at least."""
    if not 0 < density <= 1:
        raise UserError(f"density is {density}; it must be above 0 and at most 1")
    if not (count := round(density * size)):
        raise UserError(f"density {density:g} of {size} parameters keeps none; give more")
    return count


def prune(value_N: np.ndarray, density: float, *, strict: bool = False) -> np.ndarray:
    """Return the places, int64 (P,), sorted, of the k = round(density * N) largest magnitudes that are not 0.

    density: of the N parameters that may differ, above 0 and at most 1; an upper bound, as zeros are never kept. Equal
    magnitudes: the first places win, or with `strict`, as in the released code of arXiv 2205.15171, all are dropped
    that are not above the (k + 1)-th largest.
    """
    size_N = np.abs(np.asarray(value_N))
    k = budget(density, len(size_N))
    if strict:
        cutoff = np.partition(size_N, len(size_N) - k - 1)[len(size_N) - k - 1] if k < len(size_N) else 0.0
        return np.flatnonzero(size_N > cutoff)
    kept = np.argsort(-size_N, kind="stable")[:k]
    return np.sort(kept[size_N[kept] > 0])


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
