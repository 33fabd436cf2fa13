"""Score saved models by the unlearning benchmark: `python -m eval.unlearning --models DIR ... --metrics tofu ...`.

Beside language losses: TOFU, memorisation, membership attacks, MUSE and what joins them. What a model answered is saved
item by item in items/, so that --resume measures only what is missing.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from jaxforget import command
from jaxforget.data.sources import Record, read_records
from jaxforget.data.text import TextConfig, read
from jaxforget.data.tokens import check_vocabulary, load_tokenizer
from jaxforget.errors import UserError
from jaxforget.files import write_atomic
from jaxforget.metrics import attacks, benchmark, muse
from jaxforget.metrics.benchmark import MeasureConfig, Metric
from jaxforget.metrics.evidence import Reader, Request
from jaxforget.models import hub
from jaxforget.models.quantize import quantized
from jaxforget.report.page import cell, figure, plots, table, write_page
from jaxforget.report.run import Run
from jaxforget.report.terms import label, meaning
from jaxforget.training.stage import finished
from jaxforget.training.start import ComputeConfig, require_causal
from jaxforget.unlearning import scoring
from jaxforget.unlearning.page import YARDSTICKS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Score saved models by the unlearning benchmark."""

    out: Path | None = None
    """Directory for everything the run leaves; runs/<command>-<time> when not given. Must be empty."""
    resume: bool = False
    """Go on with an unfinished evaluation in --out; settings must be the same."""
    models: tuple[str, ...] = ()
    """Hugging Face directories or hub names. A row's name is the last part of its path."""
    retrained: str | None = None
    """The model trained without the forget set: the yardstick of gaps, forget quality, PrivLeak and sMIA."""
    original: str | None = None
    """The model before unlearning: the yardstick of utility."""
    reference: str | None = None
    """A model whose loss the reference attack subtracts, such as the pretrained one."""
    metrics: tuple[str, ...] = ("language",)
    """Any of language, tofu, memorisation, membership, verbatim, knowledge, fluency; muse is verbatim, knowledge and
    membership; overall is tofu, memorisation, membership and what joins them."""
    tokenizer: str | None = None
    """Tokenizer directory or hub name. Default: each model's own."""
    forget: str | None = None
    """Records that were to be forgotten. For TOFU's truth ratio with fields paraphrased_answer, perturbed_answer."""
    retain: str | None = None
    """Records that must stay known; fields as of --forget."""
    approximate: str | None = None
    """Never-trained records of the same kind: the non-members of the attacks."""
    general: str | None = None
    """Other text."""
    real_authors: str | None = None
    """TOFU's questions about real authors, with perturbed_answer."""
    world_facts: str | None = None
    """TOFU's questions about the world, with perturbed_answer."""
    forget_questions: str | None = None
    """Questions and answers about the forget set (metric knowledge); --forget when not given."""
    retain_questions: str | None = None
    """Questions and answers about the retain set (metric knowledge); --retain when not given."""
    few_shot: str | None = None
    """Questions and answers that stand before every knowledge question."""
    verbatim: str | None = None
    """Beginnings of forget texts and what comes next: prompt, gt."""
    quantize: Literal[8, 4] | None = None
    """Measure models with weights of so many bits: rows of 8-bit steps, or NF4 in blocks of 64."""
    series: Literal["scalability", "sustainability"] | None = None
    """What --models are, in order: models that forgot growing nested sets, or one model after each of its requests."""
    forget_records: tuple[int, ...] = ()
    """How many records had been forgotten at every step of --series."""
    compute: Annotated[ComputeConfig, tyro.conf.arg(name="")] = ComputeConfig(dtype="float32")
    text: Annotated[TextConfig, tyro.conf.arg(name="")] = TextConfig()
    measures: Annotated[MeasureConfig, tyro.conf.arg(name="")] = MeasureConfig()


def default() -> Config:
    """score the models given"""
    return Config()


