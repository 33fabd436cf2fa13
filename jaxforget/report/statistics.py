"""Means and 95 % intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def mean_ci95(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the half width of its 95 % Student t interval over independent seeds."""
    from scipy.stats import t

    count = len(values)
    if len(set(values)) == 1:  # a setting, not a measurement: no rounding
        return values[0], 0.0
    mean = sum(values) / count
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    return mean, float(t.ppf(0.975, count - 1)) * spread / math.sqrt(count)


def over_seeds(runs: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Join the rows of several seeds by name: each number becomes its mean, `<field>_ci95` its interval.

    A number missing (null) for one seed is missing in the mean: an average over the seeds that survived would flatter.
    Text that differs between seeds is joined by " / ". Intervals of a field that a seed's rows have already, over
    items, are left out: `<field>_ci95` is over seeds.
    """
    if len(runs) == 1:
        return [dict(row) for row in runs[0]]
    joined = []
    for rows in zip(*runs, strict=True):
        result: dict[str, Any] = {"name": rows[0]["name"], "seeds": len(rows)}
        over_items = {f"{field}_ci95" for field in rows[0]}
        for field in (field for field in rows[0] if field != "name" and field not in over_items):
            values = [row.get(field) for row in rows]
            if any(value is None for value in values):
                result[field] = None
            elif all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
                result[field], result[f"{field}_ci95"] = mean_ci95(values)
            else:
                result[field] = " / ".join(dict.fromkeys(str(value) for value in values))
        joined.append(result)
    return joined
