"""The Gaussian noise of private training, and the gradient that it hides, as parts of a step.

    make_step(objective, trainable, private_gradient(...), optax.chain(gaussian_noise(), adamw(...)))

The estimator reports how much one unit can change its gradient, `sensitivity`, and the noise has that times its
multiplier as standard deviation: the two cannot disagree. Clipping bound and multiplier are arrays of the state, so one
compiled step serves every privacy level and members of different levels train side by side. Shapes: U units.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxforget.privacy.clipping import Clipping, clipped_sum
from jaxforget.training.gradients import microbatches
from jaxforget.training.step import Batch, Estimator, Losses, Metrics, PyTree, State

COUNT = 0x434F554E  # what a key is for: the noise on the count. Splits of the same key have small numbers


class Adaptive(NamedTuple):
    """Settings of an adaptive bound C, geometric updates towards a quantile of the norms. Source: arXiv 1905.03871.

    C <- C exp(-rate * (b - quantile)), b the noisy share of units within C. noise: standard deviation on the sum over
    units of [norm <= C] - 1/2. One unit changes it by 1/2; by 1 if it is replaced, when gradients' noise doubles too.
    """

    quantile: float
    rate: float
    noise: float


class ClipState(NamedTuple):
    bound: jax.Array  # float32, C


class NoiseState(NamedTuple):
    multiplier: jax.Array  # float32, sigma
    past: PyTree  # standard noise of the last bands - 1 steps, newest first, (bands - 1, *shape); () without bands


@functools.cache
def private_gradient(
    how: Clipping, expected_units: float, microbatch: int | None = None, adaptive: Adaptive | None = None
) -> Estimator:
    """Sum clipped gradients and divide by the expected number of units, which unlike the actual one is no secret.

    microbatch: units differentiated at a time. Real units stand first, and micro-batches that are all padding are not
    computed. The report: loss, the mean over units; units, their number; bound; norm, the mean norm, and clipped, the
    share that was cut, both without units that are not finite; bad, the number of those; sensitivity. Every number but
    the last is computed from data without noise: the report is not private.
    """

    def init(trainable):
        return ClipState(jnp.float32(1.0))

    def estimate(
        memory: ClipState, losses: Losses, trainable: PyTree, batch: Batch, key: jax.Array
    ) -> tuple[ClipState, Metrics, PyTree]:
        rows = batch["weight"].shape[0]
        size = min((microbatch or rows) * how.rows, rows)
        if rows % size:
            raise ValueError(f"microbatch {microbatch} does not divide the batch of {rows // how.rows} units")
        parts_M = microbatches(batch, size)
        real_MU = (parts_M["weight"] > 0).reshape(rows // size, -1, how.rows).any(axis=-1)

        def part(i):
            found = clipped_sum(losses, trainable, jax.tree.map(lambda x: x[i], parts_M), key, memory.bound, how)
            norm_U = jnp.sqrt(jnp.sum(jnp.square(found.norm_GU), axis=0))
            good_U = found.real_U & jnp.isfinite(norm_U)
            cut_U = jnp.any(found.norm_GU > memory.bound / found.norm_GU.shape[0] ** 0.5, axis=0)
            count = lambda x_U: jnp.sum(jnp.where(good_U, x_U, 0.0))  # noqa: E731
            sums = {"loss": count(found.loss_U), "norm": count(norm_U), "clipped": count(cut_U), "good": count(1.0),
                    "units": jnp.sum(found.real_U, dtype=jnp.float32)}  # fmt: skip
            return found.total, sums

        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(part, 0))
        used = jnp.max(jnp.where(real_MU.any(axis=1), jnp.arange(1, rows // size + 1), 0))
        total, sums = jax.lax.fori_loop(0, used, lambda i, sum_: jax.tree.map(jnp.add, sum_, part(i)), zero)
        good = jnp.maximum(sums["good"], 1.0)
        report = {name: sums[name] / good for name in ("loss", "norm", "clipped")}
        diverged = (sums["good"] == 0) & (sums["units"] > 0)
        report["loss"] = jnp.where(diverged, jnp.nan, report["loss"])
        report |= {"units": sums["units"], "bad": sums["units"] - sums["good"], "bound": memory.bound,
                   "sensitivity": how.sensitivity(memory.bound) / expected_units}  # fmt: skip
        if adaptive is not None:
            centred = sums["good"] / 2 - sums["clipped"]
            centred += adaptive.noise * jax.random.normal(jax.random.fold_in(key, COUNT))
            noisy = centred / expected_units + 0.5
            memory = ClipState(memory.bound * jnp.exp(-adaptive.rate * (noisy - adaptive.quantile)))
        return memory, report, jax.tree.map(lambda x: x / expected_units, total)

    return Estimator(init, estimate)


@functools.cache
def gaussian_noise(bands: tuple[float, ...] = (1.0,)) -> optax.GradientTransformationExtraArgs:
    """Add N(0, (multiplier * sensitivity)^2) to every number of the gradient, in float32.

    One draw for each step, from the key of the step and the place of the leaf: whatever the micro-batches or devices,
    and the same again when a run is resumed. An empty batch gets it too. Not a cryptographic source of randomness.

    bands: the noises y of all steps solve C y = z, z standard and C a lower-triangular Toeplitz matrix of norm 1 with
    these coefficients: later noise takes back a part of earlier noise, so that their sum, which moves the model, is
    smaller. The guarantee holds if no unit takes part twice in len(bands) steps (arXiv 2306.08153).
    """
    first, *rest = bands

    def init(params):
        past = jax.tree.map(lambda x: jnp.zeros((len(rest), *x.shape), jnp.float32), params)
        return NoiseState(jnp.float32(0.0), past if rest else ())

    def update(updates, state, params=None, *, key, report, **_):
        scale = state.multiplier * report["sensitivity"]
        leaves, treedef = jax.tree.flatten(updates)
        noise = [jax.random.normal(jax.random.fold_in(key, index), leaf.shape) for index, leaf in enumerate(leaves)]
        past = jax.tree.leaves(state.past)
        if rest:
            before = [sum(c * y for c, y in zip(rest, past_y, strict=True)) for past_y in past]
            noise = [(z - y) / first for z, y in zip(noise, before, strict=True)]
            past = [jnp.concatenate([y[None], past_y[:-1]]) for y, past_y in zip(noise, past, strict=True)]
            state = state._replace(past=treedef.unflatten(past))
        noisy = [leaf + scale * one for leaf, one in zip(leaves, noise, strict=True)]
        return treedef.unflatten(noisy), state

    return optax.GradientTransformationExtraArgs(init, update)


@functools.cache
def band_coefficients(bands: int, steps: int) -> tuple[float, ...]:
    """Return c_0 .. c_{bands - 1} of a lower-triangular Toeplitz matrix C (T, T) with columns of at most norm 1.

    They minimise the mean squared error of the sums of noise after 1 .. T steps, |c|^2 sum over s of (T - s) g_s^2 / T
    where g are the coefficients of A C^-1, A the matrix of prefix sums (arXiv 2306.08153), from those of the square
    root of A, binom(2j, j) / 4^j (arXiv 2405.13763).
    """
    from scipy.optimize import minimize
    from scipy.signal import lfilter

    left = np.arange(steps, 0, -1) / steps
    impulse = np.eye(1, steps)[0]

    def error(tail: np.ndarray) -> float:
        c = np.concatenate([[1.0], tail])
        return np.log(np.sum(c**2) * np.sum(left * np.cumsum(lfilter([1.0], c, impulse)) ** 2))

    start = np.cumprod((2 * np.arange(1, bands) - 1) / (2 * np.arange(1, bands)))
    found = minimize(error, start, method="L-BFGS-B").x if bands > 1 else start
    c = np.concatenate([[1.0], found])
    return tuple((c / np.linalg.norm(c)).tolist())


def set_privacy(state: State, *, bound: float, multiplier: float) -> State:
    """Write the clipping bound C and the noise multiplier into a fresh state, of one or of members side by side."""

    def write(node):
        if isinstance(node, ClipState):
            return ClipState(jnp.full_like(node.bound, bound))
        if isinstance(node, NoiseState):
            return node._replace(multiplier=jnp.full_like(node.multiplier, multiplier))
        return node

    is_ours = lambda node: isinstance(node, ClipState | NoiseState)  # noqa: E731
    return state._replace(
        memory=jax.tree.map(write, state.memory, is_leaf=is_ours),
        opt_state=jax.tree.map(write, state.opt_state, is_leaf=is_ours),
    )
