"""Judge a model against retraining: one row of the results table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxforget.data.tokens import Examples
from jaxforget.metrics.language import language_metrics, token_scores
from jaxforget.metrics.membership import MIN_K, membership_aucs
from jaxforget.models import Model, Params

SETS = ("forget", "approximate", "retain", "general")
LANGUAGE = ("nll", "perplexity", "token_perplexity", "accuracy")
AUCS = tuple(f"mink{percent}_auc" for percent in MIN_K) + ("loss_auc",)
METRICS = tuple(f"{name}_{metric}" for name in SETS for metric in LANGUAGE) + AUCS
COST = ("seconds", "train_tokens", "tokens_per_second", "train_flops", "flops_vs_retraining", "steps")


def score(model: Model, params: Params, sets: Mapping[str, Examples]) -> dict[str, Any]:
    """Return every metric of METRICS for one model; null where its set is not given.

    Units: *_nll nats a token, *_accuracy percent, *_auc in [0, 1] with forget as members and approximate as
    non-members.
    """
    row: dict[str, Any] = dict.fromkeys(METRICS)
    scores = {name: token_scores(model, params, examples) for name, examples in sets.items()}
    for name, one in scores.items():
        row.update({f"{name}_{metric}": value for metric, value in language_metrics(one).items()})
    if "forget" in scores and "approximate" in scores:
        row.update(membership_aucs(scores["forget"], scores["approximate"]))
    return row


def gaps(row: Mapping[str, Any], retrained: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return `<metric>_gap` = row - retrained for every metric, and their summary `gap_to_retrained`.

    gap_to_retrained: mean over the known sets of |nll - nll of the retrained model|, nats a token. 0 is the goal.
    """
    result: dict[str, Any] = {}
    for metric in METRICS:
        one, other = row[metric], retrained and retrained[metric]
        result[f"{metric}_gap"] = None if one is None or other is None else one - other
    distances = [abs(result[f"{name}_nll_gap"]) for name in SETS if result[f"{name}_nll_gap"] is not None]
    result["gap_to_retrained"] = sum(distances) / len(distances) if distances else None
    return result
