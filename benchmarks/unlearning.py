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
set is deleted exactly (SISA), stands beside.

Trainings, sweeps and measurements are cells, each a file: a killed run resumes there.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import tyro

from jaxforget import command
from jaxforget.data import fictional
from jaxforget.data.sampling import id_keys, order
from jaxforget.data.sources import Record
from jaxforget.data.text import TextConfig, encode, read, tokenizer_texts
from jaxforget.data.tokens import Examples, concatenate, same_widths
from jaxforget.errors import UserError
from jaxforget.metrics import benchmark, memorisation, tofu
from jaxforget.metrics.benchmark import MeasureConfig
from jaxforget.metrics.composite import harmonic_mean
from jaxforget.metrics.evidence import Evidence, Reader, Request, Scored, gather, mean_losses, require_questions
from jaxforget.models import hub
from jaxforget.models.quantize import quantized
from jaxforget.report.page import figure, table, write_page
from jaxforget.report.run import Run, plain, write_atomic
from jaxforget.report.statistics import over_seeds
from jaxforget.sisa.deletion import ask, serve
from jaxforget.sisa.ensemble import Ensemble, locked
from jaxforget.sisa.plan import epoch_schedule
from jaxforget.sisa.scoring import ensemble_token_scores
from jaxforget.training.batches import Batches, Stream
from jaxforget.training.checkpoints import load_tree, save_tree
from jaxforget.training.ensemble import MemberBatches, Members, member, members, stack
from jaxforget.training.gradients import mean_gradient
from jaxforget.training.loop import fit
from jaxforget.training.lora import LoraConfig, moving_parts
from jaxforget.training.objectives import next_token
from jaxforget.training.optimizer import TrainConfig, adamw, set_schedule
from jaxforget.training.start import ComputeConfig, SizeConfig, Start, require_causal, start_from, tokenizer_files
from jaxforget.training.step import make_step
from jaxforget.training.trainable import everything
from jaxforget.unlearning import Method, Setting, adjust, check_setting, choose
from jaxforget.unlearning.sweep import grid, strengthened, sweep
from jaxforget.unlearning.tuning import YARDSTICKS, criterion, curves, heat_map, over_settings, robustness, trade_off
from train import sisa


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Compare unlearning methods, each at its best of a sweep, with retraining."""

    out: Path | None = None
    """Directory for everything the run leaves. Must be empty."""
    resume: bool = False
    """Continue the run in --out; settings must be the same."""
    methods: tuple[str, ...] = ("all",)
    """Names from METHODS in jaxforget/unlearning/__init__.py; paper is the seven of arXiv 2402.15159, all is every
    one."""
    settings: tuple[str, ...] = ()
    """Method settings as method.field=value."""
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    """Rates of every method."""
    strengths: tuple[float, ...] = (0.5, 1.0, 4.0)
    """Factors of the weight of the retain term; methods without one have 1 alone."""
    checkpoints: int = 3
    """Evenly spaced steps of each run at which models are measured and may be chosen."""
    seeds: int = 3
    """Seeds of training and unlearning."""
    base: str | None = None
    """Model to train both yardsticks from, as a Hugging Face directory or hub name. Not given: from scratch."""
    tokenizer: str | None = None
    """Tokenizer directory or hub name. Default: the model's own, or one built from the retain text."""
    forget: str | None = None
    """Questions and answers to forget, with TOFU's paraphrased_answer and perturbed_answer."""
    retain: str | None = None
    """Questions and answers that stay in training."""
    retain_perturbed: str | None = None
    """Those of --retain that are measured, with the fields of --forget; --retain itself when not given."""
    approximate: str | None = None
    """Never-trained records of the same kind. Default: as many as --forget has, from the end of --retain, which are
    then left out of all training."""
    general: str | None = None
    """Other text that must stay known."""
    real_authors: str | None = None
    """TOFU's questions about real authors, with perturbed_answer."""
    world_facts: str | None = None
    """TOFU's questions about the world, with perturbed_answer."""
    metrics: tuple[str, ...] = ("language", "overall")
    """Metrics of eval.unlearning to report; overall is tofu, memorisation and membership."""
    validation_records: int = 60
    """Most records of a set in its validation half."""
    test_records: int = 200
    """Most records of a set in its test half."""
    bits: tuple[int, ...] = (8, 4)
    """Widths of quantised weights that chosen models are measured with."""
    relearn: TrainConfig = TrainConfig(epochs=1, learning_rate=1e-3, schedule="constant", warmup=0.0)
    """How chosen models are tuned on the forget set again."""
    relearn_every: int = 2
    """Steps between measurements meanwhile; 0 leaves this attack out."""
    shards: int = 4
    """Shards of the ensemble from which the forget set is deleted exactly (SISA); 0 leaves it out."""
    slices: int = 2
    """Slices of a shard."""
    requests: int = 5
    """Parts of the forget set that are also unlearned one after another; 0 leaves this out."""
    trainable: tuple[str, ...] = ()
    """Unlearn in parameters whose path matches one of these regular expressions alone."""
    lora: LoraConfig = LoraConfig(rank=0)
    members: Members = "auto"
    """How one program trains many models; auto is map on a CPU and vmap elsewhere."""
    width: int = 0
    """Models in one program, which bounds memory; 0 is all."""
    compute: Annotated[ComputeConfig, tyro.conf.arg(name="")] = ComputeConfig(dtype="float32")
    measures: Annotated[MeasureConfig, tyro.conf.arg(name="measures")] = MeasureConfig(max_new_tokens=32)
    unlearning: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig(
        epochs=6, learning_rate=0.0, schedule="constant", warmup=0.0
    )
    train: TrainConfig = TrainConfig(epochs=12, learning_rate=3e-3)
    text: Annotated[TextConfig, tyro.conf.arg(name="")] = TextConfig()
    size: SizeConfig = SizeConfig()
    corpus: fictional.FictionalConfig = fictional.FictionalConfig()


