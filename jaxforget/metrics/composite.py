"""From several metrics to one: harmonic means, and how far numbers hold when a model is tuned again or quantised.

Parts are from 0 to 1, better is higher. Formulas: github.com/gnueaj/unlearning-depth-score, whose published data they
reproduce; the one-sided forms are attributed to arXiv 2506.12618.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxforget.errors import UserError
from jaxforget.metrics.membership import auc

TINY = 1e-12


def harmonic_mean(values: Iterable[float | None]) -> float | None:
    """Return n / sum of 1 / (x + 1e-12); 0 where a value is 0, None where one is missing."""
    values = list(values)
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return float(len(known) / sum(1.0 / (value + TINY) for value in known)) if all(known) else 0.0


def estimate(name: str, value_N: Any, scale: float = 1.0) -> dict[str, float | None]:
    """Return the mean of what is there, times `scale`, and half of its 95 % interval over items as `<name>_ci95`."""
    value_N = np.asarray(value_N, np.float64)
    kept_N = scale * value_N[np.isfinite(value_N)]
    half = 1.96 * float(kept_N.std(ddof=1)) / len(kept_N) ** 0.5 if len(kept_N) > 1 else None
    return {name: float(kept_N.mean()) if len(kept_N) else None, f"{name}_ci95": half}


def noted(compute: Callable[[], dict[str, Any]], *fields: str) -> dict[str, Any]:
    """Return what is computed; where it cannot be, the fields as None and why in `note`."""
    try:
        return compute()
    except UserError as error:
        return dict.fromkeys(fields) | {"note": str(error)}


def memorisation(es: float, em: float, paraprob: float, truth: float) -> float | None:
    """Join what is not memorised: extraction strength, exact memorisation, ParaProb and mean T3."""
    return harmonic_mean(1.0 - value for value in (es, em, paraprob, truth))


def smia(auc_mem: float, retrained: float) -> float:
    """Return clip(1 - |AUC - AUC of the retrained model| / AUC of the retrained model, 0, 1)."""
    if not retrained > 0:
        raise UserError(f"sMIA divides by the retrained model's AUC, which is {retrained}")
    return float(np.clip(1.0 - abs(auc_mem - retrained) / retrained, 0.0, 1.0))


def relative_utility(utility: float, original: float) -> float:
    """Return min(1, utility / utility of the model before unlearning).

    Raises UserError where the latter is 0, or of the size of TINY: then a part of it is 0.
    """
    if not original > 1e-9:
        raise UserError(f"the utility of the original model is {original:.1g}; nothing can be relative to it")
    return min(1.0, utility / original)


def relearn(change: float, retrained_change: float, *, one_sided: bool = False) -> float:
    """Compare what tuning again on the forget set moves, |after - before|, with what it moves in the retrained model.

    Symmetric: 1 - |a - b| / (a + b). One-sided: min(b / a, 1), which forgives a model that relearns slower.
    """
    a, b = abs(change), abs(retrained_change)
    if one_sided:
        return min(b / a, 1.0) if a else 1.0
    return 1.0 - abs(a - b) / (a + b) if a + b else 1.0


def quantise(before: float, after: float, *, one_sided: bool = False) -> float:
    """Compare a metric before and after weights are quantised. Symmetric: 1 - |after - before| / (after + before).

    One-sided: min(after / before, 1).
    """
    if one_sided:
        return min(after / before, 1.0) if before else 1.0
    return 1.0 - abs(after - before) / (after + before) if after + before else 1.0


def robustness(relearned: float, quantised: float) -> float | None:
    """Return the harmonic mean of the two."""
    return harmonic_mean((relearned, quantised))


def faithfulness(knowing: Sequence[float], never_knew: Sequence[float]) -> float:
    """Return P(metric of a model that knows the forget set > metric of one that does not) + ties / 2."""
    return auc(np.asarray(never_knew, np.float64), np.asarray(knowing, np.float64))
