"""Equalized odds inside jit: the dual of the linear program of odds.py, many programs at once.

The dual has a multiplier for each group and class, and over groups these sum to 0. Given them, every probability is
decided: 1 where cost[a, t] < sum_y multiplier[a, y] rate[a, y, t], 0 where greater, free where equal. The dual function
is concave and piecewise linear. We climb it from vertex to vertex, each time to the best point of an edge, past all
kinks that still pay. In the terms of linear programming this is the dual simplex method with bound flipping: every
column is boxed, so every basis is feasible in the dual, and no first phase is needed. Why this and no gradient or
interior point method: it ends at a vertex, exact but for rounding, after a few steps of small dense algebra of fixed
shape, and has no start, step size or tolerance to choose. The probabilities that are free come with the vertex: they
are the columns of the basis, and solving for them makes the rates equal.

Derived from the program as odds.py states it. Shapes: A groups, Y classes (2), T cells, R programs, x any axes in
front, M rows (a, y) of the program, C its columns: P of p[a, t], then t_y, then slack[a, y].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxforget.fairness.odds import allowed, check_settings, program

FREE = 2.0  # t_y lies strictly between -FREE and FREE whatever the data, so that no bound ever holds it
AT_ONCE = 1 << 20  # probabilities of the programs that are solved side by side, at most
FEWEST = 32  # programs that are solved side by side, unless that is too many probabilities
GOLDEN = 0.6180339887498949  # the fractions of its multiples are all different


class Solution(NamedTuple):
    """An optimum. value - bound is its certificate: no predictor has a value below bound."""

    probability_xAT: jax.Array
    multiplier_xAY: jax.Array
    value_x: jax.Array  # what p adds to the objective of p = 0, so at most 0: its "error" is value + cost_fn P(Y = 1)
    bound_x: jax.Array  # the dual function at the multipliers


def solve_many(
    count_xAYT: np.ndarray,
    epsilon_x: np.ndarray | float = 0.0,
    *,
    objective: str = "error",
    cost_fp: float = 1.0,
    cost_fn: float = 1.0,
    constraint: str = "odds",
    empty_AT: np.ndarray | float = 0.0,
) -> Solution:
    """Solve a program for every leading index, on JAX's default device; the solution is NumPy arrays.

    epsilon_x: broadcast against the leading axes of the counts, so counts of shape (R, 1, A, 2, T) and 3 epsilons give
    R x 3 programs. Other arguments as of odds.equalized_odds. float64 whatever JAX's default: in float32 rates are
    equal to about 1e-5 only. A program in which a group lacks a class has no solution and is NaN throughout.
    """
    check_settings(epsilon_x, objective, constraint, cost_fp, cost_fn)
    count_xAYT = np.asarray(count_xAYT, np.float64)
    if count_xAYT.ndim < 3 or count_xAYT.shape[-2] != 2:
        raise ValueError(f"count_xAYT has shape {count_xAYT.shape}; it must be (…, groups, 2, cells)")
    A, _, T = count_xAYT.shape[-3:]
    shape = np.broadcast_shapes(count_xAYT.shape[:-3], np.shape(epsilon_x))
    programs = int(np.prod(shape))
    # Programs that run side by side wait for the slowest one: in batches they wait less, and take less memory. Sizes
    # are powers of 2 from FEWEST on, so that few are compiled; copies of the last program fill the last batch up.
    largest = max(AT_ONCE // (A * T), 1).bit_length() - 1
    batch = 1 << min((max(programs, FEWEST) - 1).bit_length(), largest)
    index_R = np.minimum(np.arange(-(-programs // batch) * batch), programs - 1)
    count_RAYT = np.broadcast_to(count_xAYT, (*shape, A, 2, T)).reshape(-1, A, 2, T)
    epsilon_R = np.broadcast_to(np.asarray(epsilon_x, np.float64), shape).reshape(-1)
    empty_AT = np.broadcast_to(np.asarray(empty_AT, np.float64), (A, T))
    run = _compiled(objective, cost_fp, cost_fn, constraint)
    with jax.enable_x64(True):
        found = [jax.device_get(run(count_RAYT[some], epsilon_R[some], empty_AT))
                 for some in index_R.reshape(-1, batch)]  # fmt: skip
    parts = (np.concatenate(part)[:programs] for part in zip(*found, strict=True))
    return Solution(*(part.reshape((*shape, *part.shape[1:])) for part in parts))


@functools.cache
def _compiled(objective: str, cost_fp: float, cost_fn: float, constraint: str) -> Callable[..., Any]:
    def one(count_AYT, epsilon, empty_AT):
        return solve(count_AYT, epsilon, objective=objective, cost_fp=cost_fp, cost_fn=cost_fn, constraint=constraint,
                     empty_AT=empty_AT)  # fmt: skip

    return jax.jit(jax.vmap(one, in_axes=(0, 0, None)))


def solve(
    count_AYT: jax.Array,
    epsilon: jax.Array | float = 0.0,
    *,
    objective: str = "error",
    cost_fp: float = 1.0,
    cost_fn: float = 1.0,
    constraint: str = "odds",
    empty_AT: jax.Array | float = 0.0,
) -> Solution:
    """Solve one program in JAX's default float type. Inside jit and vmap, over epsilon too.

    Arguments as of odds.equalized_odds, but unchecked. A group that lacks a class makes everything NaN. In float64 as
    exact as HiGHS; in float32 the objective is right to about 1e-6 and rates are equal to about 1e-5.
    """
    with jax.default_matmul_precision("highest"):  # an accelerator's default has 3 digits
        count_AYT = jnp.asarray(count_AYT, jnp.result_type(float))
        cost_AT, rate_AYT = program(count_AYT, objective, cost_fp, cost_fn)
        allowed_Y = jnp.stack([jnp.asarray(limit, count_AYT.dtype) for limit in allowed(epsilon, constraint)])
        p_AT, price_AY = _climb(cost_AT, rate_AYT, allowed_Y)
        p_AT = jnp.clip(p_AT, 0, 1)
        price_AY = price_AY - jnp.mean(price_AY, axis=0, keepdims=True)  # they sum to 0; now to the last digit
        reduced_AT = cost_AT - jnp.einsum("ayt,ay->at", rate_AYT, price_AY)
        bound = jnp.sum(jnp.minimum(reduced_AT, 0)) - jnp.sum(allowed_Y * jnp.sum(jnp.abs(price_AY), axis=0)) / 2
        value = jnp.sum(cost_AT * p_AT)
    empty_AT = jnp.broadcast_to(jnp.asarray(empty_AT, p_AT.dtype), p_AT.shape)
    p_AT = jnp.where(jnp.sum(count_AYT, axis=1) > 0, p_AT, empty_AT)
    lacking = jnp.any(jnp.sum(count_AYT, axis=2) == 0)
    return jax.tree.map(lambda part: jnp.where(lacking, jnp.nan, part), Solution(p_AT, price_AY, value, bound))


def _climb(cost_AT: jax.Array, rate_AYT: jax.Array, allowed_Y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the optimal p_AT and multiplier_AY. The rows are rate[a, y] - t_y - slack[a, y] = 0."""
    A, T = cost_AT.shape
    M, P, C = 2 * A, A * T, A * T + 2 + 2 * A
    real = cost_AT.dtype
    tiny = jnp.finfo(real).eps
    low_C = jnp.concatenate([jnp.zeros(P, real), jnp.full(2, -FREE, real), jnp.zeros(M, real)])
    high_C = jnp.concatenate([jnp.ones(P, real), jnp.full(2, FREE, real), jnp.tile(allowed_Y, A)])
    true_C = jnp.concatenate([cost_AT.reshape(P), jnp.zeros(2 + M, real)])
    # Cells of equal likelihood ratio tie, and ties could make the method go in circles. Costs that are off by some
    # 1e-10 of a cell's rates (4e-6 in float32) break ties and move the optimum by no more than that.
    unequal_AT = jnp.asarray(np.modf(np.arange(1, P + 1) * GOLDEN)[0].reshape(A, T), real)
    broken_AT = cost_AT + 0.01 * jnp.sqrt(tiny) * unequal_AT * jnp.sum(rate_AYT, axis=1)
    cost_C = true_C.at[:P].set(broken_AT.reshape(P))

    def times_rows(value_C):  # rows @ value
        rate_AY = jnp.einsum("ayt,at->ay", rate_AYT, value_C[:P].reshape(A, T))
        return (rate_AY - value_C[None, P : P + 2]).reshape(M) - value_C[P + 2 :]

    def times_columns(price_M):  # price @ rows
        price_AY = price_M.reshape(A, 2)
        priced_AT = jnp.einsum("ayt,ay->at", rate_AYT, price_AY)
        return jnp.concatenate([priced_AT.reshape(P), -jnp.sum(price_AY, axis=0), -price_M])

    def step(state):
        basis_M, upper_C, inverse_MM, _, _, steps = state
        chosen_MC = basis_M[:, None] == jnp.arange(C)[None]
        basic_C = jnp.any(chosen_MC, axis=0)
        columns_MM = jax.vmap(times_rows, out_axes=1)(chosen_MC.astype(real))
        # A Newton step: it squares what error the updates of the inverse have left.
        inverse_MM = inverse_MM @ (2 * jnp.eye(M, dtype=real) - columns_MM @ inverse_MM)
        reduced_C = cost_C - times_columns(cost_C[basis_M] @ inverse_MM)
        # The sign of a reduced cost says which bound a column is at, except where it is 0 but for rounding.
        clear_C = jnp.abs(reduced_C) > 8 * tiny * jnp.max(jnp.abs(cost_C))
        upper_C = jnp.where(clear_C, reduced_C < 0, upper_C)
        at_bound_C = jnp.where(basic_C, 0, jnp.where(upper_C, high_C, low_C))
        value_M = -(inverse_MM @ times_rows(at_bound_C))
        value_C = at_bound_C + value_M @ chosen_MC

        below_M, above_M = low_C[basis_M] - value_M, value_M - high_C[basis_M]
        outside_M = jnp.maximum(below_M, above_M)
        r = jnp.argmax(outside_M)  # the row whose column leaves the basis
        above = above_M[r] > below_M[r]
        # Along this edge the dual rises by outside_M[r] per unit, and by |rise| * (high - low) less after each kink.
        rise_C = times_columns(inverse_MM[r]) * jnp.where(above, 1, -1)
        meets_C = ~basic_C & (high_C > low_C) & (jnp.where(upper_C, -rise_C, rise_C) > 1e3 * tiny)
        kink_C = jnp.where(meets_C, jnp.maximum(reduced_C / jnp.where(meets_C, rise_C, 1), 0), jnp.inf)
        loss_C = jnp.where(meets_C, jnp.abs(rise_C) * (high_C - low_C), 0)
        _, loss_C, order_C = jax.lax.sort((kink_C, loss_C, jnp.arange(C)), num_keys=1)
        place = jnp.argmax(jnp.cumsum(loss_C) >= outside_M[r])  # the kink after which it falls
        entering = order_C[place]
        done = ~(outside_M[r] > 64 * tiny) | ~meets_C[entering]  # so written, NaN is done too

        upper_C = upper_C.at[order_C].set(upper_C[order_C] ^ (jnp.arange(C) < place))
        upper_C = jnp.where(chosen_MC[r], above, upper_C)
        column_M = inverse_MM @ times_rows((jnp.arange(C) == entering).astype(real))
        row_M = inverse_MM[r] / column_M[r]
        left_M = jnp.arange(M) == r
        updated_MM = jnp.where(left_M[:, None], row_M[None], inverse_MM - column_M[:, None] * row_M[None])
        basis_M = jnp.where(left_M & ~done, entering, basis_M)
        return basis_M, upper_C, jnp.where(done, inverse_MM, updated_MM), value_C, done, steps + 1

    # From the slacks as basis: all multipliers are 0, and every cell is decided by its cost alone.
    start = (jnp.arange(P + 2, C), cost_C < 0, -jnp.eye(M, dtype=real), low_C, jnp.asarray(False), jnp.asarray(0))
    most = 50 * M + 2 * C  # many times what any test takes; were it reached, the certificate would show it
    basis_M, _, inverse_MM, value_C, _, _ = jax.lax.while_loop(lambda state: ~state[4] & (state[5] < most), step, start)
    return value_C[:P].reshape(A, T), (true_C[basis_M] @ inverse_MM).reshape(A, 2)