def default() -> Config:
    """100 fictional people, a model of 0.3 M parameters, twenty methods, 27 runs of each"""
    return Config()


def smoke() -> Config:
    """12 fictional people, a tiny model, three methods; two minutes, numbers without meaning"""
    return Config(
        methods=("gradient_ascent", "npo", "task_vector"), learning_rates=(1e-3, 1e-2), strengths=(1.0, 4.0), seeds=2,
        checkpoints=2, validation_records=12, test_records=12, bits=(4,), requests=2, shards=2,
        size=SizeConfig(width=32, layers=2, heads=2, context=64, vocab_size=512),
        corpus=fictional.FictionalConfig(people=12, general_records=40, general_test_records=20),
        train=TrainConfig(epochs=15, learning_rate=5e-3), measures=MeasureConfig(max_new_tokens=12),
        unlearning=dataclasses.replace(Config().unlearning, epochs=4, batch_size=4),
        relearn=dataclasses.replace(Config().relearn, batch_size=4),
    )  # fmt: skip


PRESETS = {"default": default, "smoke": smoke}
MEASURED = ("forget", "retain", "approximate", "general", "real_authors", "world_facts")


class Half(NamedTuple):
    """Records to measure, and what `knows` asks of a model about them."""

    sets: Mapping[str, list[Record]]
    reader: Reader
    asked: Request


class Study(NamedTuple):
    """What is read before anything is trained."""

    start: Start
    records: Mapping[str, list[Record]]  # of training
    setting: Setting  # neither parameters nor a seed yet
    methods: Mapping[str, Method]
    metrics: Mapping[str, Any]
    validation: Half
    test: Half
    reported: Request  # what the metrics ask about the test half
    measures: MeasureConfig


def run(config: Config) -> None:
    """Do the cells that are missing, then join them."""
    out = Run("benchmarks.unlearning", config, config.out, config.resume)
    study = prepare(config)
    out.begin()
    models = {name: [home(out, name, seed) for seed in range(config.seeds)] for name in (*YARDSTICKS, *study.methods)}
    cost = cell(out, "yardsticks", lambda: train_yardsticks(config, study, models))
    before = cell(out, "validation", lambda: [validate(study, loaded(study, path)) for path in models["original"]])
    swept = {name: cell(out, f"sweep {name}", lambda name=name: sweep_method(config, out, study, name, models, before))
             for name in study.methods}  # fmt: skip
    there = [name for name in models if name in YARDSTICKS or swept[name]["chosen"]]
    found = {(name, seed): cell(out, f"test {name} {seed}", lambda path=path: test(config, study, path))
             for name in there for seed, path in enumerate(models[name])}  # fmt: skip
    learned = cell(out, "relearn", lambda: relearn(config, study, there, models)) if config.relearn_every else []
    parts = requests_of(config, study)
    served = [one for name in there if parts for one in cell(out, f"requests {name}", lambda name=name: serve_requests(
        config, out, study, parts, models["original"], models[name], name, swept.get(name)))]  # fmt: skip
    deleted = [cell(out, f"sisa {seed}", lambda seed=seed: exact(config, out, study, seed))
               for seed in range(config.seeds) if config.shards]  # fmt: skip
    rows = [rows_of(study, seed, found, swept, cost, learned, served, deleted) for seed in range(config.seeds)]
    report(config, out, study, rows, swept, learned, served)


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


