"""Measure what a classifier's representation tells of attributes: `python -m eval.leakage --model DIR --data FILE …`.

Fresh attackers train on frozen embeddings of the model, with each module on, with all, and after LEACE. Beside every
leakage stands the label-only floor: what the gold task label alone tells, below which leakage falls only at the price
of the task. Group fairness of the task's decisions comes with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from jaxforget import command
from jaxforget.data.sources import Record
from jaxforget.data.text import TextConfig, encode, read
from jaxforget.data.tokens import Examples, check_vocabulary, load_tokenizer
from jaxforget.debiasing.data import (
    SETS,
    TOKENS,
    attribute_names,
    balanced,
    by_content,
    classify_tokens,
    generated,
    read_vocabulary,
    split_by_content,
    with_attributes,
)
from jaxforget.debiasing.modules import COMPOSITIONS, Module, load_module, merged, warnings
from jaxforget.errors import UserError
from jaxforget.fairness.metrics import group_metrics
from jaxforget.metrics.leakage import AttackConfig, Split, attack, balanced_accuracy, embed, label_floor, predict
from jaxforget.metrics.leakage_erasure import fit_eraser
from jaxforget.models import hub
from jaxforget.models.adapters import digest
from jaxforget.report.page import figure, table, write_page
from jaxforget.report.run import Run
from jaxforget.report.statistics import over_seeds


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Labelled records with attributes, and how they are dealt to three sets."""

    data: tuple[str, ...] = ()
    """Records: .jsonl[.gz], .json, .csv, .tsv, .parquet files or hub names. Default: generated reviews."""
    valid: str | None = None
    """Records that attackers are chosen on; dealt from --data when not given."""
    test: str | None = None
    """Records that everything is reported on; dealt from --data when not given."""
    attributes: tuple[str, ...] = ()
    """Columns with protected attributes. Generated reviews have coast and guild."""
    unknown: tuple[str, ...] = ("", "x", "None")
    """Values of an attribute that mean it is not known; such records teach the task alone."""
    balance: bool = False
    """Keep as many records of every combination of attributes within a class, so that labels tell nothing of them."""
    known: bool = False
    """Keep only records whose attributes are all known."""
    split: tuple[float, float, float] = (0.7, 0.1, 0.2)
    """Shares of training, validation and test records; what says the same is dealt to the same set."""
    split_seed: int = 0
    """Seed of the deal and of --balance."""
    token_ids: bool = False
    """The text is token ids, separated by spaces; there is no tokenizer."""
    records: int = 3000
    """Generated reviews."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Measure what a classifier's representation tells of attributes."""

    out: Path | None = None
    """Directory for everything the run leaves; runs/<command>-<time> when not given. Must be empty."""
    model: str | None = None
    """Hugging Face directory or hub name of a classifier: the base of the modules."""
    modules: tuple[Path, ...] = ()
    """Files of modules for this base."""
    compose: str = "sum"
    """How several modules are joined: sum, mean or nonzero_mean."""
    seeds: int = 1
    """Attacks on every embedding, each by fresh attackers."""
    text: Annotated[TextConfig, tyro.conf.arg(name="")] = TextConfig()
    sets: Annotated[DataConfig, tyro.conf.arg(name="")] = DataConfig()
    attack: AttackConfig = AttackConfig()


def default() -> Config:
    """attack a classifier with and without its modules"""
    return Config()


PRESETS = {"default": default}


