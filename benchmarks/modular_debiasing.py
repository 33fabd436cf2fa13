"""Modules that take attributes out of a classifier, against what else does (arXiv 2205.15171): task, leakage, fairness.

    python -m benchmarks.modular_debiasing --dialect davidson_dialect.jsonl.gz \
        --authors English_valid.tsv English_test.tsv

Rows: the fine-tuned core; the whole model debiased by adversaries; modules over a finished core (POST) and beside it
(PAR) at several densities, for every attribute and for both together; LEACE. Both data sets are balanced, so that the
task label tells nothing of an attribute and every leakage stands against a floor near 50 %. Every seed deals the
records anew; the tokenizer, which sees no labels, is built once. Work is done in cells, each a file: a killed run
resumes there.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import tyro

from jaxforget import command
from jaxforget.data.tasks import class_names
from jaxforget.data.text import TextConfig, tokenizer_texts
from jaxforget.debiasing.composition import conflicts, merged, sets_of
from jaxforget.debiasing.data import DataConfig, encode_sets, read_sets
from jaxforget.debiasing.differences import layout_of
from jaxforget.debiasing.gates import GateConfig
from jaxforget.debiasing.modules import from_places
from jaxforget.debiasing.objective import RemovalConfig
from jaxforget.debiasing.run import ModuleConfig, train_fixed, train_gated, train_whole
from jaxforget.debiasing.testbed import Testbed
from jaxforget.debiasing.token_ids import scratch_tokens, token_vocabulary
from jaxforget.errors import UserError
from jaxforget.files import write_atomic
from jaxforget.metrics.leakage import AttackConfig
from jaxforget.models import hub
from jaxforget.report.page import figure, plots, table, write_page
from jaxforget.report.run import Run, plain
from jaxforget.report.statistics import over_seeds
from jaxforget.training.start import ComputeConfig, SizeConfig, Start, start_from


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Compare ways to take attributes out of a classifier."""

    out: Path | None = None
    """Directory for everything the run leaves. Must be empty."""
    resume: bool = False
    """Continue the run in --out; settings must be the same."""
    dialect: str | None = None
    """Texts with label and dialect (Davidson et al. with inferred dialect)."""
    authors: tuple[str, ...] = ()
    """Token ids with label, gender and age of the author."""
    generated: int = 0
    """Generated reviews with two attributes, as a data set of their own."""
    model: str | None = None
    """Hugging Face directory or hub name to start from, for texts; from scratch when not given."""
    seeds: int = 5
    """Seeds of split, initialisation, order, gates and attackers."""
    densities: tuple[float, ...] = (0.01, 0.05, 0.1)
    """Budgets of modules."""
    regimes: tuple[str, ...] = ("post", "par")
    """post, par or both."""
    task_epochs: int = 6
    """Passes of the core over the task; whole-model debiasing and PAR have those of both phases of a module."""
    width: int = 0
    """Seeds in one program; 0 is one on a CPU and all elsewhere."""
    workers: int = 2
    """Cells at a time."""
    minutes: float = 0.0
    """Start no cell after so many minutes; --resume goes on. 0: no limit."""
    size: SizeConfig = SizeConfig(width=64, layers=1, context=32, vocab_size=4096, mlp_width=128)
    compute: Annotated[ComputeConfig, tyro.conf.arg(name="")] = ComputeConfig()
    module: Annotated[ModuleConfig, tyro.conf.arg(name="")] = ModuleConfig(
        epochs=4, fixed_epochs=3, learning_rate=5e-4, adversary_rate=1e-3, core_rate=6e-4
    )
    gates: GateConfig = GateConfig()
    removal: Annotated[RemovalConfig, tyro.conf.arg(name="")] = RemovalConfig(scale=3.0, sparsity=0.3)
    attack: AttackConfig = AttackConfig(epochs=8)


def default() -> Config:
    """a one-layer encoder from scratch, five seeds, about an hour on two CPU cores"""
    return Config()


def smoke() -> Config:
    """generated reviews, two seeds, about two minutes"""
    return Config(
        generated=1500, seeds=2, densities=(0.05,), attack=AttackConfig(epochs=6),
        size=SizeConfig(width=32, layers=1, context=16, vocab_size=512),
    )  # fmt: skip


def paper() -> Config:
    """bert-base-uncased at the rates of the released code; wants an accelerator, and --dialect"""
    return Config(model="bert-base-uncased", task_epochs=15, module=ModuleConfig(), attack=AttackConfig())


PRESETS = {"default": default, "smoke": smoke, "paper": paper}


class Dataset(NamedTuple):
    """What a data set is read as, and the model that all of its seeds start from."""

    name: str
    sets: DataConfig
    text: TextConfig
    start: Start
    vocabulary: dict[str, int] | None
    attributes: tuple[str, ...]