# ---------------------------------------------------------------------------------------------------- data
def prepare(config: Config) -> Study:
    """Read, check and tokenise everything, or raise UserError."""
    command.at_least(1, seeds=config.seeds, checkpoints=config.checkpoints, test_records=config.test_records,
                     validation_records=config.validation_records)  # fmt: skip
    command.at_least(0, relearn_every=config.relearn_every, width=config.width, requests=config.requests,
                     shards=config.shards)  # fmt: skip
    epoch_schedule(config.train.epochs, config.slices)
    for field in ("methods", "learning_rates", "strengths"):
        if not getattr(config, field):
            raise UserError(f"--{field.replace('_', '-')} is empty; give one or more")
    for rate in config.learning_rates:
        dataclasses.replace(config.unlearning, learning_rate=rate)
    if wrong := [bits for bits in config.bits if bits not in (8, 4)]:
        raise UserError(f"--bits {wrong[0]} is unknown; use 8 or 4")
    methods = adjust(choose(config.methods), config.settings)
    for method in methods.values():
        for one in grid(method, [None], config.learning_rates, config.strengths):
            strengthened(method, one.strength)
    metrics = benchmark.choose(config.metrics)
    records, measured = read_sets(config)
    known = records["retain"] + records.get("general", [])
    texts = tokenizer_texts(known, config.text) if config.forget else fictional.tokenizer_texts(known)
    start = start_from(config.base, tokenizer_name=config.tokenizer, size=config.size, compute=config.compute,
                       texts=texts, tell=command.say)  # fmt: skip
    require_causal(start.model, config.base)
    moving = moving_parts(config.trainable, config.lora)
    jax.eval_shape(moving.init, jax.random.key(0), {"model": start.model.shapes()})  # tells what matches nothing

    def tokens(some: Sequence[Record], where: str = "other answers") -> Examples:
        return encode(some, start.tokenizer, config.text, context=start.model.max_length, where=where,
                      tell=lambda said: None)  # fmt: skip

    setting = Setting(
        start.model, None, {name: tokens(some, name) for name, some in records.items()}, config.unlearning.batch_size,
        0, tuple(sorted(set(start.tokenizer.all_special_ids))), start.tokenizer.pad_token_id, records["forget"],
        start.tokenizer, tokens,
    )  # fmt: skip
    for name, method in methods.items():
        check_setting(method, name, setting)
    halves: dict[str, dict[str, list[Record]]] = {"validation": {}, "test": {}}
    for name, some in measured.items():
        for half, mine in halved(some).items():
            most = {"validation": config.validation_records, "test": config.test_records}[half]
            halves[half][name] = mine[:most]
            if not mine:
                raise UserError(f"the set {name} has {len(some)} records, too few for two halves")
    if config.requests > (most := len(halves["test"]["forget"])):
        raise UserError(f"--requests is {config.requests}; the test half of the forget set has {most} records")
    benchmark.require(metrics, halves["test"])
    parts = []
    for sets in halves.values():  # a reader each: it keeps what it tokenised by the sets' names
        if not tofu.wrong_answers(sets["forget"]):
            raise UserError("--forget has no wrong answers (field 'perturbed_answer'), which the criterion needs")
        reader = Reader(start.model, start.tokenizer, config.text)
        parts.append(Half(sets, reader, asked_of(reader, sets)))
    reported = benchmark.request(metrics, parts[1].reader, halves["test"], config.measures)
    return Study(start, records, setting, methods, metrics, *parts, reported, config.measures)