PRESETS = {"default": default}
SETS = ("forget", "retain", "approximate", "general", "real_authors", "world_facts", "forget_questions",
        "retain_questions", "few_shot", "verbatim")  # fmt: skip
# The first two stand on the terminal where there are several metrics, else all.
TERMINAL = {"language": ("forget_nll", "retain_nll", "approximate_nll", "general_nll", "gap_to_retrained",
                         "mink40_auc"),
            "tofu": ("forget_quality", "tofu_model_utility_t2", "forget_quality_d", "tofu_forget_probability",
                     "tofu_forget_rouge"),
            "memorisation": ("es", "memorisation", "em"), "membership": ("auc_min_k", "privleak", "privacy"),
            "verbatim": ("verbmem",), "knowledge": ("knowmem_forget", "knowmem_retain", "utility_change"),
            "fluency": ("fluency",)}  # fmt: skip


def run(config: Config) -> None:
    """Read and check everything, then measure one model after the other, and report."""
    metrics = benchmark.choose(config.metrics)
    sets = read_sets(config)
    check(config, metrics, sets)
    out = Run("eval.unlearning", config, config.out, config.resume)
    named = names(config)
    jobs = {path: plan(out, name, path, config, metrics, sets) for path, name in named.items()}
    reference = None
    if config.reference:
        reference = plan(out, "--reference", config.reference, config, {"membership": metrics["membership"]}, sets)
    out.begin()

    other = work(out, reference, config, sets)["membership"] if reference else None
    items: dict[str, dict[str, Any]] = {}

    def evaluate(path: str) -> dict[str, Any]:
        name = named[path]
        items[name] = work(out, jobs[path], config, sets)
        if other is not None:
            items[name] |= {"membership": attacks.with_reference(items[name]["membership"], other)}
        record = finished(Path(path)) or {}
        cost = {field: record.get(field) for field in scoring.COST}
        known = dict.fromkeys(scoring.METRICS) if "language" in metrics else {}
        row = known | benchmark.summarise(items[name], items.get("retrained"))
        return {"name": name, "path": path, **row, **cost}

    yardsticks = {named[path]: evaluate(path) for path in (config.retrained, config.original) if path}
    others = [path for path in named if path not in (config.retrained, config.original)]
    if config.series:
        start = yardsticks.get("original")
        rows = muse.series_rows(config.series, others, evaluate, config.forget_records, start)
    else:
        rows = [evaluate(path) for path in others]
    rows = [*yardsticks.values(), *rows]
    for row in rows:
        compare(row, yardsticks, "language" in metrics)
    document = out.finish(rows)
    report(out, document, metrics)
    fields = ["name", *(["overall"] if any("overall" in row for row in rows) else [])]
    fields += [field for name in metrics for field in TERMINAL[name][: 2 if len(metrics) > 1 else None]]
    shown = [field for field in fields if any(row.get(field) is not None for row in rows)]
    command.print_table(rows, shown, f"eval.unlearning · {out.directory}")


def read_sets(config: Config) -> dict[str, list[Record]]:
    """Read every set that is given."""
    sets = {}
    for name in SETS:
        if (source := getattr(config, name)) is None:
            continue
        if name == "verbatim":
            sets[name] = read_records(source, question_field="prompt", answer_field="gt", limit=config.text.limit)
        else:
            sets[name] = read(source, config.text)
    return sets


