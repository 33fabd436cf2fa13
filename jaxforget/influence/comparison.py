"""Scores beside the truth: a row of the table for every method, and for what the truth reaches against itself."""

from __future__ import annotations

from typing import Any

from jaxforget.influence.agreement import agreement, correlation, lds, noise_ceiling
from jaxforget.influence.scores import Scores
from jaxforget.influence.truth import Truth


def compare(scores: Scores, truth: Truth, top: int) -> dict[str, Any]:
    """Give the row of a method: agreement with the mean truth over seeds, and with each query's."""
    scores_KQ, truth_KQ = scores.answer.scores_KQ, truth.influence_OKQ.mean(axis=0)
    row: dict[str, Any] = {"name": scores.method, **agreement(scores_KQ, truth_KQ, top)}
    row["lds"] = None
    if len(truth.kept_JK) > 2:
        row["lds"] = float(lds(scores_KQ, truth.kept_JK, truth.subset_OJQ.mean(axis=0)).mean())
    cost, whole = scores.answer.forward_tokens, truth.about.get("forward_tokens")
    row |= {"seconds": scores.seconds, "memory_gb": scores.memory_gb, "forward_tokens": cost,
            "cost_vs_truth": cost / whole if cost and whole else None}  # fmt: skip
    for q, query in enumerate(truth.queries):
        one = correlation(scores_KQ[:, q], truth_KQ[:, q])
        row |= {f"{field}_{query}": one[field] for field in ("pearson", "pearson_low", "pearson_high", "spearman")}
    return row


def ceilings(truth: Truth) -> list[dict[str, Any]]:
    """Give rows of what the truth reaches against itself: a perfect method, and another seed of retraining."""
    linear, ranked = noise_ceiling(truth.influence_OKQ), noise_ceiling(truth.influence_OKQ, ranks=True)
    cost = {"seconds": truth.about.get("seconds"), "forward_tokens": truth.about.get("forward_tokens")}
    return [
        {"name": "noise ceiling", "pearson": linear["ceiling"], "spearman": ranked["ceiling"], **cost,
         "cost_vs_truth": 1.0, "split_half": linear["split_half"], "reliability": linear["reliability"]},
        {"name": "truth, one seed against the others", "pearson": linear["one_vs_rest"],
         "spearman": ranked["one_vs_rest"]},
    ]  # fmt: skip