def read_sets(config: Config) -> tuple[dict[str, list[Record]], dict[str, list[Record]]]:
    """Return the sets to train on and those to measure."""
    if not config.forget:
        if given := [name for name in (*MEASURED, "retain_perturbed") if getattr(config, name)]:
            raise UserError(f"--forget is missing, but --{given[0].replace('_', '-')} is given; give both or neither")
        sets = fictional.generate(config.corpus)
        trained = {name: sets[name] for name in ("forget", "retain", "general") if sets[name]}
        measured = {"forget": sets["forget"], "retain": sets["retain"], "approximate": sets["approximate"],
                    "general": sets["general_test"]}  # fmt: skip
    else:
        if not config.retain:
            raise UserError("--retain is missing; the retrained model is trained on it")
        sets = {name: read(source, config.text) for name in (*MEASURED, "retain_perturbed")
                if (source := getattr(config, name))}  # fmt: skip
        if not config.approximate:
            cut = max(0, len(sets["retain"]) - len(sets["forget"]))
            sets["retain"], sets["approximate"] = sets["retain"][:cut], sets["retain"][cut:]
        trained = {name: sets[name] for name in ("forget", "retain", "general") if name in sets}
        measured = {name: sets[name] for name in MEASURED if name in sets}
        measured["retain"] = sets.get("retain_perturbed", sets["retain"])
    questions = {name: {(record.prompt, record.text) for record in some} for name, some in sets.items()}
    for one, other in (("forget", "retain"), ("forget", "approximate"), ("retain", "approximate"),
                       ("retain_perturbed", "approximate"), ("forget", "retain_perturbed")):  # fmt: skip
        if shared := questions.get(one, set()) & questions.get(other, set()):
            raise UserError(f"--{one.replace('_', '-')} and --{other} share {len(shared)} records, such as "
                            f"{min(shared, key=str)[1]!r}; they must not")  # fmt: skip
    for name in ("forget", "retain"):
        require_questions(trained[name], name, "criterion")
    return trained, {name: some for name, some in measured.items() if some}


