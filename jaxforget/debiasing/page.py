"""The page of what models tell: the table, and leakage against the task."""

from __future__ import annotations

from pathlib import Path

from jaxforget.debiasing.testbed import Testbed
from jaxforget.report.page import figure, table, write_page


def write_report(directory: Path, testbed: Testbed, rows, document, title: str, more=()) -> None:
    """Write report.html: the table, and leakage against the task."""

    def draw(axes):
        for place, attribute in enumerate(testbed.names):
            for row in rows:
                axes.plot(row[f"leakage_{attribute}"], row["accuracy"], "os^vD"[place % 5], ms=5, color=f"C{place}")
                axes.annotate(row["name"], (row[f"leakage_{attribute}"], row["accuracy"]), fontsize=6,
                              xytext=(3, 3), textcoords="offset points")  # fmt: skip
            axes.axvline(testbed.floors[attribute], color=f"C{place}", lw=0.8, ls=":", label=f"floor of {attribute}")
        axes.set(xlabel="balanced accuracy of attackers (%)", ylabel="task accuracy (%)")
        axes.legend(frameon=False)

    note = ("Percent; gaps are shares. Leakage: balanced accuracy of fresh attackers on the test set. Floor: that of "
            "the best attacker who sees the gold task label alone. eo_max: the larger gap of true and false positive "
            "rates between groups.")  # fmt: skip
    write_page(directory / "report.html", title, f"{len(testbed.examples['test']):,} test records, "
               f"{', '.join(testbed.names)}. {document['device']}.",
               [("Task and leakage", note, table(rows, testbed.fields())),
                ("Leakage against the task", "Left and high is good.", figure(draw)), *more],
               document["config"])  # fmt: skip
