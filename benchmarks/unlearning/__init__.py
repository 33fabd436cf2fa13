"""Unlearning methods, each at its best of a sweep, against retraining.

    python -m benchmarks.unlearning
    python -m benchmarks.unlearning --base DIR --forget forget10_perturbed.json --retain retain90.json \
        --retain-perturbed retain_perturbed.json --real-authors real_authors_perturbed.json \
        --world-facts world_facts_perturbed.json --prompt-template "Question: {question}\nAnswer:"

Without data flags the generated fictional people are the data. For every seed one model is trained with the forget set
(`original`) and one without (`retrained`); all of them are members of one program. A method's learning rates, strengths
(factors of its retain term) and seeds are members of another, watched at several checkpoints.

The choice, fixed in advance: every measured set is cut in halves by a hash of the records' ids. Of a method's settings
(learning rate, strength, checkpoint) the one is taken whose mean over seeds of

    criterion = harmonic mean of Memorisation and utility relative to the original's

is highest on the validation halves. Utility there is the harmonic mean of probability and truth ratio T2 of the sets
that must stay known: nothing is written, and the retrained model is not consulted. What is reported is measured on the
other halves. Robustness to settings is the share of a method's settings whose criterion is within 10 % of its best.
Chosen models are also measured with weights of 8 and 4 bits, and while they are tuned on the forget set again. Parts of
the forget set are also unlearned one after another with the chosen setting, each from the model before. Where real
authors and world facts are not given, utility is of the retain set alone. An ensemble of shards, from which the forget
set is deleted exactly (SISA), stands beside, with its relearning and its requests. Side effects on stereotypes and on
the loss of groups are measured by the means of eval.bias, before and after; the general text of the generated corpus
has a gender stereotype for it.

Trainings, sweeps and measurements are cells, each a file: a killed run resumes there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.unlearning import side_effects
from benchmarks.unlearning.config import PRESETS, Config
from benchmarks.unlearning.models import loaded, sweep_method, train_yardsticks
from benchmarks.unlearning.report import report, rows_of
from benchmarks.unlearning.study import Study, prepare, validate
from benchmarks.unlearning.trials import exact, relearn, requests_of, serve_exactly, serve_requests, test
from jaxforget import command
from jaxforget.files import write_atomic
from jaxforget.metrics.bias.benchmarks import Subject
from jaxforget.report.run import Run, plain
from jaxforget.unlearning.tuning import YARDSTICKS


def run(config: Config) -> None:
    """Do the cells that are missing, then join them."""
    out = Run("benchmarks.unlearning", config, config.out, config.resume)
    study = prepare(config)
    out.begin()
    models = {name: [home(out, name, seed) for seed in range(config.seeds)] for name in (*YARDSTICKS, *study.methods)}
    cost = cell(out, "yardsticks", lambda: train_yardsticks(config, study, models))
    before = cell(out, "validation", lambda: [validate(study, loaded(study, path)) for path in models["original"]])
    swept = {name: cell(out, f"sweep {name}", partial(sweep_method, config, out, study, name, models, before))
             for name in study.methods}  # fmt: skip
    there = [name for name in models if name in YARDSTICKS or swept[name]["chosen"]]
    found = {(name, seed): cell(out, f"test {name} {seed}", partial(test, config, study, path))
             for name in there for seed, path in enumerate(models[name])}  # fmt: skip
    learned = cell(out, "relearn", lambda: relearn(config, study, there, models)) if config.relearn_every else []
    parts = requests_of(config, study)
    served = [one for name in there if parts for one in cell(out, f"requests {name}", partial(
        serve_requests, config, out, study, parts, models["original"], models[name], name, swept.get(name)
    ))]  # fmt: skip
    deleted = [cell(out, f"sisa {seed}", partial(exact, config, out, study, seed))
               for seed in range(config.seeds) if config.shards]  # fmt: skip
    learned += [point for one in deleted for point in one["relearned"]]
    if parts and deleted:
        served += cell(out, "requests sisa", partial(serve_exactly, config, out, study, parts))
    side = [cell(out, f"side effects {seed}", partial(
                side_effects.measure, study.side, subjects(config, study, there, models, seed), config.resamples, seed))
            for seed in range(config.seeds)] if any(study.side) else []  # fmt: skip
    rows = [rows_of(config, study, seed, found, swept, cost, learned, served, deleted, side)
            for seed in range(config.seeds)]  # fmt: skip
    report(config, out, study, rows, swept, learned, served, side)


def subjects(config: Config, study: Study, names: Sequence[str], models, seed: int) -> Iterator[Subject]:
    """Give the models of a seed, one after another."""
    for name in names:
        params = loaded(study, models[name][seed])
        yield Subject(name, study.start.model, params, study.start.tokenizer, config.start_token == "always")


def home(out: Run, name: str, seed: int) -> Path:
    return out.directory / "models" / name / f"seed{seed}"


def cell(out: Run, name: str, work: Callable[[], Any]) -> Any:
    """Return what a cell holds; where it is missing, do its work first."""
    file = out.directory / "cells" / f"{name.replace(' ', '-')}.json"
    if not file.exists():
        began, found = time.perf_counter(), plain(work())
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(found, allow_nan=False) + "\n")
        command.say(f"done: {name}, {time.perf_counter() - began:,.1f} s")
    return json.loads(file.read_text(encoding="utf-8"))


__all__ = ["PRESETS", "Config", "run"]