def halved(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Cut records in two by a hash of their ids."""
    drawn = [records[i] for i in order(id_keys([record.id for record in records]), 0, 0)]
    return {"validation": drawn[: len(drawn) // 2], "test": drawn[len(drawn) // 2 :]}


def asked_of(reader: Reader, sets: Mapping[str, list[Record]]) -> Request:
    """Ask for what `knows` reads."""
    joined = Request()
    for name in ("forget", *tofu.UTILITY):
        if name in sets:
            joined |= tofu.ask_ratios(reader, name, sets[name])
    return joined


# -------------------------------------------------------------------------------------------------- models
def side_by_side(config: Config, study: Study, label: str, params_K, examples_K, seed_K, training, watch=None,
                 every: int = 0) -> tuple[list[Any], dict[str, float]]:  # fmt: skip
    """Train models on sets of their own in one program, or in several of --width. Returns (params, cost).

    watch(k, step, params) is called every `every` steps and at the end.
    """
    model, found, cost = study.start.model, [], {"seconds": 0.0, "steps": 0, "tokens": 0}
    gradient = mean_gradient(training.microbatch_of(training.batch_size))
    step = make_step(next_token(model), everything(), gradient, adamw(training))
    examples_K, width = same_widths(list(examples_K)), config.width or len(params_K)
    for first in range(0, len(params_K), width):
        group = range(first, min(first + width, len(params_K)))
        batches = MemberBatches(tuple(Batches((Stream(examples_K[k], training.batch_size),), training.epochs,
                                              seed_K[k], "token") for k in group))  # fmt: skip
        started = [step.init(jax.random.key(seed_K[k]), {"model": params_K[k]}) for k in group]
        state = set_schedule(stack([one for one, _ in started]), learning_rate=[training.learning_rate] * len(group),
                             total=[mine.steps for mine in batches.members])  # fmt: skip

        def models(parts_K, group=group):
            host_K = jax.tree.map(np.asarray, parts_K["model"])
            return [member(host_K, k) for k in range(len(group))]

        def evaluate(at: int, parts_K, group=group) -> bool:
            for k, params in zip(group, models(parts_K, group), strict=True):
                watch(k, at, params)
            return False

        lifted, frozen = members(step, config.members), started[0][1]
        with command.progress(label) as show:
            outcome = fit(lifted, state, frozen, batches, finite=watch is None, evaluate=watch and evaluate,
                          evaluate_every=every, show=show)  # fmt: skip
        found += models(lifted.combine(frozen, outcome.state.trainable), group)
        cost = {"seconds": cost["seconds"] + outcome.seconds, "tokens": cost["tokens"] + outcome.tokens,
                "steps": cost["steps"] + sum(mine.steps for mine in batches.members)}  # fmt: skip
    return found, cost


def keep(path: Path, params) -> None:
    """Save parameters; what an interrupted run left there is replaced."""
    shutil.rmtree(path, ignore_errors=True)
    save_tree(path, params)


def loaded(study: Study, path: Path) -> Any:
    return load_tree(path, study.start.params(0))


def train_yardsticks(config: Config, study: Study, models: Mapping[str, list[Path]]) -> dict[str, float]:
    """Train `original` and `retrained` of all seeds. General text is trained on from scratch alone."""
    sets, seeds = study.setting.sets, range(config.seeds)
    rest = [sets["retain"]] + ([sets["general"]] if config.base is None and "general" in sets else [])
    data = {"original": concatenate([sets["forget"], *rest]), "retrained": concatenate(rest)}
    runs = [(name, seed) for name in YARDSTICKS for seed in seeds]
    found, cost = side_by_side(
        config, study, "original and retrained", [study.start.params(seed) for _, seed in runs],
        [data[name] for name, _ in runs], [seed for _, seed in runs], config.train,
    )  # fmt: skip
    for (name, seed), params in zip(runs, found, strict=True):
        keep(models[name][seed], params)
    return cost


def sweep_method(config: Config, out: Run, study: Study, name: str, models: Mapping[str, list[Path]],
                 before: Sequence[Mapping[str, Any]]) -> dict[str, Any]:  # fmt: skip
    """Run all settings of a method, choose one by the criterion and keep its models."""
    method, scratch = study.methods[name], out.directory / "scratch" / name
    shutil.rmtree(scratch, ignore_errors=True)
    settings = [study.setting._replace(params=loaded(study, path), seed=seed, cache=out.directory / "reference")
                for seed, path in enumerate(models["original"])]  # fmt: skip
    runs = grid(method, settings, config.learning_rates, config.strengths)
    steps = config.unlearning.epochs * -(-len(study.setting.sets["forget"]) // config.unlearning.batch_size)
    every, width = -(-steps // config.checkpoints), config.width or len(runs)
    points, notes = [], []
    cost = {"runs": len(runs), "seconds": 0.0, "steps": 0, "tokens": 0}
    for first in range(0, len(runs), width):
        group = runs[first : first + width]

        def evaluate(step: int, params, first=first, group=group) -> None:
            for k, (one, mine) in enumerate(zip(group, params, strict=True), first if step else len(runs)):
                if k < len(runs):
                    found = validate(study, mine)
                    points.append({"learning_rate": one.learning_rate, "strength": one.strength, "step": step,
                                   "seed": one.setting.seed, **found,
                                   "criterion": criterion(found, before[one.setting.seed])})  # fmt: skip
                    save_tree(scratch / f"{step}-{k}", mine)

        with command.progress(f"{name}: {len(group)} runs") as show:
            swept = sweep(method, group, config.unlearning, moving_parts(config.trainable, config.lora),
                          how=config.members, evaluate=evaluate, evaluate_every=every, show=show)  # fmt: skip
        notes += [f"rate {one.learning_rate:g}, strength {one.strength:g}, seed {one.setting.seed}: {note}"
                  for one, note in zip(group, swept.notes, strict=True) if note]  # fmt: skip
        cost = {**cost, "seconds": cost["seconds"] + swept.outcome.seconds,
                "steps": cost["steps"] + swept.outcome.steps * len(group),
                "tokens": cost["tokens"] + swept.outcome.tokens}  # fmt: skip
    means = over_settings(points, config.seeds)
    best = max((one for one in means if one["criterion"] is not None), key=lambda one: one["criterion"], default=None)
    if best is not None:
        for k, one in enumerate(runs):
            if (one.learning_rate, one.strength) == (best["learning_rate"], best["strength"]):
                target = models[name][one.setting.seed]
                shutil.rmtree(target, ignore_errors=True)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(scratch / f"{best['step']}-{k}", target)
    shutil.rmtree(scratch, ignore_errors=True)
    return {"grid": means, "chosen": best, "robustness": robustness(means), "cost": cost, "notes": notes}


# -------------------------------------------------------------------------------------------- measurements
def knows(reader: Reader, params, asked: Request, sets: Mapping[str, list[Record]], config: MeasureConfig) -> dict:
    """Return Memorisation with its parts, the forget loss and utility without writing; None for what is not finite."""
    return said(gather(reader, params, asked, config.batch_size), reader, sets, config)


def said(evidence: Evidence, reader: Reader, sets: Mapping[str, list[Record]], config: MeasureConfig) -> dict[str, Any]:
    """Return what `knows` does, of answers that are there."""
    row = memorisation.summarise(memorisation.measure(evidence, reader, sets, config), None)
    row = {name: row[name] for name in ("memorisation", "es", "em", "paraprob", "truth")}
    row["forget_nll"] = float(np.mean(mean_losses(evidence.scored["forget"], sets["forget"])))
    parts = []
    for name in (name for name in tofu.UTILITY if name in sets):
        probability_N = np.exp(-mean_losses(evidence.scored[name], sets[name]))
        if name in tofu.CHOICES:
            right_N = mean_losses(evidence.scored[name], sets[name])
            probability_N = tofu.choice_probability(right_N, tofu.wrong_losses(evidence, name, sets[name]))
        parts.append(np.mean(probability_N))
        if ratios := tofu.ratios_of(evidence, name, sets[name]):
            parts.append(np.mean(tofu.utility_truth(ratios["log_t2"])))
    row["utility"] = harmonic_mean(parts)
    return {name: value if value is not None and np.isfinite(value) else None for name, value in row.items()}


def validate(study: Study, params) -> dict[str, Any]:
    return look(study, study.validation, params)


def look(study: Study, half: Half, params) -> dict[str, Any]:
    """Return what a model knows of a half."""
    return knows(half.reader, params, half.asked, half.sets, study.measures)


def relearn(config: Config, study: Study, names: Sequence[str], models: Mapping[str, list[Path]]) -> list:
    """Tune every model but the original on the forget set again, side by side; measure the test half on the way."""
    runs = [(name, seed) for name in names if name != "original" for seed in range(config.seeds)]
    points = []

    def watch(k: int, step: int, params) -> None:
        points.append({"name": runs[k][0], "seed": runs[k][1], "step": step, **look(study, study.test, params)})

    forget = study.setting.sets["forget"]
    start_K = [loaded(study, models[name][seed]) for name, seed in runs]
    side_by_side(config, study, "relearning", start_K, [forget] * len(runs), [seed for _, seed in runs], config.relearn,
                 watch, config.relearn_every)  # fmt: skip
    return points


def test(config: Config, study: Study, path: Path) -> dict[str, Any]:
    """Measure a model on the test half: items of the metrics, and what it knows with its weights in fewer bits."""
    params, one = loaded(study, path), study.test
    items = benchmark.measure(study.metrics, study.reported, one.reader, params, one.sets, config.measures)
    bits = {}
    for width in (32, *config.bits):
        weights = params if width == 32 else quantized(one.reader.model, params, width)
        found = look(study, one, weights)
        bits |= {f"{name}_{width}bit": found[name] for name in ("memorisation", "es", "utility")}
    return {"items": items, "bits": bits}


# ------------------------------------------------------------------------------------------------ requests
class Asked(NamedTuple):
    """A request to forget some records. half: the test records of this request and those before, and what must stay."""

    records: list[Record]
    examples: Examples
    half: Half


def requests_of(config: Config, study: Study) -> list[Asked]:
    """Cut the forget set in parts, the test half evenly, by a hash of the ids."""
    if not config.requests:
        return []
    setting, test = study.setting, study.test
    by_half = [record.id for half in halved(setting.records).values() for record in half]
    part_of = {identity: rank % config.requests for rank, identity in enumerate(by_half)}
    found = []
    for number in range(config.requests):
        records = [record for record in setting.records if part_of[record.id] == number]
        forget = setting.sets["forget"]
        examples = forget.take(np.flatnonzero([part_of[identity] == number for identity in forget.ids]))
        sets = {**test.sets, "forget": [one for one in test.sets["forget"] if part_of[one.id] <= number]}
        reader = Reader(test.reader.model, test.reader.tokenizer, test.reader.text)
        found.append(Asked(records, examples, Half(sets, reader, asked_of(reader, sets))))
    return found


def serve_requests(config: Config, out: Run, study: Study, parts: Sequence[Asked], original: Sequence[Path],
          models: Sequence[Path], name: str, swept: Mapping[str, Any] | None) -> list[dict[str, Any]]:  # fmt: skip
    """Unlearn one request after another, each from the model before, all seeds side by side; measure after each.

    A yardstick serves none: it is measured on the same records.
    """
    if swept is None:
        return [{"name": name, "seed": seed, "request": number, **look(study, one.half, params)}
                for seed, params in enumerate(loaded(study, path) for path in models)
                for number, one in enumerate(parts, 1)]  # fmt: skip
    chosen = swept["chosen"]
    epoch = -(-len(study.setting.sets["forget"]) // config.unlearning.batch_size)
    training = dataclasses.replace(config.unlearning, epochs=max(1, round(chosen["step"] / epoch)))
    params_K, points = [loaded(study, path) for path in original], []
    for number, one in enumerate(parts, 1):
        settings = [study.setting._replace(params=params, seed=seed, cache=out.directory / "reference",
                                           sets={**study.setting.sets, "forget": one.examples}, records=one.records)
                    for seed, params in enumerate(params_K)]  # fmt: skip
        runs = grid(study.methods[name], settings, (chosen["learning_rate"],), (chosen["strength"],))
        moving = moving_parts(config.trainable, config.lora)
        params_K = sweep(study.methods[name], runs, training, moving, how=config.members).params
        points += [{"name": name, "seed": seed, "request": number, **look(study, one.half, params)}
                   for seed, params in enumerate(params_K)]  # fmt: skip
    return points


# ---------------------------------------------------------------------------------------------------- exact
def exact(config: Config, out: Run, study: Study, seed: int) -> dict[str, Any]:
    """Train a SISA ensemble on all records, delete the forget set from it, and measure it before and after."""
    directory, start = out.directory / "sisa" / f"seed{seed}", study.start
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    base = hub.save(directory / "start", start.model, start.params(seed),
                    extra_files=tokenizer_files(start.save_tokenizer))  # fmt: skip
    known = [dataclasses.replace(one, id=f"{name} {one.id}") for name, some in study.records.items()
             if name != "general" or config.base is None for one in some]  # fmt: skip
    files = []
    for name, plain_text in (("questions", False), ("texts", True)):
        lines = [json.dumps({"id": one.id, "text": one.text} if plain_text else
                            {"id": one.id, "question": one.prompt, "answer": one.text}) + "\n"
                 for one in known if (one.prompt is None) == plain_text]  # fmt: skip
        if lines:
            write_atomic(directory / f"{name}.jsonl", "".join(lines))
            files.append(str(directory / f"{name}.jsonl"))
    text = TextConfig(id_field="id", max_length=config.text.max_length, prompt_template=config.text.prompt_template)
    settings = sisa.Config(out=directory / "ensemble", data=tuple(files), model=str(base), shards=config.shards,
                           slices=config.slices, seed=seed, text=text, train=config.train, compute=config.compute,
                           members=config.members, export=False)  # fmt: skip
    sisa.plan(settings, Run("train.sisa", settings, settings.out, False))
    with Ensemble(settings.out) as ensemble, locked(settings.out, wait=True, tell=command.say):
        serve(ensemble, export=False)
        before = vote(study, ensemble)
        ensemble.ledger.receive(ask(ensemble, [f"forget {one.id}" for one in study.records["forget"]]).new)
        (receipt,) = serve(ensemble, export=False)
        after = vote(study, ensemble)
    cost = {"deletion_seconds": receipt["seconds"],
            "deletion_share": receipt["examples_revisited"] / receipt["examples_of_full_retraining"]}  # fmt: skip
    return {"before": before, "after": {**after, **cost}}


def vote(study: Study, ensemble: Ensemble) -> dict[str, Any]:
    """Return what the members know together: the mean of their probabilities."""
    one = study.test
    params, weight_K = [ensemble.params(shard) for shard in ensemble.final_keys()], ensemble.weights()
    scored = {}
    for name, examples in one.asked.scored.items():
        scores = ensemble_token_scores(ensemble.model, params, examples, "mean_probability", weight_K)
        scored[name] = Scored(examples, scores, np.zeros_like(scores.logp_NT))
    return said(Evidence(scored, {}, {}), one.reader, one.sets, study.measures)


# -------------------------------------------------------------------------------------------------- report
def rows_of(study: Study, seed: int, tested, swept, cost, learned, served, deleted) -> list[dict[str, Any]]:
    """Return the rows of a seed: original, retrained, then the methods."""
    rows: list[dict[str, Any]] = []
    for name in (*YARDSTICKS, *study.methods):
        row: dict[str, Any] = {"name": name}
        if (name, seed) in tested:
            row |= benchmark.summarise(tested[name, seed]["items"], tested["retrained", seed]["items"])
            row["utility"] = row.get("utility") or harmonic_mean(utility_parts(row))
            row |= benchmark.overall(row, rows[0] if rows else row)
            row |= tested[name, seed]["bits"]
            row |= last(learned, name, seed, "relearned", ("es", "forget_nll", "memorisation"))
            row |= last(served, name, seed, "requests", ("es", "memorisation", "utility"))
        if name in swept:
            found = swept[name]
            row |= {key: found["chosen"][key] if found["chosen"] else None
                    for key in ("learning_rate", "strength", "step", "criterion")}  # fmt: skip
            row |= {"robustness": found["robustness"], **{f"tuning_{key}": x for key, x in found["cost"].items()}}
            row["diverged"] = len(found["notes"])
        else:
            row |= {f"tuning_{key}": cost[key] / len(YARDSTICKS) for key in ("seconds", "steps", "tokens")}
        rows.append(row)
    for when, name in (("before", "sisa before"), ("after", "sisa")):
        for one in deleted[seed : seed + 1]:
            found = dict(one[when])
            rows.append({"name": name, "utility_32bit": found.pop("utility"), **found,
                         "memorisation_32bit": found["memorisation"], "es_32bit": found["es"]})  # fmt: skip
    return rows


def utility_parts(row: Mapping[str, Any]) -> list[float | None]:
    """Return probability, ROUGE and truth ratio T2 of the sets there are, where real authors and facts are not."""
    sets = [name for name in tofu.UTILITY if f"tofu_{name}_probability" in row]
    parts = [f"tofu_{name}_{kind}" for name in sets for kind in ("probability", "rouge", "truth_ratio_t2")]
    return [row[part] for part in parts if part in row]


def last(points: Sequence[dict], name: str, seed: int, prefix: str, fields: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a model's last point."""
    mine = [one for one in points if (one["name"], one["seed"]) == (name, seed)]
    return {f"{prefix}_{field}": mine[-1][field] for field in fields} if mine else {}


TERMINAL = ("name", "overall", "memorisation", "privacy", "utility_rel", "es", "forget_nll", "retain_nll", "robustness",
            "learning_rate", "strength", "step")  # fmt: skip
TUNING = ("name", "criterion", "robustness", "learning_rate", "strength", "step", "diverged", "tuning_runs",
          "tuning_steps", "tuning_tokens", "tuning_seconds")  # fmt: skip


def report(config: Config, out: Run, study: Study, by_seed, swept, learned, served) -> None:
    """Join the seeds; write results.json and the page."""
    document = out.finish(over_seeds(by_seed), by_seed=by_seed, sweeps=swept, relearning=learned, requests=served)
    rows = document["results"]
    mark = lambda row: row["name"] in YARDSTICKS  # noqa: E731
    spans = f"means and 95 % intervals over {config.seeds} seeds" if config.seeds > 1 else "one seed"

    def section(title: str, note: str, fields: Sequence[str], plots: Sequence[str] = ()):
        fields = ["name", *(f for f in fields if f != "name" and any(row.get(f) is not None for row in rows))]
        return title, note, f"{table(rows, fields, mark)}<div class='plots'>{''.join(plots)}</div>"

    sections = []
    if any(row.get("memorisation") is not None and row.get("utility") is not None for row in rows):
        sections.append(section("Overall", benchmark.OVERALL_NOTE, benchmark.OVERALL, [figure(trade_off(rows))]))
    maps = [figure(heat_map(name, found["grid"]), width=3.2, height=2.7) for name, found in swept.items()]
    note = ("The criterion over learning rates and strengths on the validation halves, each at its best checkpoint; "
            "the mean over seeds. Robustness: the share of settings within 10 % of the best. Tuning: the cost of all "
            "runs together; for the yardsticks, of their training.")  # fmt: skip
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
        note = (f"An ensemble of {config.shards} shards with {config.slices} slices, before and after the forget set "
                "was deleted; deletion share: examples visited, of those of a full retraining. Utility without ROUGE.")
        sections.append(section("Exact deletion", note, ("memorisation_32bit", "es_32bit", "utility_32bit",
                                "forget_nll", "deletion_share", "deletion_seconds")))  # fmt: skip
    if served:
        sections.append(section(
            "Requests", "The forget set in parts, one after another, each from the model before; measured on all that "
            "had to be forgotten so far, in the table after the last. Utility without ROUGE. Yardsticks are dashed.",
            ("requests_memorisation", "requests_es", "requests_utility", "memorisation_32bit", "utility_32bit"),
            [figure(curves(served, field, "request")) for field in ("memorisation", "utility")],
        ))  # fmt: skip
    sections += [section(name.capitalize(), metric.note, metric.columns) for name, metric in study.metrics.items()]
    notes = [{"name": name, "note": note} for name, found in swept.items() for note in found["notes"]]
    if notes := [row for row in rows if row.get("note")] + notes:
        sections.append(("Notes", "What could not be computed, and why.", table(notes, ("name", "note"))))
    lead = f"Test halves; {spans}. The goal is the row `retrained`. {document['device']}."
    write_page(out.directory / "report.html", "Unlearning at its best", lead, sections, document["config"])
    shown = [field for field in TERMINAL if any(row.get(field) is not None for row in rows)]
    command.print_table(rows, shown, f"benchmarks.unlearning · {out.directory}")


if __name__ == "__main__":
    command.main(run, PRESETS)
