"""The page of what models tell: the table, and leakage against the task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxforget.debiasing.testbed import Testbed
from jaxforget.report.page import cell, figure, plots, table, write_page

Rows = Sequence[dict[str, Any]]


def write_report(
    directory: Path, testbed: Testbed, rows: Rows, document: dict[str, Any], title: str,
    more: Sequence[tuple[str, str, str]] = (),
) -> None:  # fmt: skip
    """Write report.html: the table, and leakage against the task."""
    drawn = plots(*(figure(_trade_off(rows, name, floor)) for name, floor in testbed.floors.items()))
    note = ("A row a model; the name says which modules are on. Percent; gaps are shares. Leakage: balanced accuracy "
            "of fresh attackers on the test set. Floor: that of the best attacker who sees the gold task label alone. "
            "eo max: the larger gap of true and false positive rates between groups. "
            "LEACE, for comparison: the embedding after its linear erasure.")  # fmt: skip
    lead = (f"How much of {', '.join(testbed.names)} can attackers read from what the classifier computes, and what "
            f"does hiding it cost in the task? {len(testbed.examples['test']):,} test records, {document['device']}.")
    found = [f"Leakage of {name}: {_told(rows, f'leakage_{name}')}; {cell(floor)} % is known from the task label alone."
             for name, floor in testbed.floors.items()]  # fmt: skip
    write_page(directory / "report.html", title, lead,
               [("Task and leakage", note, table(rows, testbed.fields())),
                ("Leakage against the task", "Left and high is good. The dotted line is what the task label alone "
                 "tells.", drawn), *more],
               document["config"], [*found, f"Task accuracy: {_told(rows, 'accuracy')}."])  # fmt: skip


def _told(rows: Rows, field: str) -> str:
    """Give a field of the first rows in words."""
    return ", ".join(f"{cell(row[field], row.get(f'{field}_ci95'))} % with `{row['name']}`" for row in rows[:6])


def _trade_off(rows: Rows, attribute: str, floor: float) -> Callable[[Any], None]:
    """Draw the leakage of an attribute against the task, with intervals over seeds where there are several."""

    def draw(axes):
        for place, row in enumerate(rows):
            axes.errorbar(row[f"leakage_{attribute}"], row["accuracy"], xerr=row.get(f"leakage_{attribute}_ci95"),
                          yerr=row.get("accuracy_ci95"), fmt="os^vD"[place // 10 % 5], ms=5, lw=1,
                          color=f"C{place % 10}", label=row["name"])  # fmt: skip
        axes.axvline(floor, color="0.3", lw=0.8, ls=":", label="task label alone")
        axes.set(xlabel=f"attackers' balanced accuracy on {attribute} (%)", ylabel="task accuracy (%)", title=attribute)
        axes.legend()

    return draw
