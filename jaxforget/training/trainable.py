"""What moves in a run. Further choices (sparse differences, LoRA) are further functions returning a `Trainable`."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax

from jaxforget.errors import UserError
from jaxforget.training.step import Parts, PyTree, Trainable


def path_str(path: Any) -> str:
    """Name a leaf as `model/blocks/attn/q/kernel`: the one spelling for masks, patterns and files."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _fill(tree: PyTree, other: PyTree, key: jax.Array | None = None) -> PyTree:
    return jax.tree.map(lambda a, b: b if a is None else a, tree, other, is_leaf=lambda x: x is None)


@functools.cache
def subset(*patterns: str) -> Trainable:
    """Train the leaves whose path fully matches one of the regular expressions; freeze the rest.

    Frozen leaves have no optimizer state and are stored once. Raises UserError for a pattern that matches nothing.
    """

    def init(key: jax.Array, parts: Parts) -> tuple[PyTree, Parts]:
        leaves = [path_str(path) for path, _ in jax.tree_util.tree_leaves_with_path(parts)]
        for pattern in patterns:
            if not any(re.fullmatch(pattern, leaf) for leaf in leaves):
                typed, like = pattern.removeprefix("model/"), leaves[0].removeprefix("model/")  # as commands take them
                raise UserError(f"trainable pattern {typed!r} matches no parameter; paths look like {like!r}")

        def moves(path):
            return any(re.fullmatch(pattern, path_str(path)) for pattern in patterns)

        moving = jax.tree_util.tree_map_with_path(lambda path, x: x if moves(path) else None, parts)
        frozen = jax.tree_util.tree_map_with_path(lambda path, x: None if moves(path) else x, parts)
        return moving, frozen

    return Trainable(init, combine=_fill)


def everything() -> Trainable:
    """Train every parameter of the model. Other parts, such as a reference model, stay frozen."""
    return subset("model/.*")