def check(config: Config, metrics: dict[str, Metric], sets: dict[str, list[Record]]) -> None:
    """Raise UserError for what is missing or does not go together."""
    if not config.models:
        raise UserError("--models is missing; give one or more model directories")
    if len(set(config.models)) < len(config.models):
        raise UserError("--models names a model twice")
    if config.retrained and config.retrained == config.original:
        raise UserError("--retrained and --original are the same model")
    if "forget" not in sets and set(metrics) - {"verbatim", "knowledge"}:
        raise UserError("--forget is missing; give the records that were to be forgotten")
    benchmark.require(metrics, sets)
    if "overall" in config.metrics and not (config.retrained and config.original):
        raise UserError("metric overall needs --retrained and --original, its yardsticks")
    if "muse" in config.metrics and not config.retrained:
        raise UserError("metric muse needs --retrained, the yardstick of PrivLeak")
    if config.reference and "membership" not in metrics:
        raise UserError("--reference is for metric membership")
    if config.measures.gradnorm and "membership" not in metrics:
        raise UserError("--gradnorm is for metric membership")
    if config.forget_records and not config.series:
        raise UserError("--forget-records goes with --series")
    if config.series:  # tells what is wrong with the series before anything is loaded
        muse.series_rows(config.series, config.models, lambda path: {}, config.forget_records)
    for record in sets.get("few_shot", ()):
        if record.prompt is None:
            raise UserError("--few-shot is plain text; questions and answers are needed")


def names(config: Config) -> dict[str, str]:
    """Return path -> name of a row, yardsticks first: the last part of the path, or all of it where that is taken."""
    given = {"retrained": config.retrained, "original": config.original}
    named = {path: name for name, path in given.items() if path}
    for path in config.models:
        last = Path(path).name
        named.setdefault(path, path if last in named.values() else last)
    return named


class Job(NamedTuple):
    """What is to be measured of a model. found: items of metrics that were measured before."""

    name: str
    path: str
    found: dict[str, dict[str, Any]]
    missing: dict[str, Metric]
    reader: Reader | None
    asked: Request


def plan(out: Run, name: str, path: str, config: Config, metrics: dict[str, Metric], sets) -> Job:
    """Look for what is measured already, and ask for the rest. Raises UserError for what cannot be measured."""
    files = {metric: items_file(out, name, metric) for metric in metrics}
    found = {metric: json.loads(file.read_text(encoding="utf-8")) for metric, file in files.items() if file.exists()}
    missing = {metric: metrics[metric] for metric in metrics if metric not in found}
    if not missing:
        return Job(name, path, found, missing, None, Request())
    model, _ = hub.load(path)  # the weights are read again when their turn comes: all at once may not fit
    require_causal(model, path)
    tokenizer = load_tokenizer(config.tokenizer or path)
    check_vocabulary(tokenizer, model.vocab_size, path)
    reader = Reader(config.compute.apply(model), tokenizer, config.text, command.say)
    return Job(name, path, found, missing, reader, benchmark.request(missing, reader, sets, config.measures))


def work(out: Run, job: Job, config: Config, sets: dict[str, list[Record]]) -> dict[str, dict[str, Any]]:
    """Return the items of every metric: those that were missing are measured and saved."""
    if job.reader is None:  # nothing is missing
        return dict(job.found)
    began = time.perf_counter()
    params = hub.load(job.path)[1]
    if config.quantize:
        params = quantized(job.reader.model, params, config.quantize)
    measured = benchmark.measure(job.missing, job.asked, job.reader, params, sets, config.measures)
    for metric, items in measured.items():
        file = items_file(out, job.name, metric)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(items, allow_nan=False) + "\n")
    command.say(f"{job.name}: {', '.join(measured)} in {time.perf_counter() - began:,.1f} s")
    return job.found | measured


def items_file(out: Run, name: str, metric: str) -> Path:
    """Return where the items of a metric are saved."""
    return out.directory / "items" / name.replace("%", "%25").replace("/", "%2F") / f"{metric}.json"


def compare(row: dict[str, Any], yardsticks: dict[str, dict[str, Any]], language: bool) -> None:
    """Complete a row by what compares it with the yardsticks."""
    retrained, original = yardsticks.get("retrained"), yardsticks.get("original")
    if language:
        row.update(scoring.gaps(row, retrained))
    if retrained and retrained["train_flops"] and row["train_flops"]:
        row["flops_vs_retraining"] = row["train_flops"] / retrained["train_flops"]
    row.update(benchmark.overall(row, original))


