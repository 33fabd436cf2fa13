"""Join seeds and cells to rows; write results.json and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.unlearning import side_effects
from benchmarks.unlearning.config import Config
from benchmarks.unlearning.study import Study
from jaxforget import command
from jaxforget.metrics import benchmark, tofu
from jaxforget.metrics.composite import harmonic_mean
from jaxforget.report.page import cell, figure, plots, table, write_page
from jaxforget.report.run import Run
from jaxforget.report.statistics import over_seeds
from jaxforget.unlearning.tuning import YARDSTICKS, curves, heat_map, trade_off


def rows_of(config: Config, study: Study, seed: int, tested, swept, cost, learned, served, deleted,
            side) -> list[dict[str, Any]]:  # fmt: skip
    """Return the rows of a seed: original, retrained, then the methods."""
    rows: list[dict[str, Any]] = []
    trained = len(YARDSTICKS) * config.seeds / (config.choosing_seeds or config.seeds)  # as a method's cost: of those
    for name in (*YARDSTICKS, *study.methods):
        row: dict[str, Any] = {"name": name}
        if (name, seed) in tested:
            row |= benchmark.summarise(tested[name, seed]["items"], tested["retrained", seed]["items"])
            if row.get("utility") is None:
                known = harmonic_mean(utility_parts(row))
                row["utility"] = harmonic_mean((known, row["fluency"])) if "fluency" in row else known
            row |= benchmark.overall(row, rows[0] if rows else row)
            row |= tested[name, seed]["bits"]
            row |= last(learned, name, seed, "relearned", RELEARNED)
            row |= last(served, name, seed, "requests", ("es", "memorisation", "utility"))
            row |= side_effects.fields_of(side[seed][name]) if side else {}
        if name in swept:
            found = swept[name]
            row |= {key: found["chosen"][key] if found["chosen"] else None
                    for key in ("learning_rate", "strength", "step", "criterion")}  # fmt: skip
            row |= {"robustness": found["robustness"], **{f"tuning_{key}": x for key, x in found["cost"].items()}}
            row["diverged"] = len(found["notes"])
        else:
            row |= {f"tuning_{key}": cost[key] / trained for key in ("seconds", "steps", "tokens")}
        rows.append(row)
    for when, name in (("before", "sisa before"), ("after", "sisa")):
        for one in deleted[seed : seed + 1]:
            found = dict(one[when])
            rows.append({"name": name, "utility_32bit": found.pop("utility"), **found,
                         "memorisation_32bit": found["memorisation"], "es_32bit": found["es"],
                         **last(learned, name, seed, "relearned", RELEARNED)})  # fmt: skip
    return rows


def told(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say what came out, a sentence a model: what joins the metrics, or the losses where that was not measured."""
    fields = next((fields for fields in (("overall", "memorisation", "privacy", "utility_rel"),
                                         ("memorisation", "utility"), ("forget_nll", "retain_nll"))
                   if any(row.get(fields[0]) is not None for row in rows)), ())  # fmt: skip
    values = lambda row: ", ".join(f"{f.replace('_', ' ')} {cell(row.get(f), row.get(f'{f}_ci95'))}"  # noqa: E731
                                   for f in fields if row.get(f) is not None)  # fmt: skip
    return [f"`{row['name']}`: {said}." for row in rows if (said := values(row))]


def utility_parts(row: Mapping[str, Any]) -> list[float | None]:
    """Return probability, ROUGE and truth ratio T2 of the sets there are, where real authors and facts are not."""
    sets = [name for name in tofu.UTILITY if f"tofu_{name}_probability" in row]
    parts = [f"tofu_{name}_{kind}" for name in sets for kind in ("probability", "rouge", "truth_ratio_t2")]
    return [row[part] for part in parts if part in row]


