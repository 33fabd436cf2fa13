"""From settings to the parts of a private run: one mechanism behind sampler, clipping, noise and accountant."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxforget.data.tokens import Examples
from jaxforget.errors import UserError
from jaxforget.models.sharding import ROWS, size
from jaxforget.privacy.accounting import Mechanism, PrivacyConfig, mechanism
from jaxforget.privacy.clipping import Clipping, check_units
from jaxforget.privacy.noise import Adaptive, band_coefficients, gaussian_noise, private_gradient, set_privacy
from jaxforget.privacy.sampling import PoissonBatches, population
from jaxforget.training.ensemble import MemberBatches, stack
from jaxforget.training.optimizer import TrainConfig, adamw, set_schedule
from jaxforget.training.step import Estimator, Objective, Parts, State, Step, Trainable, make_step


class PrivateRun(NamedTuple):
    """What a step and a loop need to be private."""

    mechanism: Mechanism
    batches: PoissonBatches
    gradient: Estimator
    optimizer: optax.GradientTransformation
    prepare: Callable[[State], State]  # writes bound and noise into a fresh state
    about: dict[str, Any]  # what every result states, each field with `dp_` before it


def private_run(config: PrivacyConfig, train: TrainConfig, examples: Examples, seed: int, unit: str) -> PrivateRun:
    """Resolve the settings for these examples. `train.batch_size` is the expected number of units of a batch.

    The norm of the noisy gradient is not clipped again: it is mostly noise. Raises UserError as `mechanism` does.
    """
    units = population(examples)
    steps = train.epochs * -(-units // train.batch_size)
    how = mechanism(config, population=units, batch=train.batch_size, steps=steps, unit=unit)
    microbatch = train.microbatch_of(train.batch_size)
    batches = PoissonBatches(examples, how, seed, microbatch or size(*ROWS))  # a draw may be of any size
    clipping = Clipping(config.estimator, batches.members, config.groups, config.auto_s)
    multiplier, adaptive = how.noise_std / how.clip, None
    if config.quantile is not None:
        adaptive = Adaptive(config.quantile, rate=0.2, noise=train.batch_size / 20)
        multiplier = adaptive_multiplier(multiplier, adaptive.noise)
    about = how.row() | {"auto_s": True, "clip": None} if config.auto_s else how.row()
    if adaptive is not None:
        about |= {"clip_quantile": adaptive.quantile, "clip_count_noise": adaptive.noise}
    noise = gaussian_noise(band_coefficients(config.bands, steps))
    return PrivateRun(
        how, batches, private_gradient(clipping, float(train.batch_size), microbatch, adaptive),
        optax.chain(noise, adamw(dataclasses.replace(train, max_grad_norm=0.0))),
        lambda state: set_privacy(state, bound=config.clip, multiplier=multiplier),
        {f"dp_{name}": value for name, value in about.items()},
    )  # fmt: skip


def phase_batches(
    run: PrivateRun, examples: Sequence[Examples], seeds: Sequence[int], epochs: int
) -> list[PoissonBatches]:
    """Return the batches of members in a part of a run, `epochs` long; members and parts need seeds of their own.

    The run accounts for all of them together if its epochs are the sum of theirs. Not for correlated noise.
    """
    how = dataclasses.replace(run.mechanism, steps=epochs * run.mechanism.steps_per_epoch)
    found = [dataclasses.replace(run.batches, examples=one, mechanism=how, seed=seed)
             for one, seed in zip(examples, seeds, strict=True)]  # fmt: skip
    most = max(one.units for one in found) if epochs else 1
    return [dataclasses.replace(one, at_least=most) for one in found]


def adaptive_multiplier(total: float, count_noise: float) -> float:
    """Return the multiplier left for gradients when a count with this noise is released too. Source: arXiv 1905.03871.

    (total^-2 - (2 count_noise)^-2)^-1/2: both releases together then cost what one with multiplier `total` does.
    """
    if not total:
        return 0.0
    if total >= 2.0 * count_noise:
        raise UserError(f"noise {total:g} is more than the adaptive bound's count can have with this batch, "
                        f"{2.0 * count_noise:g}; give a larger batch, or leave out quantile")  # fmt: skip
    return 1.0 / math.sqrt(total**-2 - (2.0 * count_noise) ** -2)


def check(
    step: Step, objective: Objective, trainable: Trainable, parts: Parts, batches: PoissonBatches, estimator: str
) -> None:
    """Raise UserError for a step whose per-unit gradients would be wrong, before anything is written."""
    batch = {name: jnp.asarray(column[0]) for name, column in batches.take(0, 1, 1).items()}
    key = jax.random.key(0)
    jax.eval_shape(lambda key: step.update(*step.init(key, parts), batch), key)
    moving, frozen = trainable.init(key, parts)

    def losses(moving, batch, key):
        return objective(trainable.combine(frozen, moving), batch, key)

    check_units(losses, moving, batch, key, estimator)


def private_members(
    runs: Sequence[PrivateRun], learning_rates: Sequence[float], objective: Objective, trainable: Trainable,
    parts: Parts, estimator: str,
) -> tuple[Step, State, Parts, MemberBatches]:  # fmt: skip
    """Let private runs of the same settings but privacy level, seed and rate share one step and one shape of batch.

    Returns the step of one, the K states, what is frozen and the batches of all. Raises UserError as `check` does.
    """
    most = max(run.batches.units for run in runs)
    batches = [dataclasses.replace(run.batches, at_least=most) for run in runs]
    step = make_step(objective, trainable, runs[0].gradient, runs[0].optimizer)
    check(step, objective, trainable, parts, batches[0], estimator)
    states = []
    for run, rate in zip(runs, learning_rates, strict=True):
        state, frozen = step.init(jax.random.key(run.batches.seed), parts)
        states.append(run.prepare(set_schedule(state, learning_rate=rate, total=run.batches.steps)))
    return step, stack(states), frozen, MemberBatches(tuple(batches))
