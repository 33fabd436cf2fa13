"""LoRA: the model stays frozen, and a product of two thin matrices beside some of its kernels moves. arXiv 2106.09685.

Shapes: D inputs of a kernel, F its outputs, R rank. Kernels of blocks have a leading L, and so have their factors.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxforget import checks
from jaxforget.errors import UserError
from jaxforget.models import Model
from jaxforget.models.layers import LowRank
from jaxforget.training.step import Parts, PyTree, Trainable
from jaxforget.training.trainable import everything, path_str, subset


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters. Patterns are regular expressions for the end of a path such as `blocks/attn/q`."""

    rank: int = 8
    """Rank of every adapter. On the command line 0 means none."""
    alpha: float = 16.0
    """The adapter counts alpha / rank times."""
    targets: tuple[str, ...] = ("q|v|qkv",)
    """Layers that get an adapter, such as `q`, `attn/.*` or `mlp/(up|down)`. Default: the query and value projections
    of all attention, which some families keep in one layer with the key's."""
    also: tuple[str, ...] = ()
    """Layers or parameters trained in full besides, such as `score`, a fresh classification head."""
    rslora: bool = False
    """The adapter counts alpha / sqrt(rank) times instead (arXiv 2312.03732)."""

    def __post_init__(self):
        checks.at_least(0, rank=self.rank)
        checks.positive(alpha=self.alpha)
        if not self.targets:
            raise UserError("targets is empty; name at least one layer")
        for pattern in (*self.targets, *self.also):
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"LoRA pattern {pattern!r} is not a regular expression: {error}") from None

    @property
    def scale(self) -> float:
        """Factor on the product of the two matrices."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def adapts(self, path: str) -> bool:
        """Say whether the parameter at this path of the model gets an adapter."""
        layer, _, name = path.rpartition("/")
        return name == "kernel" and any(_matches(pattern, layer) for pattern in self.targets)

    def trains(self, path: str) -> bool:
        """Say whether the parameter at this path of the model is trained in full."""
        return any(_matches(pattern, path) or _matches(pattern, path.rpartition("/")[0]) for pattern in self.also)


@functools.cache
def lora(config: LoraConfig) -> Trainable:
    """Train adapters of `parts["model"]`, and in full what `config.also` names; freeze the rest.

    The moving tree is {"a", "b", "also"}, each with the model's structure and None where nothing moves. a: (D, R) from
    U(-1 / sqrt(D), 1 / sqrt(D)), which is PEFT's draw; b: (R, F), zero. A draw depends on the key and the path alone.
    Raises UserError for rank 0, a pattern that matches nothing, or a target that has no kernel.
    """
    if not config.rank:
        raise UserError("rank is 0; an adapter needs at least 1")

    def init(key: jax.Array, parts: Parts) -> tuple[PyTree, Parts]:
        model = parts["model"]
        _check(config, model)

        def draw(path, kernel):
            *lead, D, _ = kernel.shape
            bound = 1.0 / math.sqrt(D)
            own_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
            return jax.random.uniform(own_key, (*lead, D, config.rank), jnp.float32, -bound, bound)

        def zero(path, kernel):
            *lead, _, F = kernel.shape
            return jnp.zeros((*lead, config.rank, F), jnp.float32)

        moving = {"a": _pick(config.adapts, model, draw), "b": _pick(config.adapts, model, zero)}
        moving["also"] = _pick(config.trains, model)
        return moving, {**parts, "model": _pick(lambda path: not config.trains(path), model)}

    def combine(frozen: Parts, moving: PyTree, key: jax.Array | None = None) -> Parts:
        def join(x, a, b, also):
            return also if x is None else x if a is None else LowRank(x, a, b, config.scale)

        trees = frozen["model"], moving["a"], moving["b"], moving["also"]
        return {**frozen, "model": jax.tree.map(join, *trees, is_leaf=lambda x: x is None)}

    return Trainable(init, combine)


def with_head(config: LoraConfig, model: Model) -> LoraConfig:
    """Train a classification head in full besides, unless `config.also` says otherwise."""
    if not config.rank or config.also or model.config.head != "classification":
        return config
    return dataclasses.replace(config, also=tuple(name for name in ("pool", "score") if name in model.shapes()))


def moving_parts(patterns: Sequence[str], config: LoraConfig) -> Trainable:
    """Return what moves: adapters where the rank is not 0, else what matches a pattern, else everything."""
    if config.rank and patterns:
        raise UserError("--trainable and --lora.rank exclude each other; --lora.also names what is trained in full")
    if config.rank:
        return lora(config)
    return subset(*(f"model/{pattern}" for pattern in patterns)) if patterns else everything()


def _check(config: LoraConfig, model: PyTree) -> None:
    if any(isinstance(x, LowRank) for x in jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, LowRank))):
        raise UserError("the model has a LoRA adapter already; merge it first")
    paths = [path_str(path) for path, _ in jax.tree_util.tree_leaves_with_path(model)]
    layers = dict.fromkeys(path.rpartition("/")[0] for path in paths)
    dense = [layer for layer in layers if f"{layer}/kernel" in paths]
    for pattern in config.targets:
        found = [layer for layer in layers if _matches(pattern, layer)]
        if not found:
            raise UserError(f"LoRA target {pattern!r} matches no layer; there are {', '.join(dense)}")
        for layer in found:
            if layer not in dense:
                raise UserError(f"LoRA target {pattern!r} matches {layer}, which is none of {', '.join(dense)}")
    for pattern in config.also:
        if not any(_matches(pattern, name) for name in (*paths, *layers)):
            raise UserError(f"trainable pattern {pattern!r} matches no parameter; there are {', '.join(layers)}")
    for path in paths:
        if config.adapts(path) and config.trains(path):
            raise UserError(f"{path} matches a LoRA target and a pattern of what is trained in full; choose one")


def _matches(pattern: str, path: str) -> bool:
    return re.fullmatch(f"(.*/)?(?:{pattern})", path) is not None


def _pick(
    chosen: Callable[[str], bool], model: PyTree, function: Callable[[str, Any], Any] = lambda path, x: x
) -> PyTree:
    """Apply a function of path and leaf where a path is chosen; None elsewhere."""

    def one(path, x):
        return function(path_str(path), x) if chosen(path_str(path)) else None

    return jax.tree_util.tree_map_with_path(one, model)