def last(points: Sequence[dict], name: str, seed: int, prefix: str, fields: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a model's last point."""
    mine = [one for one in points if (one["name"], one["seed"]) == (name, seed)]
    return {f"{prefix}_{field}": mine[-1][field] for field in fields} if mine else {}


RELEARNED = ("es", "forget_nll", "memorisation")
TERMINAL = ("name", "overall", "memorisation", "privacy", "utility_rel", "es", "forget_nll", "retain_nll", "robustness",
            "learning_rate", "strength", "step")  # fmt: skip
TUNING = ("name", "criterion", "robustness", "learning_rate", "strength", "step", "diverged", "tuning_runs",
          "tuning_steps", "tuning_tokens", "tuning_seconds")  # fmt: skip


def report(config: Config, out: Run, study: Study, by_seed, swept, learned, served, side) -> None:
    """Join the seeds; write results.json and the page."""
    measures = side[0]["original"] if side else []
    document = out.finish(over_seeds(by_seed), by_seed=by_seed, sweeps=swept, relearning=learned, requests=served)
    rows = document["results"]
    mark = lambda row: row["name"] in YARDSTICKS  # noqa: E731
    spans = f"means and 95 % intervals over {config.seeds} seeds" if config.seeds > 1 else "one seed, ± over items"

    def section(title: str, note: str, fields: Sequence[str], drawn: Sequence[str] = ()):
        fields = ["name", *(f for f in fields if f != "name" and any(row.get(f) is not None for row in rows))]
        return title, note, table(rows, fields, mark) + plots(*drawn)

    sections = []
    if any(row.get("memorisation") is not None and row.get("utility") is not None for row in rows):
        sections.append(section("Overall", benchmark.OVERALL_NOTE, benchmark.OVERALL, [figure(trade_off(rows))]))
    maps = [figure(heat_map(name, found["grid"]), width=3.2, height=2.7) for name, found in swept.items()]
    note = ("The criterion over learning rates and strengths on the validation halves, each at its best checkpoint; "
            "the mean over the seeds that choose. Robustness: the share of settings within 10 % of the best. Tuning: "
            "the cost of all their runs together; for the yardsticks, half of that of training both.")  # fmt: skip
    sections.append(section("Tuning", note, TUNING, maps))
    if config.bits:
        fields = [f"{name}_{bits}bit" for name in ("memorisation", "es", "utility") for bits in (32, *config.bits)]
        sections.append(section("Quantised", "Chosen models with weights of fewer bits; utility without ROUGE.",
                                fields))  # fmt: skip
    if learned:
        sections.append(section(
            "Relearning", "Chosen models while they are tuned on the forget set again; the retrained model is dashed.",
            ("forget_nll", "relearned_forget_nll", "es", "relearned_es", "relearned_memorisation"),
            [figure(curves(learned, field, "step")) for field in ("forget_nll", "es")],
        ))  # fmt: skip
    if config.shards:
        note = (f"An ensemble of {config.shards} shards ({config.slices} slices each) before and after the forget set "
                "is deleted; deletion share: examples visited, of those of a full retraining. Utility without ROUGE.")
        sections.append(section("Exact deletion", note, ("memorisation_32bit", "es_32bit", "utility_32bit",
                                "forget_nll", "deletion_share", "deletion_seconds")))  # fmt: skip
    if served:
        sections.append(section(
            "Requests", "The forget set in parts, one after another, each from the model before; measured on all that "
            "had to be forgotten so far, in the table after the last. Utility without ROUGE. Yardsticks are dashed.",
            ("requests_memorisation", "requests_es", "requests_utility", "memorisation_32bit", "utility_32bit"),
            [figure(curves(served, field, "request")) for field in ("memorisation", "utility")],
        ))  # fmt: skip
    if side:
        sections.append(side_effects.section(rows, measures))
    sections += [section(name.capitalize(), metric.note, metric.columns) for name, metric in study.metrics.items()]
    notes = [{"name": name, "note": note} for name, found in swept.items() for note in found["notes"]]
    if notes := [row for row in rows if row.get("note")] + notes:
        sections.append(("Notes", "What could not be computed, and why.", table(notes, ("name", "note"))))
    lead = ("Which method forgets most and keeps most, each with its best settings? Chosen on the validation halves, "
            f"measured on the test halves; {spans}. The goal is the row `retrained`. {document['device']}.")
    write_page(out.directory / "report.html", "Unlearning at its best", lead, sections, document["config"],
               told(rows))  # fmt: skip
    shown = [field for field in TERMINAL if any(row.get(field) is not None for row in rows)]
    command.print_table(rows, shown, f"benchmarks.unlearning · {out.directory}")
