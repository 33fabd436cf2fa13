"""Optimisers of unlearning, each equal to what PyTorch calls by that name; their rate lives in the state.

Of the transformations of optax only Adam's is torch's by default. See `set_schedule` for the rate.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxforget.errors import UserError
from jaxforget.training.optimizer import OptimizerConfig, schedule

STACKS = ("blocks", "encoder", "decoder")  # parts of a model whose leaves have a leading axis of layers


class MomentumState(NamedTuple):
    count: jax.Array  # int32, updates done
    buffer: optax.Updates


def dampened_momentum(decay: float = 0.9, dampening: float = 0.9) -> optax.GradientTransformation:
    """Average gradients as torch.optim.SGD: buffer = decay buffer + (1 - dampening) g, but the first is taken whole."""

    def init(params):
        return MomentumState(jnp.int32(0), jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None):
        def average(buffer, g):
            return jnp.where(state.count == 0, g, decay * buffer + (1.0 - dampening) * g)

        buffer = jax.tree.map(average, state.buffer, updates)
        return buffer, MomentumState(state.count + 1, buffer)

    return optax.GradientTransformation(init, update)


def adafactor() -> optax.GradientTransformation:
    """Scale as the Adafactor of transformers with scale_parameter and relative_step off: no first moment.

    A stacked leaf is the layers' tensors, factored and clipped one by one.
    """
    plain = optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=1), optax.clip_by_block_rms(1.0))

    def split(tree):
        model = tree["model"] if isinstance(tree, dict) and set(tree) >= {"model"} else {}
        stacks = {name: model[name] for name in STACKS if isinstance(model, dict) and name in model}
        rest = {**tree, "model": {n: part for n, part in model.items() if n not in stacks}} if stacks else tree
        return rest, stacks

    def init(params):
        rest, stacks = split(params)
        return plain.init(rest), {name: jax.vmap(plain.init)(part) for name, part in stacks.items()}

    def update(updates, state, params=None):
        (rest, stacks), (mine, own) = split(updates), split(params)
        rest, rest_state = plain.update(rest, state[0], mine)
        stack_states = {}
        for name in stacks:
            stacks[name], stack_states[name] = jax.vmap(plain.update)(stacks[name], state[1][name], own[name])
        whole = {**rest, "model": {**rest["model"], **stacks}} if stacks else rest
        return whole, (rest_state, stack_states)

    return optax.GradientTransformation(init, update)


def anchored(strength: float) -> optax.GradientTransformation:
    """Add the gradient of strength / 2 * ||theta - theta0||^2, theta0 being where the run started."""

    def update(updates, start, params=None):
        return jax.tree.map(lambda g, x, x0: g + strength * (x - x0), updates, params, start), start

    # A copy: the step donates its parameters.
    return optax.GradientTransformation(lambda params: jax.tree.map(lambda x: jnp.array(x, copy=True), params), update)


SCALINGS = {
    "adam": lambda: optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
    "adafactor": adafactor,
    "rmsprop": lambda: optax.scale_by_rms(decay=0.99, eps=1e-8, eps_in_sqrt=False),
    "sgd": optax.identity,
    "momentum": dampened_momentum,
}


@functools.cache
def ascent_optimizer(name: str, l2: float = 0.0) -> optax.GradientTransformation:
    """Build an optimiser with a constant rate and no clipping. l2: strength of the pull towards the start."""
    if name not in SCALINGS:
        raise UserError(f"unknown optimizer {name!r}; valid names are {', '.join(SCALINGS)}")
    pull = [anchored(l2)] if l2 else []
    return optax.chain(*pull, SCALINGS[name](), schedule(OptimizerConfig(schedule="constant", warmup=0.0)))
