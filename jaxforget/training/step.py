"""A training step is a composition of four pure functions.

    objective   losses(parts, batch, key) -> losses_B
    trainable   init(key, parts) -> (trainable, frozen);  combine(frozen, trainable, key=None) -> parts
    gradient    (losses, trainable, batch, key) -> (report, grads), or an Estimator, which remembers
    optimizer   optax.GradientTransformation; its update may take `key`, the step's, and `report`, the gradient's

`parts` is a dict of named pytrees. `parts["model"]` is the language model every objective reads; others are there
when an objective needs them: `reference` (the frozen starting model), adversary heads, a dual variable. Which parts
move is the trainable's choice alone, so an objective reads the same under full training, a subset, or a difference.

A batch is a dict of arrays with a leading B. `weight` (0 = padding) is each example's share in the mean.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxforget.models import sharding

# What a key is for; large, since splits of a key have small numbers.
RUN, OPTIMIZER = 0x52554E, 0x4F5054

PyTree = Any
Parts = dict[str, PyTree]
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Objective = Callable[[Parts, Batch, jax.Array], jax.Array]
Losses = Callable[[PyTree, Batch, jax.Array], jax.Array]  # trainable, batch, key -> losses_B
Gradient = Callable[[Losses, PyTree, Batch, jax.Array], tuple[Metrics, PyTree]]


class State(NamedTuple):
    """All that a run changes: a plain pytree, so vmap, scan, jit shardings and Orbax take it as it is."""

    step: jax.Array  # int32, optimizer updates done
    trainable: PyTree
    opt_state: PyTree
    memory: PyTree  # of the gradient estimator; () for most
    key: jax.Array  # typed key of the steps; step n uses fold_in(key, n)


class Trainable(NamedTuple):
    """Splits parts into what moves and what does not, and joins them again.

    combine may draw at random, such as gates: in a step it gets the step's key. Without one it gives the parts that
    are evaluated and saved.
    """

    init: Callable[[jax.Array, Parts], tuple[PyTree, Parts]]
    combine: Callable[..., Parts]  # frozen, trainable, key=None -> parts


class Estimator(NamedTuple):
    """A gradient estimator that remembers something between steps, such as an adaptive clipping bound."""

    init: Callable[[PyTree], PyTree]  # trainable -> memory
    estimate: Callable[[PyTree, Losses, PyTree, Batch, jax.Array], tuple[PyTree, Metrics, PyTree]]  # memory first


class Step(NamedTuple):
    """What training is made of; all pure.

    run does the first `count` of S stacked batches and returns metrics with a trailing S. `count` is traced, so a short
    last chunk runs in the same program and rounds the same way: a resumed run is bit-equal to an undisturbed one
    wherever it was cut, and members with different amounts of data share one program.
    """

    init: Callable[[jax.Array, Parts], tuple[State, Parts]]  # key, parts -> state, frozen
    update: Callable[[State, Parts, Batch], tuple[State, Metrics]]
    run: Callable[[State, Parts, Batch, jax.Array], tuple[State, Metrics]]
    combine: Callable[..., Parts]
    own: tuple[str, ...] | None = None  # of members: the parts with a leading K; None is a step of one model


@functools.cache  # equal compositions are the same function, so each is traced and compiled once a process
def make_step(
    objective: Objective, trainable: Trainable, gradient: Gradient | Estimator, optimizer: optax.GradientTransformation
) -> Step:
    """Join the four functions into a pure step.

    metrics: scalars `loss` (the gradient's own mean, nats), `grad_norm`, and whatever else the gradient reports.
    """
    optimizer = optax.with_extra_args_support(optimizer)
    if not isinstance(gradient, Estimator):
        stateless = gradient
        gradient = Estimator(lambda trainable: (), lambda memory, *args: (memory, *stateless(*args)))

    def init(key: jax.Array, parts: Parts) -> tuple[State, Parts]:
        moving, frozen = trainable.init(key, parts)
        # The step donates its state. A leaf that also lives in `frozen` or with the caller must not go with it.
        moving = jax.tree.map(lambda x: jnp.array(x, copy=True), moving)
        frozen = jax.tree.map(jnp.asarray, frozen)  # on the device once, not at every call
        key = jax.random.fold_in(key, RUN)
        return State(jnp.int32(0), moving, optimizer.init(moving), gradient.init(moving), key), frozen

    def update(state: State, frozen: Parts, batch: Batch) -> tuple[State, Metrics]:
        def losses(moving: PyTree, batch: Batch, key: jax.Array) -> jax.Array:
            return objective(trainable.combine(frozen, moving, key), batch, key)

        key = jax.random.fold_in(state.key, state.step)
        memory, report, grads = gradient.estimate(state.memory, losses, state.trainable, batch, key)
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.trainable, key=jax.random.fold_in(key, OPTIMIZER), report=report
        )
        moved = optax.apply_updates(state.trainable, updates)
        metrics = {**report, "grad_norm": optax.tree.norm(grads)}
        return State(state.step + 1, moved, opt_state, memory, state.key), metrics

    def run(state: State, frozen: Parts, batches_S: Batch, count: jax.Array) -> tuple[State, Metrics]:
        return scan_first(lambda state, batch: update(state, frozen, batch), state, batches_S, count)

    return Step(init, update, run, trainable.combine)


def scan_first(
    function: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]], carry: PyTree, inputs_S: PyTree, count: jax.Array
) -> tuple[PyTree, PyTree]:
    """lax.scan over the first `count`, which is traced, of S stacked inputs; outputs beyond are zeros, (S, ...).

    Where members stand beside another axis of the mesh, all S are computed and those beyond `count` dropped: XLA may
    let devices of different members wait for each other, which then have to take as many turns.
    """

    def take(i):
        return jax.tree.map(lambda x: x[i], inputs_S)

    size = jax.tree.leaves(inputs_S)[0].shape[0]
    shapes = jax.eval_shape(function, carry, jax.eval_shape(take, 0))[1]
    seen_S = jax.tree.map(lambda one: jnp.zeros((size, *one.shape), one.dtype), shapes)

    together = sharding.size("member") > 1 and sharding.size("data", "fsdp", "tensor") > 1

    def body(i, both):
        carry, seen_S = both
        new, seen = function(carry, take(i))
        if together:
            dropped = carry, jax.tree.map(jnp.zeros_like, seen)
            new, seen = jax.tree.map(lambda x, y: jnp.where(i < count, x, y), (new, seen), dropped)
        return new, jax.tree.map(lambda all_, one: all_.at[i].set(one), seen_S, seen)

    return jax.lax.fori_loop(0, size if together else count, body, (carry, seen_S))


@functools.cache
def make_run(step: Step) -> jax.stages.Wrapped:
    """Compile `step.run`. The state is donated, and lies after it where it lay before."""

    def run(state, frozen, batches_S, count):
        state, metrics_S = step.run(state, frozen, batches_S, count)
        return sharding.pin(state, lead=step.own is not None), metrics_S

    return jax.jit(run, donate_argnums=0)


def place(step: Step, state: State, frozen: Parts) -> tuple[State, Parts]:
    """Put what a run works on where the rules of models/sharding.py say.

    Raises UserError for members that do not divide over the devices.
    """
    if step.own is not None:
        sharding.check_members(state.step.shape[0])
    frozen = {name: sharding.place(part, lead=name in (step.own or ())) for name, part in frozen.items()}
    return sharding.place(state, lead=step.own is not None), frozen
