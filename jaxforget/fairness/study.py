"""Fit every method on one set and report it on that and on another. Shapes: N records, K members."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxforget.fairness.metrics import bootstrap_metrics, group_metrics, interval
from jaxforget.fairness.predictor import Predictor, fit, probability, sample

SUMMARY = ("eo_max", "eo_avg", "eo_sum", "demographic_parity")


class Votes(NamedTuple):
    """What members say of a set, and what is true."""

    votes_NK: np.ndarray  # hard labels 0 or 1
    label_N: np.ndarray
    group_N: np.ndarray
    key_N: np.ndarray  # uint64, a digest of each id: what a random decision depends on


def compare(
    fitted: Votes,
    test: Votes,
    groups: Sequence[str],
    *,
    methods: Sequence[str],
    epsilons: Sequence[float],
    resamples: int,
    seed: int = 0,
    **settings: Any,
) -> list[tuple[dict[str, Any], Predictor]]:
    """Return a row and the predictor for every method and epsilon; "none", the plain majority vote, has no epsilon.

    Fields with `fit_` are of the set that was fitted on and flatter; those with `test_` count. Accuracies are percent,
    gaps shares. They are expectations over the predictor's randomness; `sampled` ones come from one draw of it.
    `_low` and `_high` bound the 95 % bootstrap interval over test records, `_noise` is half its width. `_change` is the
    difference from the plain majority vote, and its interval is paired: both are measured on the same resamples.
    """

    def resampled(predictor: Predictor) -> dict[str, np.ndarray]:
        probability_N = np.asarray(probability(predictor, test.votes_NK, test.group_N))
        return bootstrap_metrics(probability_N, test.label_N, test.group_N, len(groups), resamples=resamples, seed=seed)

    def fitted_by(method: str, epsilon: float) -> Predictor:
        return fit(method, fitted.votes_NK, fitted.label_N, fitted.group_N, tuple(groups), epsilon=epsilon, **settings)

    result, plain = [], fitted_by("none", 0.0)
    plain_row, plain_draws = _scores("test", plain, test, len(groups), seed), resampled(plain)
    for method in methods:
        for epsilon in (None,) if method == "none" else epsilons:
            predictor = fitted_by(method, epsilon or 0.0)
            row: dict[str, Any] = {"name": method if epsilon is None else f"{method} ε={epsilon:g}",
                                   "epsilon": epsilon}  # fmt: skip
            for prefix, votes in (("fit", fitted), ("test", test)):
                row |= _scores(prefix, predictor, votes, len(groups), seed)
            draws = resampled(predictor)
            for name, scale in (("accuracy", 100.0), *((name, 1.0) for name in SUMMARY)):
                field = f"test_{name}"
                low, high = interval(scale * draws[name])
                row |= {f"{field}_low": low, f"{field}_high": high, f"{field}_noise": (high - low) / 2}
                low, high = interval(scale * (draws[name] - plain_draws[name]))
                row |= {f"{field}_change": row[field] - plain_row[field],
                        f"{field}_change_low": low, f"{field}_change_high": high}  # fmt: skip
            result.append((row, predictor))
    return result


def _scores(prefix: str, predictor: Predictor, votes: Votes, groups: int, seed: int) -> dict[str, Any]:
    probability_N = probability(predictor, votes.votes_NK, votes.group_N)
    draw_N = (np.asarray(votes.key_N, np.uint64) >> np.uint64(32)).astype(np.uint32)
    drawn_N = sample(predictor, jax.random.key(seed), votes.votes_NK, votes.group_N, draw_N)
    expected = jax.device_get(group_metrics(probability_N, jnp.asarray(votes.label_N), votes.group_N, groups))
    sampled = jax.device_get(group_metrics(drawn_N, jnp.asarray(votes.label_N), votes.group_N, groups))
    row: dict[str, Any] = {f"{prefix}_accuracy": 100.0 * float(expected["accuracy"])}
    row |= {f"{prefix}_{name}": float(expected[name]) for name in SUMMARY}
    row |= {f"{prefix}_{name}_by_group": np.asarray(expected[f"{name}_A"]).tolist() for name in ("fpr", "tpr")}
    return row | {f"{prefix}_sampled_accuracy": 100.0 * float(sampled["accuracy"]),
                  f"{prefix}_sampled_eo_max": float(sampled["eo_max"])}  # fmt: skip
