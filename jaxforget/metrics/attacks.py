"""Membership attacks on a model: one score a text, higher for texts less like training members. Shapes: N texts.

The forget set are the members, never-trained texts of the same kind the non-members. Formulas as in OpenUnlearning
(arXiv 2506.12618); Min-K drops no token unless `without_last` says so.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxforget.data.sources import Record
from jaxforget.metrics.composite import harmonic_mean, noted, smia
from jaxforget.metrics.evidence import Evidence, Reader, Request, Scored
from jaxforget.metrics.language import TokenScores
from jaxforget.metrics.membership import auc, auc_ci95, min_k_scores, privleak
from jaxforget.metrics.memorisation import without_last

PERCENT = 40  # of Min-K
SIDES = ("forget", "approximate")


def loss(scored: Scored, reader: Reader, drop_last: bool) -> np.ndarray:
    """Nats a token."""
    return lowest(scored.scores, 100)


def zlib_ratio(scored: Scored, reader: Reader, drop_last: bool) -> np.ndarray:
    """Nats a token over the bytes that zlib (level 6) makes of the scored text."""
    size_N = [len(zlib.compress(text.encode())) for text in scored.texts(reader.tokenizer)]
    return lowest(scored.scores, 100) / np.asarray(size_N)


def min_k(scored: Scored, reader: Reader, drop_last: bool) -> np.ndarray:
    """Minus the mean of the 40 % lowest log p (arXiv 2310.16789)."""
    return lowest(without_last(scored.scores) if drop_last else scored.scores, PERCENT)


def min_kpp(scored: Scored, reader: Reader, drop_last: bool) -> np.ndarray:
    """The same on log p standardised by the model's own distribution at each token (arXiv 2404.02936)."""
    scores = scored.scores._replace(logp_NT=scored.z_NT)
    return lowest(without_last(scores) if drop_last else scores, PERCENT)


ATTACKS = {"loss": loss, "zlib": zlib_ratio, "min_k": min_k, "min_kpp": min_kpp}
PRIVACY = tuple(ATTACKS)  # what Privacy joins
# gradnorm: L2 norm of the gradient of the loss, mean over parameter tensors. reference: loss - that of another model.
EXTRA = ("gradnorm", "reference")


def lowest(scores: TokenScores, percent: float) -> np.ndarray:
    """Return `min_k_scores`; NaN for texts without a token."""
    result, some_N = np.full(len(scores.scored_NT), np.nan), scores.scored_NT.any(axis=1)
    result[some_N] = min_k_scores(TokenScores(*(x[some_N] for x in scores)), percent)
    return result


# ---------------------------------------------------------------------------------------------------- the metric
def ask(reader: Reader, sets: Mapping[str, list[Record]], options: Any) -> Request:
    """Ask for the forget set and the never-trained one, and for their gradients if that attack is wanted."""
    scored = {side: reader.encode(sets[side], side) for side in SIDES}
    return Request(scored=scored, gradients=scored if options.gradnorm else {})


def measure(evidence: Evidence, reader: Reader, sets: Mapping[str, list[Record]], options: Any) -> dict[str, Any]:
    """Return the score of every text under every attack, as `<attack>_forget` and `<attack>_approximate`."""
    items: dict[str, Any] = {}
    for side in SIDES:
        for name, attack in ATTACKS.items():
            items[f"{name}_{side}"] = attack(evidence.scored[side], reader, options.drop_last)
        if side in evidence.gradients:
            items[f"gradnorm_{side}"] = evidence.gradients[side]
    return items


def with_reference(items: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any]:
    """Add the scores of the reference attack, given another model's items on the same texts."""
    loss, other = ({side: np.asarray(one[f"loss_{side}"], np.float64) for side in SIDES} for one in (items, reference))
    return {**items, **{f"reference_{side}": loss[side] - other[side] for side in SIDES}}


def summarise(items: Mapping[str, Any], retrained: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the AUC of every attack and, beside a retrained model, PrivLeak on Min-40 %, sMIA and Privacy."""
    row: dict[str, Any] = {}
    names = [name for name in (*ATTACKS, *EXTRA) if f"{name}_forget" in items]
    for name in names:
        row[f"auc_{name}"], row[f"auc_{name}_ci95"] = _auc(items, name)
    if not retrained:
        return row
    row |= _compared("privleak", privleak, row["auc_min_k"], _auc(retrained, "min_k")[0]) or {
        "privleak": None, "note": "PrivLeak needs the AUC of both models; one of them has no finite score"
    }  # fmt: skip
    for name in names:
        found = _compared(f"smia_{name}", smia, row[f"auc_{name}"], _auc(retrained, name)[0])
        row |= {key: value for key, value in found.items() if key != "note"}
    return row | {"privacy": harmonic_mean(row.get(f"smia_{name}") for name in PRIVACY)}


def _compared(
    field: str, compute: Callable[[float, float], float], own: float | None, other: float | None
) -> dict[str, Any]:
    """Compare two AUCs; nothing where one is missing."""
    if own is None or other is None:
        return {}
    return noted(lambda: {field: compute(own, other)}, field)


def _auc(items: Mapping[str, Any], name: str) -> tuple[float | None, float | None]:
    sides = [np.asarray(items[f"{name}_{side}"], np.float64) for side in SIDES]
    sides = [side[np.isfinite(side)] for side in sides]
    return (auc(*sides), auc_ci95(*sides)) if all(map(len, sides)) else (None, None)
