"""What forgetting changes besides: stereotypes, and the loss of groups, by the measures of eval.bias.

The generated corpus trains all models on sentences with a known gender stereotype, which nobody asks to forget, and its
probes measure what is left of it. Fairness as eval.fairness has it, equalized odds and demographic parity, is of
decisions about labelled people: a causal language model makes none, so what it does to groups is measured by its loss
on their texts. Classifiers before and after deletion are the subject of benchmarks.fairsisa.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.unlearning.config import Config
from eval import bias
from jaxforget import command
from jaxforget.data import stereotyped
from jaxforget.data.sources import Record, read_records
from jaxforget.data.stereotypes import Pair
from jaxforget.data.text import encode
from jaxforget.data.tokens import Examples
from jaxforget.metrics.bias import benchmarks
from jaxforget.metrics.bias.benchmarks import Measure, Subject
from jaxforget.metrics.bias.probes import by_gender
from jaxforget.metrics.bias.scoring import start_id
from jaxforget.report.page import figure, plots, table
from jaxforget.training.start import Start
from jaxforget.unlearning.tuning import YARDSTICKS

FILES = ("stereoset", "crows_pairs", "winobias")
MOST = 200  # generated sentences about a gender
SPANS = ("low", "high", "change_low", "change_high")  # bootstrap intervals, of items
NOTE = (
    "What nobody asked to change. Preference: percent of generated pairs whose stereotypical sentence is likelier. "
    "Loss: nats a token by group, and the gap of two; of genders, the same generated sentences about men and women; of "
    "retain, its records by their field 'group'. Change: from the original of the same seed. "
)


class Asked(NamedTuple):
    """What models are asked about."""

    stereotypes: dict[str, list[Any]]  # by flag of eval.bias; preference: generated pairs
    texts: dict[str, tuple[Examples, dict[str, str]]]  # by what they are; id -> group


def read(config: Config, start: Start, retain: Sequence[Record]) -> Asked:
    """Read or generate stereotypes and texts of groups. retain: records that must stay known."""
    stereotypes: dict[str, list[Any]] = {
        name: bias.READERS[name](source) for name in FILES if (source := getattr(config, name))
    }
    grouped: dict[str, list[Record]] = {}
    if not config.forget:
        probes = stereotyped.generate(config.stereotyped)["probe"]
        stereotypes["preference"] = [Pair(one.text, one.fields["anti_stereotype"], one.fields["kind"])
                                     for one in probes]  # fmt: skip
        grouped["genders"] = [dataclasses.replace(one, fields={"group": gender})
                              for gender, some in by_gender(probes, MOST).items() for one in some]  # fmt: skip
    if all(record.fields.get("group") is not None for record in retain):
        grouped["retain"] = sorted(retain, key=lambda record: str(record.fields["group"]))
    if config.texts:
        grouped["texts"] = read_records(config.texts, group_field="group")
    if stereotypes:
        start_id(start.tokenizer, config.base or "the model")  # tells a tokenizer that cannot begin a sentence
    whole, context = dataclasses.replace(config.text, text_mode="truncate"), start.model.max_length
    texts = {
        name: (encode(some, start.tokenizer, whole, context=context, where=name, tell=command.say),
               {record.id: str(record.fields["group"]) for record in some})
        for name, some in grouped.items()
    }  # fmt: skip
    return Asked(stereotypes, texts)


def measure(asked: Asked, subjects: Iterable[Subject], resamples: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Return the measures of every model by its name, as rows; the first is the original, which has no change.

    Intervals are over items; those of the change are paired, for all models are measured on the same items.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    original: list[Measure] | None = None
    for subject in subjects:
        found = answers(asked, subject)
        paired = [one._replace(samples=one.samples + base.samples)
                  for one, base in zip(found, original, strict=True)] if original else found  # fmt: skip
        rows[subject.name] = [one.row(resamples, seed) for one in paired]
        original = original or found
    return rows


def answers(asked: Asked, subject: Subject) -> list[Measure]:
    """Ask one model: every benchmark over all its items, losses by group too."""
    found: list[Measure] = []
    for name, items in asked.stereotypes.items():
        if name == "preference":
            found += benchmarks.pairs([subject], items, "Preference", ("sum",))
        else:
            found += bias.measure(name, items, [subject], bias.Config(), None, None)
    found = [one for one in found if one.part is None]
    for name, (examples, groups) in asked.texts.items():
        found += [one._replace(benchmark=f"Loss of {name}")
                  for one in benchmarks.group_loss([subject], [examples], groups)]  # fmt: skip
    return found


def field_of(name: str) -> str:
    """Return the field of a result row that holds a measure."""
    return re.sub(r"\W+", "_", name).lower()


def fields_of(measures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what a result row says of its model's measures: values, changes, and intervals over items."""
    return {
        field_of(one["name"]) + (f"_{kind}" if kind != "value" else ""): one[kind]
        for one in measures for kind in ("value", "change", *SPANS) if kind in one
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------- page
def section(rows: Sequence[Mapping[str, Any]], measures: Sequence[Mapping[str, Any]]) -> tuple[str, str, str]:
    """Return the section of the page: a drawing of every measure, and a table. measures: the original's."""
    names = [field_of(one["name"]) for one in measures]
    there = [row for row in rows if any(row.get(name) is not None for name in names)]
    drawn = plots(*(figure(levels(there, field_of(one["name"]), one["name"], one.get("ideal")), width=4.4,
                           height=1.1 + 0.2 * len(there))
                    for one in measures if one["part"] is None))  # fmt: skip
    columns = [field for name in names for field in (name, f"{name}_change")]
    notes = [note for title, note in bias.NOTES.items() if title != "Loss"
             and any(one["benchmark"].startswith(title) for one in measures)]  # fmt: skip
    note = f"{NOTE}Dotted: the original; dashed: the ideal. {' '.join(notes)}"
    return "Side effects", note, drawn + table(there, ("name", *columns), lambda row: row["name"] in YARDSTICKS)


def levels(rows: Sequence[Mapping[str, Any]], field: str, label: str, ideal: float | None) -> Callable[[Any], None]:
    """Draw a measure of all models with its interval, over seeds where there are several, else over items."""

    def draw(axes):
        for y, row in enumerate(rows):
            if row.get(field) is None:
                continue
            marker, colour, _ = YARDSTICKS.get(row["name"], ("o", "C0", 0))
            axes.plot(row[field], y, marker, ms=5, color=colour)
            half = row.get(f"{field}_ci95")
            ends = (row.get(f"{field}_low"), row.get(f"{field}_high")) if half is None else (row[field] - half,
                                                                                            row[field] + half)
            if None not in ends:
                axes.hlines(y, *ends, color=colour, lw=1)
        before = rows[0].get(field)
        if before is not None:
            axes.axvline(before, color="black", lw=0.8, ls=":")
        if ideal is not None:
            axes.axvline(ideal, color="C2", lw=0.8, ls="--")
        axes.set(yticks=range(len(rows)), yticklabels=[row["name"] for row in rows], xlabel=label, ylabel="model")
        axes.invert_yaxis()

    return draw
