"""Per-unit clipped gradient sums, the estimators of private training.

    g = sum over units u of c_u * grad l_u,     c_u = min(1, C / |grad l_u|)

l_u is the weighted mean loss of a unit's rows, and the norm goes over all leaves that move, or over each group of them.
Adding or removing one unit changes g by at most `sensitivity`. Sources: arXiv 1607.00133; AUTO-S, arXiv 2206.07136.

ESTIMATORS, all with the same result:

    vmap      differentiate every unit by itself: any model and objective, U x parameters floats
    ghost     norms from one backward pass, the sum from a second: keeps no factors, which counts over many devices
    bookkeep  norms and sum from one backward pass, whose factors are kept: the fastest

Shapes: B rows, U units of k rows that stand together, G groups of leaves.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxforget.errors import UserError
from jaxforget.models.layers import Tapped
from jaxforget.privacy import taps
from jaxforget.training.step import Batch, Losses, PyTree
from jaxforget.training.trainable import path_str

AUTO_S_GAMMA = 0.01


class Clipped(NamedTuple):
    """A sum of clipped gradients, and what it was made from."""

    total: PyTree
    norm_GU: jax.Array
    loss_U: jax.Array
    real_U: jax.Array  # False for padding


@dataclasses.dataclass(frozen=True)
class Clipping:
    """How gradients are bounded. Hashable: a static part of the step.

    rows: of a unit. groups: regular expressions for paths of what moves; each leaf belongs to the first that matches,
    and those without a match are the last group. Every group is clipped to C / sqrt(groups). auto_s: c = 1 / (|g| +
    0.01) instead, which needs no bound.
    """

    estimator: Literal["auto", "vmap", "ghost", "bookkeep"] = "auto"
    rows: int = 1
    groups: tuple[str, ...] = ()
    auto_s: bool = False

    def sensitivity(self, bound: jax.Array) -> jax.Array:
        """Return the largest norm that one unit adds to the sum."""
        return jnp.ones_like(bound) if self.auto_s else bound


def clipped_sum(
    losses: Losses, trainable: PyTree, batch: Batch, key: jax.Array, bound: jax.Array, how: Clipping
) -> Clipped:
    """Return the clipped sum of a batch of U * how.rows rows. losses(trainable, batch, key) -> losses_B.

    A unit whose gradient is not finite counts as 0, as does one whose rows all have weight 0. Raises UserError
    where the estimator cannot tell units apart.
    """
    return ESTIMATORS[how.estimator](losses, trainable, batch, key, bound, how)


def check_units(losses: Losses, trainable: PyTree, batch: Batch, key: jax.Array, estimator: str = "auto") -> None:
    """Raise UserError for losses whose clipped gradients would not be those of single units.

    That is where the loss of a row depends on other rows, and, but for the estimator vmap, where something besides the
    operations of models/layers.py reads a parameter, whose gradient then would lack that part.
    """
    batch = jax.tree.map(lambda x: x[:4], batch)
    first = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), batch)
    run = jax.jit(lambda trainable, batch: losses(trainable, batch, key)[0])
    among, alone = float(run(trainable, batch)), float(run(trainable, first))
    if not math.isclose(among, alone, rel_tol=1e-4, abs_tol=1e-5):
        raise UserError(f"the loss of an example depends on the others of its batch ({among:g} among others, {alone:g} "
                        "among copies of itself), so that clipping does not bound what one adds")  # fmt: skip
    if estimator == "vmap":
        return
    rows = batch["weight"].shape[0]

    def past_the_taps(trainable):
        spec = taps.Spec(rows, rows, "probe")
        tapped = jax.tree.map(lambda x: Tapped(x, jnp.zeros(x.shape, jnp.float32), spec), trainable)
        return jnp.sum(losses(tapped, batch, key))

    for path, gradient in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(past_the_taps))(trainable)):
        if jnp.any(gradient != 0):
            raise UserError(f"per-example gradients: something besides the operations of models/layers.py reads "
                            f"{path_str(path)}; use the estimator vmap")  # fmt: skip


def _unit_losses(
    losses: Losses, batch: Batch, key: jax.Array, how: Clipping
) -> tuple[Callable[[PyTree], jax.Array], jax.Array]:
    """Return f(trainable) -> l_U and which units are real."""
    weight_UK = batch["weight"].astype(jnp.float32).reshape(-1, how.rows)
    total_U = jnp.sum(weight_UK, axis=1)

    def run(trainable):
        loss_UK = losses(trainable, batch, key).astype(jnp.float32).reshape(-1, how.rows)
        weighted_UK = jnp.where(weight_UK > 0, weight_UK * loss_UK, 0.0)
        return jnp.sum(weighted_UK, axis=1) / jnp.where(total_U > 0, total_U, 1.0)

    return run, total_U > 0


def group_of(paths: list[str], groups: tuple[str, ...]) -> list[int]:
    """Return the group of every path. Raises UserError for a pattern that takes no leaf."""
    def first(path):
        return next((g for g, pattern in enumerate(groups) if re.fullmatch(pattern, path)), len(groups))

    found = [first(path) for path in paths]
    if empty := [pattern for g, pattern in enumerate(groups) if g not in found]:
        raise UserError(f"group pattern {empty[0]!r} takes no parameter that moves; paths look like {paths[0]!r}")
    return found


def _coefficients(
    square_leaf: list[jax.Array], group_leaf: list[int], real_U: jax.Array, bound: jax.Array, how: Clipping
) -> tuple[jax.Array, jax.Array]:
    """Return norms (G, U) and coefficients (G, U), 0 for units that are padding or not finite in any group."""
    count = max(group_leaf) + 1  # the last group may have no leaf, and then is none
    norm_GU = jnp.stack([
        jnp.sqrt(jnp.maximum(sum(s for s, g in zip(square_leaf, group_leaf, strict=True) if g == group), 0.0))
        for group in range(count)
    ])  # fmt: skip
    share = 1.0 / math.sqrt(count)
    if how.auto_s:
        c_GU = share / (norm_GU + AUTO_S_GAMMA)
    else:
        c_GU = jnp.minimum(1.0, share * bound / jnp.maximum(norm_GU, jnp.finfo(jnp.float32).tiny))
    finite_U = jnp.all(jnp.isfinite(norm_GU), axis=0)
    return norm_GU, jnp.where(real_U & finite_U, c_GU, 0.0)


def _groups(trainable: PyTree, how: Clipping) -> list[int]:
    return group_of([path_str(path) for path, _ in jax.tree_util.tree_leaves_with_path(trainable)], how.groups)


def _vmap(losses: Losses, trainable: PyTree, batch: Batch, key: jax.Array, bound: jax.Array, how: Clipping) -> Clipped:
    batch_UK = jax.tree.map(lambda x: x.reshape(-1, how.rows, *x.shape[1:]), batch)

    def one(batch_K):
        run, real_1 = _unit_losses(losses, batch_K, key, how)
        loss, grads = jax.value_and_grad(lambda trainable: run(trainable)[0])(trainable)
        return loss, grads, real_1[0]

    loss_U, grads_U, real_U = jax.vmap(one)(batch_UK)
    leaves, treedef = jax.tree.flatten(grads_U)
    square = [jnp.sum(jnp.square(x.astype(jnp.float32)), axis=range(1, x.ndim)) for x in leaves]
    group = _groups(trainable, how)
    norm_GU, c_GU = _coefficients(square, group, real_U, bound, how)
    total = [
        # scaling and then adding takes several times longer than a product
        jnp.tensordot(c_GU[g], jnp.where((c_GU[g] != 0).reshape(-1, *(1,) * (x.ndim - 1)), x, 0), axes=1)
        for x, g in zip(leaves, group, strict=True)
    ]
    return Clipped(treedef.unflatten(total), norm_GU, loss_U, real_U)


def _tapped(
    losses: Losses,
    trainable: PyTree,
    batch: Batch,
    key: jax.Array,
    bound: jax.Array,
    how: Clipping,
    *,
    second_pass: bool,
) -> Clipped:
    found = _tapped_once(losses, trainable, batch, key, bound, how, second_pass)

    # Of a unit that is not finite, 0 times its part is no 0: such a sum is made again, unit by unit. By the same taps:
    # were the others rounded in another way, one bad unit would change the parts of all. The loop takes no turn where
    # all is well, also for members side by side.
    def add(u, total):
        unit = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, u * how.rows, how.rows), batch)
        one = _tapped_once(losses, trainable, unit, key, bound, how, second_pass)
        good = jnp.all(jnp.isfinite(one.norm_GU))
        return jax.tree.map(lambda sum_, x: jnp.where(u == 0, 0, sum_) + jnp.where(good, x, 0), total, one.total)

    turns = jnp.where(jnp.all(jnp.isfinite(found.norm_GU)), 0, found.loss_U.shape[0])
    return found._replace(total=jax.lax.fori_loop(0, turns, add, found.total))


def _tapped_once(
    losses: Losses, trainable: PyTree, batch: Batch, key: jax.Array, bound: jax.Array, how: Clipping, second_pass: bool
) -> Clipped:
    """Return a sum that is worth nothing if a unit is not finite."""
    rows = batch["weight"].shape[0]
    units = rows // how.rows
    run, real_U = _unit_losses(losses, batch, key, how)
    leaves, treedef = jax.tree.flatten(trainable)
    plans = taps.plan(run, trainable, rows, units, second_pass)
    specs = [taps.Spec(rows, units, plan.form) for plan in plans]
    empty = [taps.zeros(plan, units) for plan in plans]
    group = _groups(trainable, how)

    # Nothing is differentiated by the parameters themselves: in half precision their cotangents would be rounded after
    # the sum over units, by more than what one unit may add.
    loss_U, pull = jax.vjp(lambda tap: run(treedef.unflatten(map(Tapped, leaves, tap, specs))), empty)
    (found,) = pull(jnp.ones_like(loss_U))
    square = [taps.squared_norm(plan, tap) for plan, tap in zip(plans, found, strict=True)]
    norm_GU, c_GU = _coefficients(square, group, real_U, bound, how)
    # A pass for every group gives the sums that the first one did not keep.
    again = [pull(c_U)[0] for c_U in c_GU] if any(plan.form == "norm" for plan in plans) else []
    total = [
        taps.second_sum(again[g][i]) if plan.form == "norm" else taps.weighted_sum(plan, found[i], c_GU[g])
        for i, (plan, g) in enumerate(zip(plans, group, strict=True))
    ]
    return Clipped(treedef.unflatten(total), norm_GU, loss_U, real_U)


ESTIMATORS: dict[str, Callable[..., Clipped]] = {
    "vmap": _vmap,
    "ghost": functools.partial(_tapped, second_pass=True),
    "bookkeep": functools.partial(_tapped, second_pass=False),
}
ESTIMATORS["auto"] = ESTIMATORS["bookkeep"]