def run(config: Config) -> None:
    """Do the cells that are missing, then join them."""
    command.at_least(1, seeds=config.seeds, workers=config.workers, task_epochs=config.task_epochs)
    if wrong := [d for d in config.densities if not 0 < d <= 1]:
        raise UserError(f"--densities has {wrong[0]}; it must be above 0 and at most 1")
    if unknown := [regime for regime in config.regimes if regime not in ("post", "par")]:
        raise UserError(f"unknown regime {unknown[0]!r}; valid names are post, par")
    out = Run("benchmarks.modular_debiasing", config, config.out, config.resume)
    datasets = read_datasets(config)
    out.begin()
    for folder in ("cells", "cores"):
        (out.directory / folder).mkdir(exist_ok=True)
    width = config.width or (1 if jax.default_backend() == "cpu" else config.seeds)
    groups = [tuple(range(first, min(first + width, config.seeds))) for first in range(0, config.seeds, width)]
    work: list[tuple[Callable, Dataset, tuple[int, ...], str]] = []
    for data in datasets:
        whole = [(name,) for name in data.attributes] + [data.attributes] * (len(data.attributes) > 1)
        for seeds in groups:
            work += [(core_cell, data, seeds, "core")]
            work += [(whole_cell, data, seeds, "whole " + "+".join(names)) for names in whole]
            work += [(modules_cell, data, seeds, regime) for regime in config.regimes]
    until = time.monotonic() + 60 * config.minutes if config.minutes else math.inf
    for first in (True, False):  # what others start from comes first
        todo = [one for one in work if (one[0] is core_cell) == first]
        with ThreadPoolExecutor(config.workers) as pool:
            list(pool.map(lambda one: cell(config, out.directory, *one) if time.monotonic() < until else None, todo))
    missing = [one for one in work if not cell_file(out.directory, one[1].name, *one[2:]).exists()]
    if missing:
        command.say(f"{len(missing)} of {len(work)} cells are left; go on with --resume --out {out.directory}")
    else:
        finish(config, out, datasets, groups)


def read_datasets(config: Config) -> list[Dataset]:
    """Say how each data set is read, and make its model. Raises UserError where there is none."""
    found = []
    if config.dialect:
        sets = DataConfig(data=(config.dialect,), attributes=("dialect",), balance=True)
        found.append(("dialect", sets, TextConfig(id_field="id")))
    if config.authors:
        sets = DataConfig(data=config.authors, attributes=("gender", "age"), balance=True, token_ids=True)
        found.append(("authors", sets, TextConfig(text_field="indices")))
    if config.generated:
        found.append(("generated", DataConfig(records=config.generated), TextConfig()))
    if not found:
        raise UserError("--dialect, --authors or --generated is needed")
    datasets = []
    for name, sets, text in found:
        dealt, names, text = read_sets(sets, text)
        records = [record for part in dealt.values() for record in part]
        labels = class_names(records, name)
        if sets.token_ids:
            vocabulary = token_vocabulary(records, config.size.vocab_size)
            start = scratch_tokens(config.size, config.compute, vocabulary, labels)
        else:
            vocabulary = None
            start = start_from(config.model, tokenizer_name=None, size=config.size, compute=config.compute,
                               texts=tokenizer_texts(records, text), head="classification", labels=labels,
                               tell=command.say)  # fmt: skip
        datasets.append(Dataset(name, sets, text, start, vocabulary, tuple(names)))
    return datasets


# -------------------------------------------------------------------------------------------------- cells
def cell(config: Config, directory: Path, work, data: Dataset, seeds: tuple[int, ...], part: str) -> None:
    """Do a cell unless its file is there: the rows of every seed, and when it was worked on."""
    file = cell_file(directory, data.name, seeds, part)
    if not file.exists():
        began = time.time()
        testbeds = [testbed_of(data, seed) for seed in seeds]
        rows = work(config, directory, data, seeds, part, testbeds)
        content = {"began": began, "ended": time.time(), "rows": plain(rows)}
        write_atomic(file, json.dumps(content, indent=1) + "\n")
        command.say(f"done: {file.stem}, {content['ended'] - began:.0f} s")


def cell_file(directory: Path, name: str, seeds: tuple[int, ...], part: str) -> Path:
    return directory / "cells" / f"{name}, seeds {seeds[0]}-{seeds[-1]}, {part}.json"


def testbed_of(data: Dataset, seed: int) -> Testbed:
    """Deal and encode the records of a seed."""
    sets, names, text = read_sets(dataclasses.replace(data.sets, split_seed=seed), data.text)
    model = data.start.model
    examples = encode_sets(sets, names, text, model, data.start.tokenizer, data.vocabulary)
    return Testbed(examples, names, model.config.labels)


