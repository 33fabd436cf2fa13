"""Attack a private run from inside: a lower bound on its epsilon that holds with 95 % confidence.

A bound above the epsilon that the accountant states proves a defect. A bound below proves nothing.
Letters: M canaries, D parameters, T steps, U units of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def epsilon_bound(
    scores_M: np.ndarray, included_M: np.ndarray, *, guesses: int, delta: float, confidence: float = 0.95
) -> float:
    """Bound epsilon from below after one run with M canaries, each included by its own fair coin.

    scores_M: the higher, the more likely included; computed without looking at included_M. The `guesses` / 2 canaries
    of the highest scores are guessed to be in, as many of the lowest to be out; the others are abstained on. `guesses`
    must be chosen before the run. Canaries may share a run or have one each.
    Source: arXiv 2305.08846, Algorithm 1 and the main theorem for approximate DP.
    """
    scores_M, included_M = np.asarray(scores_M), np.asarray(included_M, bool)
    if not 2 <= guesses <= len(scores_M) or guesses % 2:
        raise ValueError(f"guesses is {guesses}; it must be even, from 2 to the number of canaries, {len(scores_M)}")
    ranked = np.argsort(scores_M, kind="stable")
    half = guesses // 2
    correct = int(included_M[ranked[-half:]].sum() + (~included_M[ranked[:half]]).sum())
    low, high = 0.0, 50.0
    if p_value(low, correct, guesses, len(scores_M), delta) > 1 - confidence:
        return 0.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        rejected = p_value(middle, correct, guesses, len(scores_M), delta) <= 1 - confidence
        low, high = (middle, high) if rejected else (low, middle)
    return low


def p_value(epsilon: float, correct: int, guesses: int, canaries: int, delta: float) -> float:
    """Bound the probability of at least `correct` right guesses under (epsilon, delta)-DP.

    With W ~ Binomial(guesses, e^epsilon / (1 + e^epsilon)) it is
    P[W >= correct] + 2 canaries delta max_{i >= 1} P[correct > W >= correct - i] / i.
    """
    from scipy.stats import binom

    right = binom(guesses, 1 / (1 + np.exp(-epsilon)))
    below = np.cumsum(right.pmf(np.arange(correct - 1, -1, -1)))  # P[correct > W >= correct - i], i = 1, 2, ...
    slope = (below / np.arange(1, correct + 1)).max(initial=0.0)
    return float(min(1.0, right.sf(correct - 1) + 2 * canaries * delta * slope))


def canary_scores(released_TD: np.ndarray, directions_MD: Any) -> np.ndarray:
    """Score canaries by how far the noisy gradient sums went along their own gradients, (M,).

    released_TD: what each step released, before the optimizer. directions_MD: canary gradients, near orthogonal, dense
    or a scipy.sparse matrix. The white-box attack of arXiv 2305.08846.
    """
    return directions_MD @ np.asarray(released_TD, np.float64).sum(axis=0)


def sensitivity(clipped_sum: Callable[[np.ndarray], Any], units: int) -> float:
    """Measure how far removing one unit moves a clipped sum, the most over the units of a batch.

    clipped_sum(real_U) gives the sum, a pytree, over the units marked in a bool mask. Must not exceed C.
    """
    import jax

    def flat(real_U: np.ndarray) -> np.ndarray:
        leaves = jax.tree.leaves(clipped_sum(real_U))
        return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in leaves])

    everyone = np.ones(units, bool)
    whole = flat(everyone)
    return max(float(np.linalg.norm(whole - flat(everyone & (np.arange(units) != u)))) for u in range(units))
