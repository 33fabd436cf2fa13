"""Equalized odds of a derived predictor: one linear program.

A derived predictor answers 1 with probability p[a, t] to an example of group a whose statistic is t. Its false positive
and true positive rates are linear in p, and so is the error, so the best p under equal rates is a linear program
(for two cells that of Hardt, Price and Srebro 2016; for the statistics of an ensemble derived here, in the manner of
FairSISA, arXiv 2312.07420, whose own formulas were not available to us).

Solved on the host in float64 by SciPy's HiGHS. dual.py solves the same program inside jit.
Shapes: N examples, A groups, Y classes (2), T cells, P columns of the program, M rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxforget import checks
from jaxforget.errors import RunError, UserError

# Every objective is sum over groups of scale[a, 0] * cost_fp * FPR_a - scale[a, 1] * cost_fn * TPR_a, but for a
# constant. The rows make scale_AY from the sizes n_AY of the groups' classes.
OBJECTIVES: dict[str, Callable[[Any], Any]] = {
    "error": lambda n_AY: n_AY / n_AY.sum(),  # P(output != label)
    "aif360": lambda n_AY: n_AY * 0 + 1,  # groups and classes alike, as in the package AIF360
    "pleiss": lambda n_AY: n_AY / n_AY.sum(axis=1, keepdims=True),  # the sum of the groups' error rates
}
CONSTRAINTS = {"odds": (0, 1), "opportunity": (1,)}  # the classes whose rates are to be equal
TINY = 1e-11  # a probability this close to 0 or 1 is rounding of the solver


def equalized_odds(
    count_AYT: np.ndarray,
    epsilon: float = 0.0,
    *,
    objective: str = "error",
    cost_fp: float = 1.0,
    cost_fn: float = 1.0,
    constraint: str = "odds",
    empty_AT: np.ndarray | float = 0.0,
    groups: Sequence[str] | None = None,
) -> np.ndarray:
    """Return the best probability_AT of output 1 whose rates differ between groups by at most epsilon, float64.

    count_AYT: weights of the examples of each group, class and cell. epsilon: bounds max - min over groups, for the
    false positive and the true positive rate each; "opportunity" bounds the true positive rate alone.
    empty_AT: for cells without data, which no rate depends on. groups: names for messages (default: the index).
    A vertex: at epsilon 0 at most 2 (A - 1) probabilities, empty cells aside, are neither 0 nor 1.
    Raises UserError for a group without one of the classes, and for settings out of range.
    """
    count_AYT = np.asarray(count_AYT, np.float64)
    check_settings(epsilon, objective, constraint, cost_fp, cost_fn)
    check_counts(count_AYT, groups)
    A, _, T = count_AYT.shape
    cost_AT, rate_AYT = program(count_AYT, objective, cost_fp, cost_fn)
    owner_P = np.repeat(np.arange(A), T)
    rate_YP = rate_AYT.transpose(1, 0, 2).reshape(2, A * T)
    solution_P = _highs(cost_AT.reshape(-1), rate_YP, owner_P, allowed(epsilon, constraint), mixtures=False)
    empty_AT = np.broadcast_to(np.asarray(empty_AT, np.float64), (A, T))
    return np.where(count_AYT.sum(axis=1) > 0, solution_P.reshape(A, T), empty_AT)


def score_thresholds(
    score_N: np.ndarray,
    label_N: np.ndarray,
    group_N: np.ndarray,
    epsilon: float = 0.0,
    *,
    objective: str = "error",
    cost_fp: float = 1.0,
    cost_fn: float = 1.0,
    constraint: str = "odds",
    groups: Sequence[str] | None = None,
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Return the best randomised thresholds of every group under the same constraints as `equalized_odds`.

    score_N: any finite numbers, larger for label 1. Returns (base_A, [threshold_J of a group], [weight_J of it]):
    output 1 has probability base plus the weights of the thresholds that the score reaches (score >= threshold), so
    it never falls as the score grows. Thresholds are scores of the group's own examples, and over all groups at most
    2 (A - 1) more are used than there are groups, "always" (base) and "never" (what is left of 1) included.
    """
    score_N, label_N, group_N = np.asarray(score_N), np.asarray(label_N), np.asarray(group_N)
    check_settings(epsilon, objective, constraint, cost_fp, cost_fn)
    if not np.all(np.isfinite(score_N)):
        raise UserError(f"score of example {int(np.argmin(np.isfinite(score_N)))} is not finite")
    A = int(group_N.max()) + 1 if groups is None else len(groups)
    n_AY = np.zeros((A, 2))
    np.add.at(n_AY, (group_N, label_N), 1.0)
    check_counts(n_AY[:, :, None], groups)
    thresholds, rates = [], []
    for a in range(A):
        score_J, cell_N = np.unique(score_N[group_N == a], return_inverse=True)
        count_YJ = np.zeros((2, len(score_J)))
        np.add.at(count_YJ, (label_N[group_N == a], cell_N), 1.0)
        reached_YJ = np.cumsum(count_YJ[:, ::-1], axis=1)[:, ::-1] / n_AY[a][:, None]
        thresholds.append(score_J)
        rates.append(np.append(reached_YJ, np.zeros((2, 1)), axis=1))  # the last column is "never"
    owner_P = np.repeat(np.arange(A), [rate_YJ.shape[1] for rate_YJ in rates])
    rate_YP = np.concatenate(rates, axis=1)
    scale_AY = OBJECTIVES[objective](n_AY)
    cost_P = cost_fp * scale_AY[owner_P, 0] * rate_YP[0] - cost_fn * scale_AY[owner_P, 1] * rate_YP[1]
    solution_P = _highs(cost_P, rate_YP, owner_P, allowed(epsilon, constraint), mixtures=True)
    base_A, used, weights = np.zeros(A), [], []
    for a, score_J in enumerate(thresholds):
        weight_J = solution_P[owner_P == a][:-1]
        base_A[a] = weight_J[0]  # the lowest threshold is reached by all
        kept_J = np.flatnonzero(weight_J[1:]) + 1
        used.append(score_J[kept_J])
        weights.append(weight_J[kept_J])
    return base_A, used, weights


