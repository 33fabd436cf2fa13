"""Run one method on one model: the recipe's slots into a step, the step over its batches, until the target is met."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxforget.data.sampling import order
from jaxforget.data.tokens import Examples
from jaxforget.metrics.language import language_metrics, token_scores
from jaxforget.models import Model, Params
from jaxforget.models.layers import merge
from jaxforget.training.batches import Batches
from jaxforget.training.gradients import mean_gradient
from jaxforget.training.loop import Outcome
from jaxforget.training.optimizer import TrainConfig, adamw
from jaxforget.training.stage import train_stage
from jaxforget.training.step import Parts, Step, Trainable, make_step
from jaxforget.unlearning.recipe import Method, Recipe, Setting, moves, optimized


def unlearn(
    directory: Path,
    method: Method,
    setting: Setting,
    config: TrainConfig,
    moving: Trainable,
    *,
    learning_rate: float,
    watched: Mapping[str, Examples],
    target: float | None,
    evaluate_every: int,
    curve: Callable[[int, dict[str, float]], None],
    **stage: Any,
) -> tuple[Any, dict[str, Any]]:
    """Unlearn and save the model in `directory`; a finished directory is loaded instead.

    moving: what of the model moves: all of it, a subset, adapters, a sparse difference.
    watched: sets measured every `evaluate_every` steps and handed to `curve` as <set>_nll. target: stop once the
    watched forget loss reaches it, nats a token; None runs all epochs. Further arguments go to `train_stage`.
    Returns (params, record); the record adds the last watched losses to what a stage records.
    """
    model = setting.model
    recipe = method.recipe(setting)
    step = step_of(recipe, config, moving)
    # The starting model as a reference and as the base of adapters is one copy on the device.
    parts = {"model": setting.params, **recipe.parts}
    if any(part is setting.params for part in recipe.parts.values()):
        start = jax.tree.map(jnp.asarray, setting.params)
        parts = {name: start if part is setting.params else part for name, part in parts.items()}
    batches = Batches(recipe.streams, config.epochs, setting.seed)
    last: dict[str, float] = {}

    def evaluate(step: int, parts: Parts) -> bool:
        last.update(watched_losses(model, merge(parts["model"]), watched))
        curve(step, dict(last))
        return target is not None and last["forget_nll"] >= target

    def describe(outcome: Outcome, params: Params) -> dict[str, Any]:
        if not last:  # killed between the last checkpoint and the saved model: the loop had nothing left to do
            last.update(watched_losses(model, params, watched))
        reference = sum(batches.tokens_until(outcome.steps, stream=i) for i in recipe.reference_streams)
        prepared = recipe.prepare_forwards * int(setting.sets["forget"].lengths.sum())
        return {"forward_tokens": reference + prepared, "watched": last}

    return train_stage(
        directory, model, step, parts, batches, learning_rate=learning_rate, evaluate=evaluate,
        evaluate_every=evaluate_every, describe=describe, **stage,
    )  # fmt: skip


def step_of(recipe: Recipe, config: TrainConfig, moving: Trainable) -> Step:
    """Join the slots of a recipe to a step. Recipes that differ in streams or parts alone give the same object."""
    gradient = mean_gradient(config.microbatch_of(*(stream.rows for stream in recipe.streams)))
    optimizer = adamw(config)
    if recipe.optimizers or recipe.finish:
        moving = moves(moving, tuple(recipe.optimizers), recipe.finish)
        optimizer = optimized(optimizer, tuple(recipe.optimizers.items()))
    return make_step(recipe.objective, moving, gradient, optimizer)


def watched_losses(model: Model, params: Params, watched: Mapping[str, Examples]) -> dict[str, float]:
    """Return <set>_nll of every watched set, nats a token."""
    return {f"{name}_nll": language_metrics(token_scores(model, params, one))["nll"] for name, one in watched.items()}


def sample(examples: Examples, size: int) -> Examples:
    """Take at most `size` examples, chosen by their ids alone."""
    return examples.take(order(examples.columns["key"], 0, 0)[:size])
