"""Claims of a paper as data, and what measured differences say of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from jaxforget.report.statistics import mean_ci95


class Claim(NamedTuple):
    """A difference of a measure between two settings, the first minus the second.

    holds: where it lies from 0 if the claim is right. second: None where the measure is a difference by itself.
    """

    text: str
    source: str
    field: str
    holds: Literal["above", "below", "differs"]
    first: str
    second: str | None


def judged(claim: Claim, runs: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Judge a claim by the 95 % interval over seeds of its difference; runs: the rows of every seed, named by setting.

    verdict: replicates or opposite where the interval excludes 0, else not established, as with a single seed or where
    the measure is missing. Nothing corrects for the number of claims.
    """
    by_name = [{row["name"]: row for row in rows} for rows in runs]
    pairs = [(rows[claim.first].get(claim.field), rows[claim.second].get(claim.field) if claim.second else 0.0)
             for rows in by_name]  # fmt: skip
    row = {"name": claim.text, **dict(list(claim._asdict().items())[1:]), "difference": None}
    row["verdict"] = "not established"
    differences = [first - second for first, second in pairs if first is not None and second is not None]
    if len(differences) < len(pairs):
        return row
    row["difference"], half = mean_ci95(differences)
    if len(pairs) > 1:
        row["difference_ci95"] = half
        if abs(row["difference"]) > half:
            side = "above" if row["difference"] > 0 else "below"
            row["verdict"] = "replicates" if claim.holds in (side, "differs") else "opposite"
    return row


def statement(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Say in a sentence each what became of every claim; settings it is made of by what stands before their comma."""
    sentences = []
    for text, field in dict.fromkeys((row["name"], row["field"]) for row in rows):
        found: dict[str, list[str]] = {"replicates": [], "opposite": [], "not established": []}
        for row in rows:
            if (row["name"], row["field"]) == (text, field):
                found[row["verdict"]].append(row["first"].split(",")[0])
        told = "; ".join(f"{verdict} ({', '.join(names)})" for verdict, names in found.items() if names)
        sentences.append(f"{text[0].upper()}{text[1:]}, by {field}: {told}.")
    return sentences
