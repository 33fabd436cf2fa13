"""The page of an unlearning run: table, forget-against-retain trade-off, curves over steps."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxforget.report.page import cell, figure, plots, table, write_page

YARDSTICKS = ("original", "retrained")
FIELDS = (
    "name", "verdict", "forget_nll", "approximate_nll", "retain_nll", "general_nll", "retain_perplexity_change",
    "gap_to_retrained", "mink40_auc", "forget_accuracy", "retain_accuracy", "steps", "seconds", "train_tokens",
    "tokens_per_second", "flops_vs_retraining", "learning_rate",
)  # fmt: skip
TERMINAL = tuple(f for f in FIELDS if f not in ("forget_accuracy", "retain_accuracy", "train_tokens", "learning_rate"))

RULE = " (forget loss within 10 % of retraining's, retain perplexity under 10 % above the original's)"


def verdict(row: dict[str, Any], original: dict[str, Any], retrained: dict[str, Any] | None) -> str | None:
    """Say whether a method did what retraining does: forget loss within 10 %, retain perplexity harmed by under 10 %.

    null without a retrained model or a retain set. Where the original passes as well, nothing was measured.
    """
    if retrained is None or row["retain_perplexity"] is None:
        return None
    if original["forget_nll"] >= 0.9 * retrained["forget_nll"]:
        return "nothing to forget"
    ratio = row["forget_nll"] / retrained["forget_nll"]
    forgot = "forgot too little" if ratio < 0.9 else "forgot too much" if ratio > 1.1 else ""
    harmed = "harmed retain" if row["retain_perplexity"] > 1.1 * original["retain_perplexity"] else ""
    return " and ".join(filter(None, (forgot, harmed))) or "like retraining"


def write_report(path: Path, title: str, rows: Sequence[dict], curves: Sequence[dict], config: dict) -> None:
    """Write report.html. curves: lines of metrics.jsonl with a row's name as stage, a step and set losses."""
    known = [field for field in FIELDS if any(row.get(field) is not None for row in rows)]
    sections = [
        (
            "Every model, every set",
            "Losses (nll) in nats a token, accuracies in percent. The goal of a method is the row `retrained`, not a "
            "high forget loss. `approximate`: records of the same kind that no model saw; `general`: other text. "
            "mink40 auc, a membership attack: 1 is memorised, 0.5 indistinguishable from never seen, lower "
            "over-unlearned.",
            table(rows, known, mark=lambda row: row["name"] in YARDSTICKS),
        )
    ]
    utility = "retain" if any(row.get("retain_nll") is not None for row in rows) else "general"
    if any(row.get(f"{utility}_nll") is not None for row in rows):
        drawn = [figure(lambda axes: _trade_off(axes, rows, utility))]
        drawn += [figure(functools.partial(_curves, curves=curves, rows=rows, name=s)) for s in ("forget", utility)]
        sections.append((
            "Forgetting against damage",
            "First the end of every method: the star is the retrained model, and a good method lands on it. Then the "
            "loss of both sets while each method runs, of the first seed; the retrained model is dashed.",
            plots(*drawn),
        ))  # fmt: skip
    lead = "Can a trained model become the model that never saw the forget set? Each method starts from `original`; " \
           "the yardstick, where there is one, is `retrained`, trained without the forget set."  # fmt: skip
    write_page(path, title, lead, sections, config, found(rows))


def found(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Say what came out, in sentences."""
    by_name = {row["name"]: row for row in rows}
    methods = [row for row in rows if row["name"] not in YARDSTICKS]
    told = []
    if seeds := rows[0].get("seeds"):
        told.append(f"Numbers are means over {seeds} seeds.")
    if "retrained" in by_name and by_name.keys() >= set(YARDSTICKS):
        told.append("Loss on the forget set: " + ", ".join(
            f"{cell(by_name[name]['forget_nll'], by_name[name].get('forget_nll_ci95'))} of the {name} model"
            for name in YARDSTICKS) + " (nats a token).")  # fmt: skip
    verdicts: dict[str, list[str]] = {}
    for row in methods:
        if row.get("verdict") is not None:
            verdicts.setdefault(row["verdict"], []).append(f"`{row['name']}`")
    order = sorted(verdicts, key=lambda one: (one != "like retraining", one))
    told += [f"{one.capitalize()}{RULE * (one == 'like retraining')}: {', '.join(verdicts[one])}." for one in order]
    measured = [row for row in methods if row.get("gap_to_retrained") is not None]
    if measured:
        nearest = min(measured, key=lambda row: row["gap_to_retrained"])
        distance = cell(nearest["gap_to_retrained"], nearest.get("gap_to_retrained_ci95"))
        told.append(f"Nearest to the retrained model: `{nearest['name']}`, by a mean distance of {distance} nats a "
                    "token over the sets.")  # fmt: skip
    elif methods and not verdicts:
        told.append("Without a retrained model and a retain set nothing says which method forgot as it should.")
    return told


def _trade_off(axes: Any, rows: Sequence[dict[str, Any]], utility: str) -> None:
    rows = [row for row in rows if row.get(f"{utility}_nll") is not None]
    for index, row in enumerate(rows):
        x, y = row["forget_nll"], row[f"{utility}_nll"]
        style = {"original": ("s", "black", 60), "retrained": ("*", "#c0392b", 190)}.get(row["name"])
        marker, color, size = style or ("o^vD"[index // 10 % 4], f"C{index % 10}", 45)
        axes.errorbar(x, y, xerr=row.get("forget_nll_ci95"), yerr=row.get(f"{utility}_nll_ci95"), color=color, lw=1)
        axes.scatter(x, y, marker=marker, color=color, s=size, label=row["name"], zorder=3)
    highest = max(max(row["forget_nll"], row[f"{utility}_nll"]) for row in rows)
    if highest > 20:  # runaway ascent would squeeze everything else into a corner
        axes.set_xscale("log")
        axes.set_yscale("log")
    axes.set(xlabel="forget loss (nats/token)", ylabel=f"{utility} loss (nats/token)", title="Trade-off")
    axes.legend()


def _curves(axes: Any, curves: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], name: str) -> None:
    field = f"{name}_nll"
    top = 0.0
    for index, row in enumerate(rows):
        stage = row["name"]
        points = [(line["step"], line[field]) for line in curves if line["stage"] == stage and field in line]
        if points and stage not in YARDSTICKS:
            style = ("-", "--", ":")[index // 10 % 3]
            axes.plot(*zip(*points, strict=True), color=f"C{index % 10}", ls=style, label=stage, lw=1.4)
            top = max(top, *(value for _, value in points))
    target = next((row[field] for row in rows if row["name"] == "retrained" and row.get(field) is not None), None)
    if target is not None:
        axes.axhline(target, color="#c0392b", ls="--", lw=1, label="retrained")
    if top > 20:
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel=f"{name} loss (nats/token)", title=f"{name.capitalize()} loss over steps")
    if axes.get_legend_handles_labels()[1]:
        axes.legend()
