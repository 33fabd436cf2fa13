"""How well scores agree with the truth, and how well the truth agrees with itself.

Correlations are over the K datasets, for each query and then averaged over queries. With K = 8, p < 0.05 needs
|r| > 0.71; with 32 it needs 0.35. So intervals stand beside every number, and the noise ceiling beside all of them.
Shapes: K datasets, Q queries, O seeds, J subsets of datasets.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from scipy import stats

SPLITS = 200  # at most so many ways to split seeds in halves are tried


def correlation(estimate_K: np.ndarray, truth_K: np.ndarray) -> dict[str, float]:
    """Return pearson and spearman with 95 % intervals and Pearson's p value; NaN where one side is constant.

    Intervals are Fisher's; that of Spearman has the variance (1 + r^2 / 2) / (K - 3) of Bonett and Wright (2000).
    """
    K = len(estimate_K)
    known = np.isfinite(estimate_K).all() and np.isfinite(truth_K).all()
    if K < 2 or not known or np.ptp(estimate_K) == 0 or np.ptp(truth_K) == 0:
        return dict.fromkeys(("pearson", "pearson_low", "pearson_high", "pearson_p", "spearman", "spearman_low",
                              "spearman_high"), math.nan)  # fmt: skip
    linear, ranked = stats.pearsonr(estimate_K, truth_K), float(stats.spearmanr(estimate_K, truth_K).statistic)
    low, high = linear.confidence_interval(0.95) if K > 3 else (-1.0, 1.0)
    half = stats.norm.ppf(0.975) * math.sqrt((1 + ranked**2 / 2) / (K - 3)) if K > 3 else math.inf
    center = math.atanh(np.clip(ranked, -1 + 1e-12, 1 - 1e-12))
    return {
        "pearson": float(linear.statistic), "pearson_low": float(low), "pearson_high": float(high),
        "pearson_p": float(linear.pvalue), "spearman": ranked, "spearman_low": math.tanh(center - half),
        "spearman_high": math.tanh(center + half),
    }  # fmt: skip


def columns_correlate(estimate_KQ: np.ndarray, truth_KQ: np.ndarray, ranks: bool = False) -> np.ndarray:
    """Return the correlation of every column, (..., Q); NaN where a column is constant."""
    if ranks:
        estimate_KQ, truth_KQ = stats.rankdata(estimate_KQ, axis=-2), stats.rankdata(truth_KQ, axis=-2)
    x = estimate_KQ - estimate_KQ.mean(axis=-2, keepdims=True)
    y = truth_KQ - truth_KQ.mean(axis=-2, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum(axis=-2) / np.sqrt((x**2).sum(axis=-2) * (y**2).sum(axis=-2))


def mean_interval(estimate_KQ: np.ndarray, truth_KQ: np.ndarray, ranks: bool, draws: int = 1000) -> tuple[float, float]:
    """Return the 95 % percentile-bootstrap interval of the mean correlation over queries: datasets are drawn anew."""
    K = len(estimate_KQ)
    if K < 4:
        return math.nan, math.nan
    drawn_DK = np.random.default_rng(0).integers(K, size=(draws, K))
    with np.errstate(invalid="ignore"):
        means_D = columns_correlate(estimate_KQ[drawn_DK], truth_KQ[drawn_DK], ranks).mean(axis=-1)
    low, high = np.nanpercentile(means_D, [2.5, 97.5])  # a draw of one dataset alone has no correlation
    return float(low), float(high)


def agreement(scores_KQ: np.ndarray, truth_KQ: np.ndarray, top: int = 3) -> dict[str, float]:
    """Return means over queries of what compares scores with the truth.

    pearson, spearman with the bootstrap's _low and _high; sign: percent of scores with the sign of the truth, raw and
    after taking each query's mean over datasets from both, since in a truth of fixed steps every dataset left out is
    replaced by more of the others, which shifts all of its signs; top_recall: share of the `top` most helpful datasets
    of the truth among those of the scores, in percent.
    """
    top = min(top, len(truth_KQ))
    fields = ("pearson", "pearson_low", "pearson_high", "spearman", "spearman_low", "spearman_high")
    if not np.isfinite(scores_KQ).all():  # a model that collapsed is not compared
        return dict.fromkeys((*fields, "sign", "sign_centred", "top_recall"), math.nan)
    result: dict[str, float] = {}
    for name, ranks in (("pearson", False), ("spearman", True)):
        result[name] = float(columns_correlate(scores_KQ, truth_KQ, ranks).mean())
        result[f"{name}_low"], result[f"{name}_high"] = mean_interval(scores_KQ, truth_KQ, ranks)
    for name, (one, other) in {
        "sign": (scores_KQ, truth_KQ),
        "sign_centred": (scores_KQ - scores_KQ.mean(axis=0), truth_KQ - truth_KQ.mean(axis=0)),
    }.items():
        result[name] = 100.0 * float((np.sign(one) == np.sign(other)).mean())
    best = [[set(np.argsort(-x)[:top]) for x in side.T] for side in (scores_KQ, truth_KQ)]
    result["top_recall"] = 100.0 * float(np.mean([len(a & b) / top for a, b in zip(*best, strict=True)]))
    return result


def lds(scores_KQ: np.ndarray, kept_JK: np.ndarray, losses_JQ: np.ndarray) -> np.ndarray:
    """Return the dataset-level linear datamodeling score of every query: Spearman over random subsets.

    A subset's prediction is the sum of the scores it holds. Losses are negated, for what helps lowers them
    (arXiv 2303.14186, section 2, with datasets in place of examples).
    """
    return columns_correlate(kept_JK.astype(np.float64) @ scores_KQ, -losses_JQ, ranks=True)


def noise_ceiling(truth_OKQ: np.ndarray, ranks: bool = False) -> dict[str, Any]:
    """Say how well the truth of some seeds tells that of others: a method cannot be seen to do better.

    one_vs_rest: correlation of a seed with the mean of the others. split_half: of the means of two disjoint halves of
    the seeds, averaged over splits. reliability: that of the mean of all O seeds, O r / (h + (O - h) r) by Spearman and
    Brown for halves of h seeds. ceiling: its root, the expected correlation of a perfect method with the mean truth.
    Correlations are means over queries, before reliability and root are taken: the ceiling is exact where queries are
    equally noisy, and an upper bound where they differ, for the root is concave. Null with one seed.
    """
    O = len(truth_OKQ)  # noqa: E741
    if O < 2:
        return dict.fromkeys(("one_vs_rest", "split_half", "reliability", "ceiling"))

    def mean(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.nanmean(columns_correlate(one, other, ranks)))

    rest = [mean(truth_OKQ[o], np.delete(truth_OKQ, o, axis=0).mean(axis=0)) for o in range(O)]
    h = O // 2
    halves = [
        (one, other)
        for one in itertools.islice(itertools.combinations(range(O), h), SPLITS)
        for other in itertools.islice(itertools.combinations(sorted(set(range(O)) - set(one)), h), SPLITS)
        if one < other
    ][:SPLITS]
    split = float(np.mean([mean(truth_OKQ[list(a)].mean(axis=0), truth_OKQ[list(b)].mean(axis=0)) for a, b in halves]))
    reliability = O * split / (h + (O - h) * split) if split > -1 else math.nan
    return {"one_vs_rest": float(np.mean(rest)), "split_half": split, "reliability": reliability,
            "ceiling": math.sqrt(max(reliability, 0.0))}  # fmt: skip
