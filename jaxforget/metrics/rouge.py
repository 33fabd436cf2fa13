"""ROUGE-L: the longest common subsequence of words. A thin door to rouge-score, the package of published numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def rouge_l(references: Sequence[str], written: Sequence[str], *, stem: bool) -> dict[str, np.ndarray]:
    """Return recall and f1 of every pair, in [0, 1], (N,). stem: Porter stems, as TOFU does and MUSE does not."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=stem)
    scores = [scorer.score(one, other)["rougeL"] for one, other in zip(references, written, strict=True)]
    return {"recall": np.asarray([s.recall for s in scores]), "f1": np.asarray([s.fmeasure for s in scores])}