class Subject:
    """What is measured: encoded sets with labels and attributes. A class, to keep what every row shares."""

    def __init__(self, examples: Mapping[str, Examples], names: Mapping[str, tuple[str, ...]], labels: Sequence[str]):
        self.examples, self.names, self.labels = dict(examples), dict(names), tuple(labels)
        columns = {name: part.columns for name, part in self.examples.items()}
        self.label = {name: part["label"] for name, part in columns.items()}
        self.attributes = {name: part["attributes"] for name, part in columns.items()}
        self.floors = {
            name: label_floor(self.label["train"], self.attributes["train"][:, j], self.label["test"],
                              self.attributes["test"][:, j], len(values))
            for j, (name, values) in enumerate(names.items())
        }  # fmt: skip

    def embeddings(self, model, params) -> dict[str, np.ndarray]:
        """Return what the head reads of every set."""
        return {name: embed(model, params, part) for name, part in self.examples.items()}

    def row(self, name: str, model, params, config: AttackConfig, seed: int,
            change: Callable[[np.ndarray], np.ndarray] = lambda x_ND: x_ND) -> dict[str, Any]:  # fmt: skip
        """Attack and score one model. Percent; gaps are shares. change: of the embeddings, such as an erasure."""
        x = {set_: change(x_ND) for set_, x_ND in self.embeddings(model, params).items()}
        predicted_N, label_N = predict(model, params, x["test"]), self.label["test"]
        row: dict[str, Any] = {
            "name": name,
            "accuracy": float(100.0 * (predicted_N == label_N).mean()),
            "balanced_accuracy": balanced_accuracy(predicted_N, label_N, len(self.labels)),
        }
        for j, (attribute, values) in enumerate(self.names.items()):
            splits = [Split(x[set_], self.attributes[set_][:, j]) for set_ in SETS]
            found = attack(*splits, len(values), config, seed)
            row |= {f"leakage_{attribute}": found["balanced_accuracy"], f"floor_{attribute}": self.floors[attribute]}
            group_N = self.attributes["test"][:, j]
            row |= {f"{measure}_{attribute}": value for measure, value in
                    gaps(predicted_N, label_N, group_N, len(self.labels), len(values)).items()}  # fmt: skip
        return row

    def erasers(self, model, params) -> dict[str, Any]:
        """Fit LEACE to every attribute, and to all where there are several."""
        x_ND, attributes_NJ = self.embeddings(model, params)["train"], self.attributes["train"]
        found = {f"LEACE {name}": fit_eraser(x_ND, attributes_NJ[:, j]) for j, name in enumerate(self.names)}
        if len(self.names) > 1:
            found[f"LEACE {'+'.join(self.names)}"] = fit_eraser(x_ND, attributes_NJ)
        return found

    def fields(self) -> tuple[str, ...]:
        """Return the columns of tables."""
        measures = ("leakage", "floor", "eo_max")
        return ("name", "accuracy", "balanced_accuracy",
                *(f"{measure}_{name}" for name in self.names for measure in measures))  # fmt: skip


def gaps(predicted_N, label_N, group_N, classes: int, groups: int) -> dict[str, float | None]:
    """Return eo_max and demographic_parity, the largest over classes, each against the rest; null without examples."""
    known_N = group_N >= 0
    found = [
        jax.device_get(group_metrics(predicted_N[known_N] == c, label_N[known_N] == c, group_N[known_N], groups))
        for c in (range(classes) if classes > 2 else [1])
    ]
    worst = {name: max(float(one[name]) for one in found) for name in ("eo_max", "demographic_parity")}
    return {name: value if np.isfinite(value) else None for name, value in worst.items()}


def read_sets(
    config: DataConfig, text: TextConfig
) -> tuple[dict[str, list[Record]], dict[str, tuple[str, ...]], TextConfig]:
    """Read and deal the records; returns the sets, the values of every attribute, and the columns that were read."""
    attributes = config.attributes
    if config.data:
        text = dataclasses.replace(text, label_field=text.label_field or "label")
        if not attributes:
            raise UserError("--attributes is missing; name the columns with protected attributes")
        if bool(config.valid) != bool(config.test):
            raise UserError("--valid and --test go together; without them --data is dealt to three sets")
        records = [record for source in config.data for record in read(source, text)]
        records = by_content(records) if text.id_field is None else records
    else:
        if config.valid or config.test or config.token_ids:
            raise UserError("--valid, --test and --token-ids need --data")
        records, attributes = generated(config.records, config.split_seed), attributes or ("coast", "guild")
    names = attribute_names(records, attributes, config.unknown)
    if config.test:
        sets = {"train": records} | {name: read(getattr(config, name), text) for name in ("valid", "test")}
        for name in ("valid", "test"):
            attribute_names(sets[name], attributes, config.unknown)
    else:
        sets = split_by_content(records, config.split, config.split_seed)
    if config.known and not config.balance:
        sets = {name: [r for r in part if all(str(r.fields[a]) in v for a, v in names.items())]
                for name, part in sets.items()}  # fmt: skip
    if config.balance:
        sets = {name: balanced(part, names, config.split_seed) for name, part in sets.items()}
    for name, part in sets.items():
        if not part:
            raise UserError(f"the {name} set is empty; give more records, or other shares in --split")
    return sets, names, text


def encode_sets(sets, names, text: TextConfig, model, tokenizer, vocabulary) -> dict[str, Examples]:
    """Encode every set for a classifier: by its tokenizer, or by the vocabulary of its token ids."""
    labels, result = model.config.labels, {}
    for name, records in sets.items():
        if vocabulary is not None:
            examples = classify_tokens(records, vocabulary, labels, min(text.max_length or 10**9, model.max_length))
        else:
            examples = encode(records, tokenizer, text, context=model.max_length, where=name, tell=command.say,
                              task="classification", labels=labels)  # fmt: skip
        result[name] = with_attributes(examples, records, names)
    return result