def report(out: Run, document: dict[str, Any], metrics: dict[str, Metric]) -> None:
    """Write report.html: a section a metric."""
    rows, sections = document["results"], []
    joined = [("Overall", benchmark.OVERALL, benchmark.OVERALL_NOTE, None)] if any("overall" in r for r in rows) else []
    parts = joined + [(name.capitalize(), m.columns, m.note, m.axes) for name, m in metrics.items()]
    for title, columns, note, axes in parts:
        fields = ["name", *(f for f in columns if any(row.get(f) is not None for row in rows))]
        drawn = [figure(functools.partial(bars, rows=rows, field=field), height=1.0 + 0.28 * len(rows))
                 for field in fields[1:2]]  # fmt: skip
        if axes and any(row.get(axes[0]) is not None and row.get(axes[1]) is not None for row in rows):
            drawn.append(figure(functools.partial(scatter, rows=rows, x=axes[0], y=axes[1])))
        body = table(rows, fields, mark=lambda row: row["name"] in YARDSTICKS)
        sections.append((title, note, body + plots(*drawn)))
    if notes := [row for row in rows if row.get("note")]:
        sections.append(("Notes", "What could not be computed, and why.", table(notes, ("name", "note"))))
    bits = out.config["quantize"]
    lead = "What did each model forget, and what does it still know? The goal of unlearning is the model that never "
    lead += "saw the forget set: the row `retrained`. Intervals are over items; yardsticks are red in the plots."
    lead += f" Weights of all models went through {bits} bits." if bits else ""
    write_page(out.directory / "report.html", "Unlearning, evaluated", f"{lead} {document['device']}.", sections,
               document["config"], list(dict.fromkeys(told(rows, columns) for _, columns, _, _ in parts)))  # fmt: skip


def told(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> str:
    """Give the first column that was measured for every model, of at most eight."""
    measured = [f for f in columns if any(row.get(f) is not None for row in rows)]
    if not measured:
        return f"Nothing of {', '.join(columns[:3])} could be measured."
    field = measured[0]
    values = [f"`{row['name']}` {cell(row.get(field), row.get(f'{field}_ci95'))}" for row in rows[:8]]
    name = field.replace("_", " ").capitalize()
    return f"{name}: {', '.join(values)}{', …' if len(rows) > 8 else ''}. {meaning(field) or ''}"


def bars(axes, rows: list[dict[str, Any]], field: str) -> None:
    """Draw a field of every model, yardsticks apart in colour."""
    shown = [row for row in rows if row.get(field) is not None][::-1]
    colours = ["#c0392b" if row["name"] in YARDSTICKS else "C0" for row in shown]
    spans = [row.get(f"{field}_ci95") or 0.0 for row in shown]
    axes.barh(range(len(shown)), [row[field] for row in shown], xerr=spans, color=colours, height=0.6)
    axes.set(yticks=range(len(shown)), yticklabels=[row["name"] for row in shown], xlabel=label(field),
             ylabel="model")  # fmt: skip


def scatter(axes, rows: list[dict[str, Any]], x: str, y: str) -> None:
    """Draw one field against another with intervals; a good method lands on the star, the retrained model."""
    for index, row in enumerate(rows):
        if row.get(x) is not None and row.get(y) is not None:
            style = {"original": ("s", "black", 60), "retrained": ("*", "#c0392b", 190)}.get(row["name"])
            marker, colour, size = style or ("o", f"C{index % 10}", 45)
            axes.errorbar(row[x], row[y], xerr=row.get(f"{x}_ci95"), yerr=row.get(f"{y}_ci95"), color=colour, lw=1)
            axes.scatter(row[x], row[y], marker=marker, color=colour, s=size, label=row["name"], zorder=3)
    axes.set(xlabel=label(x), ylabel=label(y))
    axes.legend()


if __name__ == "__main__":
    command.main(run, PRESETS)
