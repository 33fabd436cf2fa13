"""A sweep: one method with several learning rates, strengths and seeds as members of one program.

The learning rate lives in the optimizer's state. The strength multiplies the weight of the retain term, which is a
coefficient of each member's batches. Seeds differ in data order and, where their settings say so, in the model they
start from. What else a method can be set to is part of the program, hence another sweep.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxforget import checks
from jaxforget.data.tokens import same_widths
from jaxforget.models.layers import merge
from jaxforget.models.sharding import host
from jaxforget.training.batches import Batches
from jaxforget.training.ensemble import MemberBatches, Members, join_parts, member, members
from jaxforget.training.loop import Outcome, fit
from jaxforget.training.optimizer import TrainConfig, set_schedule
from jaxforget.training.step import Parts, PyTree, Trainable
from jaxforget.unlearning.recipe import Method, Recipe, Setting
from jaxforget.unlearning.run import step_of


class Member(NamedTuple):
    """One run of a sweep; `setting` holds its seed and what it starts from."""

    setting: Setting
    learning_rate: float
    strength: float = 1.0


class Swept(NamedTuple):
    """What became of the members: the models to evaluate, on the host, and what is to be said of those that failed."""

    params: list[Any]
    notes: list[str | None]
    outcome: Outcome
    prepare_forwards: int  # passes over the forget set before the first step, of a member


def grid(
    method: Method, settings: Sequence[Setting], rates: Sequence[float], strengths: Sequence[float]
) -> list[Member]:
    """Return all combinations as members, seeds innermost. A method without a retain term has one strength, 1."""
    if not getattr(method, "retain_weight", 0.0):
        strengths = (1.0,)
    return [Member(one, rate, strength) for rate in rates for strength in strengths for one in settings]


def strengthened(method: Any, strength: float) -> Method:
    """Multiply the weight of the retain term, which a method has that is strengthened."""
    if strength == 1.0:
        return method
    checks.positive(strength=strength)
    return dataclasses.replace(method, retain_weight=strength * method.retain_weight)


def sweep(
    method: Method,
    runs: Sequence[Member],
    config: TrainConfig,
    moving: Trainable,
    *,
    how: Members = "auto",
    evaluate: Callable[[int, list[Any]], None] | None = None,
    **loop: Any,
) -> Swept:
    """Train the members side by side; one that diverges spoils nothing but itself.

    A member ends as `unlearn` alone would with its settings. evaluate(step, params of every member) is called at step
    0, every `evaluate_every` steps and at the end. Further arguments go to `fit`.
    """
    # Rates share what a recipe prepares, such as another model, and `join_parts` then holds it once.
    alike = {(id(one.setting), one.strength): one for one in runs}
    made = {which: strengthened(method, one.strength).recipe(one.setting) for which, one in alike.items()}
    recipes = [made[id(one.setting), one.strength] for one in runs]
    step, *others = {step_of(recipe, config, moving) for recipe in recipes}
    if others:
        raise ValueError("the members of a sweep must share one program")
    batches_K = _batches(runs, recipes, config)
    own, parts = join_parts([{"model": one.setting.params, **recipe.parts}
                             for one, recipe in zip(runs, recipes, strict=True)])  # fmt: skip
    lifted = members(step, how, own)
    states, frozen = lifted.init([jax.random.key(one.setting.seed) for one in runs], parts)
    rates, steps = [one.learning_rate for one in runs], [mine.steps for mine in batches_K]
    state = set_schedule(states, learning_rate=rates, total=steps)
    failed: list[int | None] = [None] * len(runs)
    given = loop.pop("log", lambda step, metrics: None)

    def log(step: int, metrics: dict[str, Any]) -> None:
        for k, loss in enumerate(metrics["loss"]):
            if failed[k] is None and loss is not None and not np.isfinite(loss):
                failed[k] = step
        given(step, metrics)

    def models(parts_K: Parts) -> list[Any]:
        host_K = host(parts_K["model"])
        return [host(merge(member(host_K, k))) for k in range(len(runs))]

    if evaluate is not None:

        def watch(step: int, parts_K: Parts) -> bool:
            evaluate(step, models(parts_K))
            return False

        loop["evaluate"] = watch
    outcome = fit(lifted, state, frozen, MemberBatches(tuple(batches_K)), finite=False, log=log, **loop)
    params = models(lifted.combine(frozen, outcome.state.trainable))
    notes = [_note(step, one) for step, one in zip(failed, params, strict=True)]
    return Swept(params, notes, outcome, recipes[0].prepare_forwards)


def _batches(runs: Sequence[Member], recipes: Sequence[Recipe], config: TrainConfig) -> list[Batches]:
    """Give every member the batches it would have alone, of one shape."""
    wide = [same_widths([stream.examples for stream in streams])
            for streams in zip(*(recipe.streams for recipe in recipes), strict=True)]  # fmt: skip
    streams_K = [
        tuple(stream._replace(examples=wide[i][k]) for i, stream in enumerate(recipe.streams))
        for k, recipe in enumerate(recipes)
    ]
    return [Batches(streams, config.epochs, one.setting.seed) for streams, one in zip(streams_K, runs, strict=True)]


def _note(step: int | None, params: PyTree) -> str | None:
    if step is not None:
        return f"the loss is not finite at step {step}"
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
        return "parameters are not finite"
    return None