def load_modules(files: Sequence[Path], sha256: str) -> dict[str, Module]:
    """Load modules for a base by the names of their files."""
    found: dict[str, Module] = {}
    for file in files:
        name = Path(file).name.removesuffix(".safetensors")
        if name in found:
            raise UserError(f"two modules are called {name}; rename one of the files")
        found[name] = load_module(file, sha256)
    return found


def with_required(params, modules: Mapping[str, Module]) -> tuple[Any, dict[str, Module], dict[str, Module]]:
    """Return what the modules were trained over, the modules that make it, and those that are switched.

    The first is the base, or where attributes were taken out of a task that is a module itself, the base with that on.
    """
    needed = {name for module in modules.values() for name in module.about.get("requires", ())}
    if missing := sorted(needed - set(modules)):
        raise UserError(f"module {missing[0]} is needed by another one; give its file too")
    base = {name: module for name, module in modules.items() if name in needed}
    return merged(params, base), base, {name: module for name, module in modules.items() if name not in needed}


def sets_of(modules: Mapping[str, Module]) -> list[tuple[str, ...]]:
    """Return what is measured: each module alone, and all where there are several."""
    return [(name,) for name in modules] + ([tuple(modules)] if len(modules) > 1 else [])


def run(config: Config) -> None:
    """Embed, attack, compare."""
    if config.model is None:
        raise UserError("--model is missing; give a classifier")
    if config.compose not in COMPOSITIONS:
        raise UserError(f"--compose is {config.compose!r}; valid names are {', '.join(COMPOSITIONS)}")
    command.at_least(1, seeds=config.seeds)
    out = Run("eval.leakage", config, config.out, False)
    model, params = hub.load(config.model)
    if model.config.head != "classification":
        raise UserError(f"{config.model} has a {model.config.head} head; a classifier is needed")
    params, _, modules = with_required(params, load_modules(config.modules, digest(params)))
    sets, names, text = read_sets(config.sets, config.text)
    vocabulary = tokenizer = None
    if config.sets.token_ids:
        vocabulary = read_vocabulary(hub.resolve(config.model) / TOKENS)
    else:
        tokenizer = load_tokenizer(config.model)
        check_vocabulary(tokenizer, model.vocab_size, config.model)
    subject = Subject(encode_sets(sets, names, text, model, tokenizer, vocabulary), names, model.config.labels)
    for message in warnings(modules):
        command.say(message)
    out.begin()
    rows = measured(subject, model, params, modules, config.compose, config.attack, config.seeds)
    document = out.finish(rows, labels=model.config.labels, attributes=names)
    write_report(out.directory, subject, rows, document, f"What {config.model} tells")
    command.print_table(rows, subject.fields(), f"eval.leakage · {out.directory}")


def measured(
    subject: Subject, model, params, modules: Mapping[str, Module], compose: str, attack: AttackConfig, seeds: int
) -> list[dict[str, Any]]:
    """Return the rows: the base, each module on, all on, and the base after LEACE."""
    erasers = subject.erasers(model, params)
    runs = []
    for seed in range(seeds):
        rows = [subject.row("core", model, params, attack, seed)]
        for names in sets_of(modules):
            on = merged(params, {name: modules[name] for name in names}, compose)
            rows.append(subject.row("+".join(names), model, on, attack, seed))
        rows += [subject.row(name, model, params, attack, seed, eraser) for name, eraser in erasers.items()]
        runs.append(rows)
    return over_seeds(runs)


def write_report(directory: Path, subject: Subject, rows, document, title: str, more=()) -> None:
    """Write report.html: the table, and leakage against the task."""

    def draw(axes):
        for place, attribute in enumerate(subject.names):
            for row in rows:
                axes.plot(row[f"leakage_{attribute}"], row["accuracy"], "os^vD"[place % 5], ms=5, color=f"C{place}")
                axes.annotate(row["name"], (row[f"leakage_{attribute}"], row["accuracy"]), fontsize=6,
                              xytext=(3, 3), textcoords="offset points")  # fmt: skip
            axes.axvline(subject.floors[attribute], color=f"C{place}", lw=0.8, ls=":", label=f"floor of {attribute}")
        axes.set(xlabel="balanced accuracy of attackers (%)", ylabel="task accuracy (%)")
        axes.legend(frameon=False)

    note = ("Percent; gaps are shares. Leakage: balanced accuracy of fresh attackers on the test set. Floor: that of "
            "the best attacker who sees the gold task label alone. eo_max: the larger gap of true and false positive "
            "rates between groups.")  # fmt: skip
    write_page(directory / "report.html", title, f"{len(subject.examples['test']):,} test records, "
               f"{', '.join(subject.names)}. {document['device']}.",
               [("Task and leakage", note, table(rows, subject.fields())),
                ("Leakage against the task", "Left and high is good.", figure(draw)), *more],
               document["config"])  # fmt: skip


if __name__ == "__main__":
    command.main(run, PRESETS)
