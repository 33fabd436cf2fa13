"""Means and 95 % intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

INTERVAL = ("ci95", "low", "high")  # how the fields of a field's interval end


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
    Text that differs between seeds is joined by " / ", a note that some have too. Intervals of a field that a seed's
    rows have already, over items, are left out: what stands behind a mean is over seeds. Raises ValueError where seeds
    have other rows.
    """
    if len(runs) == 1:
        return [dict(row) for row in runs[0]]
    by_name = [{row["name"]: row for row in rows} for rows in runs]
    if any(len(rows) < len(run) or rows.keys() != by_name[0].keys() for rows, run in zip(by_name, runs, strict=True)):
        raise ValueError("seeds have rows of other names, or two of one")
    joined = []
    for name in by_name[0]:
        rows = [mine[name] for mine in by_name]
        result: dict[str, Any] = {"name": name, "seeds": len(rows)}
        fields = list(dict.fromkeys(field for row in rows for field in row if field != "name"))
        over_items = {f"{field}_{end}" for field in fields for end in INTERVAL}
        for field in (field for field in fields if field not in over_items):
            values = [row.get(field) for row in rows]
            known = [value for value in values if value is not None]
            if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in known):
                result[field] = None
                if len(known) == len(values):
                    result[field], result[f"{field}_ci95"] = mean_ci95(known)
            elif len(known) == len(values) or field == "note":
                result[field] = " / ".join(dict.fromkeys(str(value) for value in known))
            else:
                result[field] = None
        joined.append(result)
    return joined
