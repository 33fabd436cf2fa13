"""How much of an answer a model still has by heart. Shapes: N items, T tokens.

Exact memorisation, extraction strength and ParaProb as in OpenUnlearning (arXiv 2506.12618). Its code takes the last
token of an answer for EOS and drops it from the first two (`without_last`). Where even the last token is wrong its
extraction strength is 1/n, not 0; of an empty answer it is 0, where ours is NaN and left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxforget.data.sources import Record
from jaxforget.metrics import tofu
from jaxforget.metrics.composite import estimate, memorisation
from jaxforget.metrics.evidence import Evidence, Reader, Request, mean_losses
from jaxforget.metrics.language import TokenScores


def exact_memorisation(scores: TokenScores) -> np.ndarray:
    """Return the share of scored tokens that equal the teacher-forced argmax, (N,); NaN where a loss is no number."""
    count_N = scores.scored_NT.sum(axis=1)
    right_N = (scores.correct_NT & scores.scored_NT).sum(axis=1)
    return np.where((count_N > 0) & ~_broken(scores), right_N / np.maximum(count_N, 1), np.nan)


def extraction_strength(scores: TokenScores) -> np.ndarray:
    """Return 1 - k / n, (N,): k the fewest tokens after which the argmax gives all the others right, n all tokens.

    NaN where a loss is no number: a model that is destroyed has not forgotten.
    """
    result = np.full(len(scores.scored_NT), np.nan)
    for n, (correct_T, scored_T) in enumerate(zip(scores.correct_NT, scores.scored_NT, strict=True)):
        correct = np.asarray(correct_T)[scored_T]
        if len(correct):
            result[n] = np.logical_and.accumulate(correct[::-1]).sum() / len(correct)
    return np.where(_broken(scores), np.nan, result)


def _broken(scores: TokenScores) -> np.ndarray:
    return np.any(scores.scored_NT & np.isnan(scores.logp_NT), axis=1)


def without_last(scores: TokenScores) -> TokenScores:
    """Leave the last scored token of every row out."""
    last_NT = np.cumsum(scores.scored_NT[:, ::-1], axis=1)[:, ::-1] == 1
    return scores._replace(scored_NT=scores.scored_NT & ~last_NT)


# ---------------------------------------------------------------------------------------------------- the metric
def ask(reader: Reader, sets: Mapping[str, list[Record]], options: Any) -> Request:
    """Ask for the forget set, and where its records have them for paraphrased and wrong answers."""
    return tofu.ask_ratios(reader, "forget", sets["forget"])


def measure(evidence: Evidence, reader: Reader, sets: Mapping[str, list[Record]], options: Any) -> dict[str, Any]:
    """Return em, es, paraprob and truth (T3) of every item."""
    scores = evidence.scored["forget"].scores
    scores = without_last(scores) if options.drop_last else scores
    items: dict[str, Any] = {"em": exact_memorisation(scores), "es": extraction_strength(scores)}
    if paraphrased := evidence.scored.get("forget paraphrased"):
        items["paraprob"] = np.exp(-mean_losses(paraphrased, sets["forget"]))
        if ratios := tofu.ratios_of(evidence, "forget", sets["forget"]):
            items["truth"] = tofu.truth_share(ratios["log_t2"])
    return items


def summarise(items: Mapping[str, Any], retrained: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the means, and `memorisation`: the harmonic mean of 1 - them, 1 for a model that has nothing by heart."""
    row: dict[str, Any] = {"memorisation": None}
    for name in ("em", "es", "paraprob", "truth"):
        row |= estimate(name, items.get(name, ()))
    known = [row[name] for name in ("es", "em", "paraprob", "truth")]
    return row | ({"memorisation": memorisation(*known)} if None not in known else {})
