"""Sparse differences: values at fixed places of the parameters move, and nothing else.

What may differ is one vector, the parameters in the order of their paths; places are positions in it. Shapes: N
parameters that may differ, P places, G tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxforget.errors import UserError
from jaxforget.training.step import Parts, PyTree, Trainable
from jaxforget.training.trainable import path_str


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

    def join(self, params: PyTree) -> np.ndarray:
        """Return the vector of a model, or of its gradient, on the host."""
        found = {path_str(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
        return np.concatenate([np.ravel(found[path]) for path in self.paths])

    def split(self, vector_N: jax.Array) -> dict[str, jax.Array]:
        """Return path -> array."""
        parts = jnp.split(vector_N, np.cumsum(self.sizes)[:-1].tolist())
        return {path: part.reshape(shape) for path, part, shape in zip(self.paths, parts, self.shapes, strict=True)}

    def add(self, params: PyTree, vector_N: jax.Array) -> PyTree:
        """Add a difference. Parameters may have leading axes more than the layout, which then share the difference.

        Raises UserError for a parameter of the layout that is not there, such as one that an adapter stands for.
        """
        found = self.split(vector_N)
        there = {path_str(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
        if missing := sorted(found.keys() - there):
            raise UserError(f"a sparse difference is of the parameter {missing[0]}, which this model does not have")

        def one(path, x):
            delta = found.get(path_str(path))
            return x if delta is None else x + jnp.broadcast_to(delta, x.shape).astype(x.dtype)

        return jax.tree_util.tree_map_with_path(one, params)

    def spread(self, group_G: jax.Array) -> jax.Array:
        """Give every parameter the number of its tensor."""
        sizes_G = np.repeat(self.sizes // np.asarray(self.tensors), self.tensors)
        return jnp.repeat(group_G, sizes_G, total_repeat_length=self.size)


def lay_out(params: PyTree, patterns: tuple[str, ...], stacks: Mapping[str, int]) -> Layout:
    """Lay out the parameters, or shapes, whose path fully matches a pattern. stacks: layers of what is stacked.

    Raises UserError for a pattern that matches nothing, or is none.
    """
    leaves = [(path_str(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"pattern {pattern!r} is not a regular expression: {error}") from None
        if not any(re.fullmatch(pattern, path) for path, _ in leaves):
            raise UserError(f"pattern {pattern!r} matches no parameter; paths look like {leaves[0][0]!r}")
    chosen = sorted((path, leaf.shape) for path, leaf in leaves if any(re.fullmatch(p, path) for p in patterns))
    found = Layout(*zip(*((path, shape, stacks.get(path.split("/")[0], 1)) for path, shape in chosen), strict=True))
    if found.size >= 2**31:  # places are 32 bits
        raise UserError(f"{found.size} parameters may differ; at most {2**31 - 1} can: name fewer")
    return found


def sparse_difference(layout: Layout, place_P: np.ndarray) -> Trainable:
    """Train what is added to `parts["model"]` at these places, from 0. Weight decay does not reach it.

    Every other parameter keeps its bits, and has no optimizer state.
    """

    def init(key: jax.Array, parts: Parts) -> tuple[PyTree, Parts]:
        return {"value": jnp.zeros(len(place_P))}, {**parts, "where": where(layout, place_P)}

    def combine(frozen: Parts, moving: PyTree, key: jax.Array | None = None) -> Parts:
        parts = {name: part for name, part in frozen.items() if name != "where"}
        return {**parts, "model": layout.add(parts["model"], placed(moving["value"], **frozen["where"]))}

    return Trainable(init, combine)


def where(layout: Layout, place_P: jax.Array | np.ndarray) -> dict[str, jax.Array]:
    """Return the places, and for each of the N parameters its value's place among the P, or P where it has none.

    Places from N on are padding.
    """
    place_P, count = jnp.asarray(place_P), len(place_P)
    source_N = jnp.full(layout.size, count, jnp.int32).at[place_P].set(jnp.arange(count, dtype=jnp.int32), mode="drop")
    return {"place": place_P, "source": source_N}


@jax.custom_vjp
def placed(value: jax.Array, place: jax.Array, source: jax.Array) -> jax.Array:
    """Put values in their places: a gather both ways. A scatter takes a CPU several times as long as the model.

    Elsewhere stands -0, which added to a number leaves its bits, even those of -0.
    """
    return jnp.take(jnp.pad(value, (0, 1), constant_values=-0.0), source)


placed.defvjp(
    lambda value, place, source: (placed(value, place, source), place),
    lambda place, g: (jnp.take(g, place, mode="fill", fill_value=0.0), None, None),
)


def budget(density: float, size: int) -> int:
    """Return how many of N parameters a difference may change. Raises UserError unless it is one at least."""
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