def core_of(directory: Path, data: Dataset, seed: int):
    return hub.load(directory / "cores" / f"{data.name}-{seed}")[1]


def core_cell(config: Config, directory: Path, data: Dataset, seeds, part, testbeds) -> list[list[dict]]:
    """Fine-tune the cores; rows core and LEACE."""
    model = data.start.model
    them = [s.learner(data.start.params(seed), (), ((),), seed) for s, seed in zip(testbeds, seeds, strict=True)]
    cores = train_whole(model, them, config.module, config.removal, config.task_epochs)
    result = []
    for testbed, seed, core in zip(testbeds, seeds, cores, strict=True):
        target = directory / "cores" / f"{data.name}-{seed}"
        if not target.exists():
            hub.save(target, model, core)
        erasers = testbed.erasers(model, core)
        rows = [testbed.row("core", model, core, config.attack, seed)]
        result.append(rows + [testbed.row(name, model, core, config.attack, seed, e) for name, e in erasers.items()])
    return result


def whole_cell(config: Config, directory: Path, data: Dataset, seeds, part, testbeds) -> list[list[dict]]:
    """Debias whole models by adversaries, on the task from the start."""
    model = data.start.model
    attributes = tuple(data.attributes.index(name) for name in part.removeprefix("whole ").split("+"))
    them = [
        s.learner(data.start.params(seed), attributes, (tuple(range(len(attributes))),), seed)
        for s, seed in zip(testbeds, seeds, strict=True)
    ]
    found = train_whole(model, them, config.module, config.removal, config.module.epochs + config.module.fixed_epochs)
    return [[s.row(part, model, p, config.attack, seed)] for s, seed, p in zip(testbeds, seeds, found, strict=True)]


def modules_cell(config: Config, directory: Path, data: Dataset, seeds, part, testbeds) -> list[list[dict]]:
    """Train modules for every attribute, prune them to every density, and measure them alone and together."""
    model, count = data.start.model, len(data.attributes)
    settings = dataclasses.replace(config.module, regime=part)
    # POST: a member for each attribute over its seed's core. PAR: a member a seed, with all modules.
    members = [((j,), ((0,),)) for j in range(count)] if part == "post" else [
        (tuple(range(count)), tuple((j,) for j in range(count)))
    ]  # fmt: skip
    them = [
        testbed.learner(core, *how, seed)
        for testbed, seed in zip(testbeds, seeds, strict=True)
        for core in [core_of(directory, data, seed) if part == "post" else data.start.params(seed)]
        for how in members
    ]
    gated = train_gated(model, them, settings, config.gates, config.removal)
    layout = layout_of(model, settings.differs)
    result: list[list[dict]] = [[] for _ in seeds]
    for density in config.densities:
        fixed = train_fixed(model, them, gated, density, settings, config.removal)
        for place, (testbed, seed) in enumerate(zip(testbeds, seeds, strict=True)):
            mine = fixed[place * len(members) : (place + 1) * len(members)]
            core, found = mine[0].params, [one for member in mine for one in member.modules]
            modules = {
                name: from_places(layout, one["place"], one["value"], core, attribute=name)
                for name, one in zip(data.attributes, found, strict=True)
            }
            label = f"{part.upper()} {100 * density:g}%"
            if part == "par":
                result[place].append(testbed.row(f"{label}: off", model, core, config.attack, seed))
            for chosen in sets_of(modules):
                on = merged(core, {name: modules[name] for name in chosen})
                row = testbed.row(f"{label}: {'+'.join(chosen)}", model, on, config.attack, seed)
                row["achieved_density"] = float(np.mean([modules[name].density for name in chosen]))
                if len(chosen) > 1:
                    row["overlap"] = conflicts(modules)[0]["overlap"]
                result[place].append(row)
    return result


