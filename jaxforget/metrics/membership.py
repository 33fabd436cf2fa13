"""Membership inference: can one tell which texts a model was trained on? Shapes: N examples, T tokens.

Scores rise for texts less like training members. AUC is P(score of a non-member > score of a member), ties counted
half: 1 means memorised, 0.5 indistinguishable, below 0.5 over-unlearned. It is never folded at 0.5. The released
script of Yao et al. folds it, which hides over-unlearning.
"""

from __future__ import annotations

import numpy as np

from jaxforget.metrics.language import TokenScores

MIN_K = (20, 30, 40, 50, 60, 100)


def min_k_scores(scores: TokenScores, percent: float) -> np.ndarray:
    """Return, a sequence, minus the mean of its max(1, floor(K n)) lowest log p, nats (arXiv 2310.16789)."""
    result = []
    for logp_T, scored_T in zip(scores.logp_NT, scores.scored_NT, strict=True):
        logp = np.sort(logp_T[scored_T].astype(np.float64))
        # The product is rounded first: 0.3 * 10 is a hair below 3 in floating point.
        count = max(1, int(np.floor(round(percent * len(logp) / 100.0, 9))))
        result.append(-logp[:count].mean())
    return np.array(result)


def auc(members: np.ndarray, non_members: np.ndarray) -> float:
    """Return P(non-member score > member score) + P(equal) / 2."""
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([members, non_members]))
    above = ranks[len(members) :].sum() - len(non_members) * (len(non_members) + 1) / 2
    return float(above / (len(members) * len(non_members)))


def membership_aucs(members: TokenScores, non_members: TokenScores) -> dict[str, float]:
    """Return `mink<K>_auc` for the usual K and `loss_auc`, the mean loss of the whole sequence (equal to K = 100)."""
    result = {
        f"mink{percent}_auc": auc(min_k_scores(members, percent), min_k_scores(non_members, percent))
        for percent in MIN_K
    }
    return {**result, "loss_auc": result["mink100_auc"]}
