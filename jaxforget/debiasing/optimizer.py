"""One optimizer for what trains together: gates, values, adversaries and a core, each group with its own rate.

Groups are clipped separately: a joint norm, as in the released code of arXiv 2205.15171, lets the task scale down what
closes the gates. Gates have an epsilon far below their penalty's gradient, about sparsity * s(1 - s) / N: with Adam's
usual 1e-8 sparsity would depend on epsilon and on the scale of the loss.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import NamedTuple

import jax
import optax

from jaxforget.training.optimizer import OptimizerConfig, schedule
from jaxforget.training.trainable import path_str


class Group(NamedTuple):
    """Leaves whose path fully matches a pattern, and do not match an earlier group's."""

    pattern: str
    ratio: float  # of the learning rate in the state
    epsilon: float | None = None  # None: that of the config


def module_groups(modules: int, *, gate_rate: float, adversary_rate: float, core_rate: float) -> tuple[Group, ...]:
    """Return the groups of debiasing; rates are ratios to that of the differences' values."""
    found = []
    for j in range(modules):
        found += [Group(f"modules/{j}/(w|value)", 1.0), Group(f"modules/{j}/(alpha|group)", gate_rate, 1e-12)]
    return (*found, Group("adversary/.*", adversary_rate), Group("model/.*", core_rate))


def grouped(groups: tuple[Group, ...], config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """Adam by groups under one schedule; no decay. Raises ValueError for a leaf that no group takes.

    Configs that differ in learning rate alone give the same object, hence one program.
    """
    names = [field.name for field in dataclasses.fields(OptimizerConfig)]
    return _grouped(groups, OptimizerConfig(**{name: getattr(config, name) for name in names} | {"learning_rate": 0.0}))


@functools.cache
def _grouped(groups: tuple[Group, ...], config: OptimizerConfig) -> optax.GradientTransformation:
    def label(path, _):
        name = path_str(path)
        found = [group.pattern for group in groups if re.fullmatch(group.pattern, name)]
        if not found:
            raise ValueError(f"{name} belongs to none of the groups {', '.join(group.pattern for group in groups)}")
        return found[0]

    transforms = {
        group.pattern: optax.chain(
            optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity(),
            optax.scale_by_adam(config.b1, config.b2, group.epsilon or config.epsilon),
            optax.scale(group.ratio),
        )
        for group in groups
    }
    by_group = optax.partition(transforms, lambda params: jax.tree_util.tree_map_with_path(label, params))
    return optax.chain(by_group, schedule(config))