# ------------------------------------------------------------------------------------------------- report
def finish(config: Config, out: Run, datasets: list[Dataset], groups) -> None:
    """Join the cells to one row a method and data set, with paired changes from the core, and judge them."""
    rows: list[dict[str, Any]] = []
    sections, verdicts, spans = [], [], []
    for data in datasets:
        parts = sorted((out.directory / "cells").glob(f"{data.name}, seeds {groups[0][0]}-{groups[0][-1]}, *.json"))
        names = [file.stem.split(", ")[2] for file in parts]
        names.sort(key=lambda name: (name != "core", not name.startswith("whole"), name != "post", name.count("+")))
        runs = []
        for seeds in groups:
            cells = [json.loads(cell_file(out.directory, data.name, seeds, name).read_text()) for name in names]
            spans += [(one["began"], one["ended"]) for one in cells]
            for place in range(len(seeds)):
                runs.append(changed([row for one in cells for row in one["rows"][place]], data.attributes))
        joined = over_seeds(runs)
        mine = [{**row, "name": f"{data.name}: {row['name']}", "dataset": data.name, "method": row["name"]}
                for row in joined]  # fmt: skip
        rows += mine
        verdicts += [verdict(data, name, mine) for name in data.attributes]
        tall = 1.0 + 0.18 * len(mine)
        drawn = plots(*(figure(plot(name, mine), height=tall) for name in data.attributes))
        sections.append((data.name, "Means over seeds and 95 % intervals. Change: paired difference from the core of "
                         "the same seed. Off: the core that trained beside its modules.",
                         table(joined, fields_of(data.attributes)) + drawn))  # fmt: skip
        write_atomic(out.directory / f"figure-{data.name}.svg", figure(plot(data.attributes[0], mine), height=tall))
    document = out.finish(rows, seconds=covered(spans), verdicts=verdicts)
    lead = ("Can a sparse module that is added on demand hide an attribute (gender, say) without harm to the task? "
            f"{config.seeds} seeds; {document['device']}.")  # fmt: skip
    write_page(out.directory / "report.html", "Modular debiasing", lead, sections, document["config"], verdicts)
    for data in datasets:
        mine = [{**row, "name": row["method"]} for row in rows if row["dataset"] == data.name]
        command.print_table(mine, fields_of(data.attributes), f"{data.name} · {out.directory}")
    for said in verdicts:
        command.say(said)


def covered(spans: list[tuple[float, float]]) -> float:
    """Return the seconds in which at least one cell was worked on, in whichever process: a run may be resumed."""
    total, until = 0.0, -math.inf
    for began, ended in sorted(spans):
        total += max(ended - max(began, until), 0.0)
        until = max(until, ended)
    return round(total, 3)


def changed(rows: list[dict[str, Any]], attributes) -> list[dict[str, Any]]:
    """Add the difference from the core of the same seed."""
    core = rows[0]
    fields = ("accuracy", *(f"leakage_{name}" for name in attributes))
    return [{**row, **{f"{field}_change": row[field] - core[field] for field in fields}} for row in rows]


def fields_of(attributes) -> tuple[str, ...]:
    """Return the columns of tables."""
    measures = ("floor_{}", "leakage_{}", "leakage_{}_change", "eo_max_{}")
    return ("name", "accuracy", "accuracy_change", "achieved_density",
            *(measure.format(name) for name in attributes for measure in measures))  # fmt: skip


def verdict(data: Dataset, attribute: str, rows: list[dict[str, Any]]) -> str:
    """Say whether a module lowers the leakage of its attribute by more than the interval, at under 2 points of task."""
    field, passed, tried = f"leakage_{attribute}_change", [], 0
    for row in rows:
        method, _, on = row["method"].partition(": ")
        if method.split()[0] not in ("POST", "PAR") or attribute not in on.split("+"):
            continue
        tried += 1
        if row[field] + row.get(f"{field}_ci95", np.inf) < 0 and row["accuracy_change"] > -2:
            passed.append(row["method"])
    if not passed:
        return (f"{data.name}, {attribute}: none of {tried} settings lowers leakage by more than its interval at under "
                "2 points of task.")  # fmt: skip
    return (f"{data.name}, {attribute}: {len(passed)} of {tried} settings lower leakage by more than the interval at "
            f"under 2 points of task: {', '.join(passed)}.")  # fmt: skip


def plot(attribute: str, rows: list[dict[str, Any]]):
    """Draw the paired change of leakage and its interval for every method, the change of the task beside its name."""

    def draw(axes):
        kinds = ["LEACE", "whole", "POST", "PAR"]
        shown = [row for row in rows if row["method"] != "core"]
        for place, row in enumerate(shown):
            axes.errorbar(row[f"leakage_{attribute}_change"], place, xerr=row.get(f"leakage_{attribute}_change_ci95"),
                          fmt="o", ms=4, lw=1, color=f"C{kinds.index(row['method'].split()[0])}")  # fmt: skip
        axes.axvline(0, lw=0.8, color="0.4")
        axes.set(xlabel=f"leakage of {attribute} against the core (points)", ylabel="method",
                 yticks=range(len(shown)),
                 yticklabels=[f"{row['method']}  (task {row['accuracy_change']:+.1f})" for row in shown])  # fmt: skip
        axes.tick_params(axis="y", labelsize=8)
        axes.invert_yaxis()

    return draw


if __name__ == "__main__":
    command.main(run, PRESETS)