def program(count_AYT: Any, objective: str, cost_fp: float, cost_fn: float) -> tuple[Any, Any]:
    """Return (cost_AT, rate_AYT): what p[a, t] = 1 adds to the objective and to the rates. NumPy or JAX arrays.

    A group's class without data has rate 0.
    """
    n_AY = count_AYT.sum(axis=-1)
    rate_AYT = count_AYT / (n_AY + (n_AY == 0))[..., None]
    scale_AY = OBJECTIVES[objective](n_AY)
    return cost_fp * scale_AY[:, :1] * rate_AYT[:, 0] - cost_fn * scale_AY[:, 1:] * rate_AYT[:, 1], rate_AYT


def allowed(epsilon: Any, constraint: str) -> tuple[Any, Any]:
    """Return the gaps allowed for label 0 and label 1; 1 is no constraint, since rates lie in [0, 1]."""
    first, second = (epsilon if y in CONSTRAINTS[constraint] else 1.0 for y in range(2))
    return first, second


def check_settings(epsilon: Any, objective: str, constraint: str, cost_fp: float, cost_fn: float) -> None:
    """Raise UserError for settings that are not valid, listing those that are. epsilon: a number or an array."""
    if not np.all((np.asarray(epsilon) >= 0) & (np.asarray(epsilon) <= 1)):
        raise UserError(f"epsilon is {epsilon}; it must be between 0 and 1")
    if objective not in OBJECTIVES:
        raise UserError(f"unknown objective {objective!r}; valid names are {', '.join(OBJECTIVES)}")
    if constraint not in CONSTRAINTS:
        raise UserError(f"unknown constraint {constraint!r}; valid names are {', '.join(CONSTRAINTS)}")
    checks.at_least(0, cost_fp=cost_fp, cost_fn=cost_fn)


def check_counts(count_AYT: np.ndarray, groups: Sequence[str] | None = None) -> None:
    """Raise UserError naming every group that lacks a class, ValueError for what are no counts."""
    if count_AYT.ndim != 3 or count_AYT.shape[1] != 2:
        raise ValueError(f"count_AYT has shape {count_AYT.shape}; it must be (groups, 2, cells)")
    if not np.all(np.isfinite(count_AYT) & (count_AYT >= 0)):
        raise ValueError("count_AYT has values that are negative or not finite")
    n_AY = count_AYT.sum(axis=-1)
    lacking = [f"group {groups[a] if groups else a!r} has no example of label {y}"
               for a, y in np.argwhere(n_AY == 0).tolist()]  # fmt: skip
    if lacking:
        raise UserError(f"{'; '.join(lacking)}: equalized odds needs both labels in every group; "
                        "leave the group out, give more data, or pool it")  # fmt: skip


def _highs(
    cost_P: np.ndarray,
    rate_YP: np.ndarray,
    owner_P: np.ndarray,
    allowed_Y: tuple[float, float],
    mixtures: bool,
) -> np.ndarray:
    """Minimise cost_P . p over p in [0, 1] whose rates lie in [t_y, t_y + allowed_y] for every group, t free.

    owner_P: the group whose rate a column adds to. mixtures: the columns of a group sum to 1.
    Rows M are (a, y): rate[a, y] - t_y - slack[a, y] = 0 with slack in [0, allowed_y].
    """
    from scipy.optimize import linprog

    A, P = int(owner_P.max()) + 1, len(owner_P)
    mine_AP = (owner_P[None] == np.arange(A)[:, None]).astype(np.float64)
    rate_MP = (mine_AP[:, None] * rate_YP[None]).reshape(2 * A, P)
    row_MP = np.concatenate([rate_MP, -np.tile(np.eye(2), (A, 1)), -np.eye(2 * A)], axis=1)
    right_M = np.zeros(2 * A)
    if mixtures:
        row_MP = np.concatenate([row_MP, np.pad(mine_AP, ((0, 0), (0, 2 + 2 * A)))])
        right_M = np.append(right_M, np.ones(A))
    bounds = [(0, 1)] * P + [(None, None)] * 2 + [(0, limit) for _ in range(A) for limit in allowed_Y]
    # The simplex method ends at a vertex, an interior point method would not.
    found = linprog(np.append(cost_P, np.zeros(2 + 2 * A)), A_eq=row_MP, b_eq=right_M, bounds=bounds,
                    method="highs-ds", options={"primal_feasibility_tolerance": 1e-10,
                                                "dual_feasibility_tolerance": 1e-10})  # fmt: skip
    if found.x is None:  # p = 0 is feasible, so this is the solver's failure, not the data's
        raise RunError(f"the linear program of equalized odds was not solved: {found.message}")
    p_P = found.x[:P]
    return np.where(p_P < TINY, 0.0, np.where(p_P > 1 - TINY, 1.0, p_P))
