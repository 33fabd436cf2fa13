"""Membership inference: can one tell which texts a model was trained on? Shapes: N examples, T tokens.

Scores rise for texts less like training members. AUC is P(score of a non-member > score of a member), ties counted
half: 1 means memorised, 0.5 indistinguishable, below 0.5 over-unlearned. It is never folded at 0.5. The released
script of Yao et al. folds it, which hides over-unlearning.
"""

from __future__ import annotations

import numpy as np

from jaxforget.errors import UserError
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


# ------------------------------------------------------------------------------------------- against retraining
def privleak(auc_mem: float, retrained: float) -> float:
    """Return 100 (A - A_ret) / A_ret with A = 1 - AUC, in percent (MUSE, arXiv 2407.06460).

    0 is retraining, -100 everything memorised, above 0 over-unlearned. Raises UserError where A_ret is about 0: a
    retrained model that tells members from non-members has seen them, or the two sets differ in kind.
    """
    if not 1.0 - retrained > 0.01:
        raise UserError(f"PrivLeak divides by 1 - AUC of the retrained model, whose AUC is {retrained:.4g}")
    return 100.0 * (retrained - auc_mem) / (1.0 - retrained)


def auc_ci95(members: np.ndarray, non_members: np.ndarray) -> float:
    """Return half the 95 % interval of `auc` over texts (DeLong et al. 1988); 0 for one text of a kind."""
    from scipy.stats import rankdata

    m, n = len(members), len(non_members)
    if min(m, n) < 2:
        return 0.0
    ranks = rankdata(np.concatenate([members, non_members]))
    beaten_m = 1.0 - (ranks[:m] - rankdata(members)) / n  # share of non-members above each member
    beats_n = (ranks[m:] - rankdata(non_members)) / m
    return float(1.96 * np.sqrt(beaten_m.var(ddof=1) / m + beats_n.var(ddof=1) / n))
