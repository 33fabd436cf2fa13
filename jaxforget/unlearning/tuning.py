"""How a method was tuned: the criterion, averages over seeds, robustness to settings, and their drawings.

A point is a dict: learning_rate, strength, step and seed of a member of a sweep, and what was measured of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxforget.metrics.composite import harmonic_mean
from jaxforget.report.statistics import mean_ci95

WITHIN = 0.1  # of the best criterion: a setting as good
YARDSTICKS = {"original": ("s", "black", 60), "retrained": ("*", "#c0392b", 190)}  # marker, colour, size
LABELS = {"forget_nll": "forget loss (nats/token)", "es": "extraction strength", "memorisation": "Memorisation"}


def criterion(row: Mapping[str, Any], original: Mapping[str, Any]) -> float | None:
    """Join Memorisation with utility relative to the original's; None where one is missing."""
    if None in (row["memorisation"], row["utility"], original["utility"]):
        return None
    return harmonic_mean((row["memorisation"], min(1.0, row["utility"] / max(original["utility"], 1e-9))))


def over_settings(points: Sequence[Mapping[str, Any]], seeds: int) -> list[dict[str, Any]]:
    """Average the criterion of each setting over seeds; None where a seed has none."""
    groups: dict[tuple, list[float | None]] = {}
    for one in points:
        groups.setdefault((one["learning_rate"], one["strength"], one["step"]), []).append(one["criterion"])
    return [
        {"learning_rate": rate, "strength": strength, "step": step, "criterion": _mean_of_all(values, seeds)}
        for (rate, strength, step), values in groups.items()
    ]


def _mean_of_all(values: Sequence[float | None], seeds: int) -> float | None:
    known = [value for value in values if value is not None]
    return None if len(known) < len(values) or len(values) < seeds else sum(known) / seeds


def robustness(means: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the share of settings within 10 % of the best; those without a criterion are not."""
    found = [one["criterion"] for one in means if one["criterion"] is not None]
    return sum(value >= (1.0 - WITHIN) * max(found) for value in found) / len(means) if found else None


# ------------------------------------------------------------------------------------------------ drawings
def trade_off(rows: Sequence[Mapping[str, Any]]) -> Callable[[Any], None]:
    """Draw Memorisation against utility; a good method lands on the star, the retrained model."""

    def draw(axes):
        for index, row in enumerate(rows):
            if row.get("memorisation") is None or row.get("utility") is None:
                continue
            marker, colour, size = YARDSTICKS.get(row["name"]) or ("o^vD"[index // 10 % 4], f"C{index % 10}", 45)
            spans = {axis: row.get(f"{field}_ci95") for axis, field in (("xerr", "memorisation"), ("yerr", "utility"))}
            axes.errorbar(row["memorisation"], row["utility"], **spans, color=colour, lw=1)
            axes.scatter(row["memorisation"], row["utility"], marker=marker, color=colour, s=size, label=row["name"],
                         zorder=3)  # fmt: skip
        axes.set(xlabel="Memorisation (1: nothing by heart)", ylabel="utility", title="Trade-off")
        axes.legend()

    return draw


def heat_map(name: str, means: Sequence[Mapping[str, Any]]) -> Callable[[Any], None]:
    """Draw the criterion over the grid, each setting at its best checkpoint; blank where a seed has none."""
    rates = sorted({one["learning_rate"] for one in means})
    strengths = sorted({one["strength"] for one in means})
    value_RS = np.full((len(rates), len(strengths)), np.nan)
    for one in means:
        if one["criterion"] is not None:
            at = rates.index(one["learning_rate"]), strengths.index(one["strength"])
            value_RS[at] = np.fmax(value_RS[at], one["criterion"])

    def draw(axes):
        axes.imshow(value_RS, vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto")
        for (r, s), value in np.ndenumerate(value_RS):
            axes.text(s, r, "–" if np.isnan(value) else f"{value:.2f}", ha="center", va="center",
                      color="black" if value > 0.6 or np.isnan(value) else "white", fontsize=8)  # fmt: skip
        axes.grid(False)
        axes.set(xticks=range(len(strengths)), xticklabels=[f"{x:g}" for x in strengths], xlabel="strength", title=name,
                 yticks=range(len(rates)), yticklabels=[f"{x:g}" for x in rates], ylabel="learning rate")  # fmt: skip

    return draw


def curves(points: Sequence[Mapping[str, Any]], field: str, along: str) -> Callable[[Any], None]:
    """Draw one field of points against another, means over seeds in their 95 % intervals; yardsticks are dashed.

    A line has a gap where a seed has no value.
    """

    def draw(axes):
        for index, name in enumerate(dict.fromkeys(one["name"] for one in points)):
            values: dict[int, list[float]] = {}
            for one in sorted((one for one in points if one["name"] == name), key=lambda one: one[along]):
                values.setdefault(one[along], []).append(np.nan if one[field] is None else one[field])
            style = {"color": f"C{index % 10}", "ls": ("-", "-.", ":")[index // 10 % 3]}
            if name in YARDSTICKS:
                style = {"color": YARDSTICKS[name][1], "ls": "--"}
            mean_P, half_P = np.array([mean_ci95(seeds) for seeds in values.values()]).reshape(-1, 2).T
            axes.plot(list(values), mean_P, lw=1.4, label=name, **style)
            axes.fill_between(list(values), mean_P - half_P, mean_P + half_P, color=style["color"], alpha=0.15, lw=0)
        if field.endswith("nll") and any(one[field] is not None and one[field] > 20 for one in points):
            axes.set_yscale("log")  # a loss that ran away would squeeze all others
        axes.set(xlabel=along, ylabel=LABELS.get(field, field))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()

    return draw
