"""What is read before anything is trained: records in halves, methods, and what models are asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.unlearning import side_effects
from benchmarks.unlearning.config import Config
from jaxforget import checks, command
from jaxforget.data import fictional, stereotyped
from jaxforget.data.sampling import id_keys, order
from jaxforget.data.sources import Record
from jaxforget.data.text import encode, read, tokenizer_texts
from jaxforget.data.tokens import Examples
from jaxforget.errors import UserError
from jaxforget.metrics import benchmark, memorisation, tofu
from jaxforget.metrics.benchmark import MeasureConfig
from jaxforget.metrics.composite import harmonic_mean
from jaxforget.metrics.evidence import Evidence, Reader, Request, gather, mean_losses, require_questions
from jaxforget.metrics.language import token_loss
from jaxforget.sisa.plan import epoch_schedule
from jaxforget.training.lora import moving_parts
from jaxforget.training.start import Start, require_causal, start_from
from jaxforget.unlearning import Method, Setting, adjust, check_setting, choose
from jaxforget.unlearning.sweep import strengthened

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
    side: side_effects.Asked


def prepare(config: Config) -> Study:
    """Read, check and tokenise everything, or raise UserError."""
    command.at_least(1, seeds=config.seeds, checkpoints=config.checkpoints, test_records=config.test_records,
                     validation_records=config.validation_records, resamples=config.resamples)  # fmt: skip
    command.at_least(0, relearn_every=config.relearn_every, width=config.width, requests=config.requests,
                     shards=config.shards, choosing_seeds=config.choosing_seeds)  # fmt: skip
    checks.between(0, config.seeds, choosing_seeds=config.choosing_seeds)
    epoch_schedule(config.train.epochs, config.slices)
    for field in ("methods", "learning_rates", "strengths"):
        if not getattr(config, field):
            raise UserError(f"--{field.replace('_', '-')} is empty; give one or more")
    for rate in config.learning_rates:
        dataclasses.replace(config.unlearning, learning_rate=rate)
    if wrong := [bits for bits in config.bits if bits not in (8, 4)]:
        raise UserError(f"--bits {wrong[0]} is unknown; use 8 or 4")
    given = [name for name in MEASURED if getattr(config, name)] if config.forget else None
    notes: list[str] = []
    methods = adjust(choose(config.methods, given, notes.append), config.settings)
    for method in methods.values():
        for strength in config.strengths if getattr(method, "retain_weight", 0.0) else ():
            strengthened(method, strength)
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
        there = set(tokens(some, name).ids)
        if short := sum(record.id not in there for record in some):
            command.say(f"{short} records of the set {name} have no token to score within the length; not measured")
        some = [record for record in some if record.id in there]
        for half, mine in halved(some).items():
            most = {"validation": config.validation_records, "test": config.test_records}[half]
            halves[half][name] = mine[:most]
            if not mine:
                raise UserError(f"the set {name} has {len(some)} records, too few for two halves")
    if config.requests > (most := len(halves["test"]["forget"])):
        raise UserError(f"--requests is {config.requests}; the test half of the forget set has {most} records")
    benchmark.require(metrics, halves["test"])
    parts: dict[str, Half] = {}
    for half, sets in halves.items():  # a reader each: it keeps what it tokenised by the sets' names
        if not tofu.wrong_answers(sets["forget"]):
            raise UserError("--forget has no wrong answers (field 'perturbed_answer'), which the criterion needs")
        reader = Reader(start.model, start.tokenizer, config.text)
        parts[half] = Half(sets, reader, asked_of(reader, sets))
    reported = benchmark.request(metrics, parts["test"].reader, halves["test"], config.measures)
    side = side_effects.read(config, start, halves["test"]["retain"])
    for note in notes:  # not before what is wrong is told
        command.say(note)
    return Study(start, records, setting, methods, metrics, parts["validation"], parts["test"], reported,
                 config.measures, side)  # fmt: skip


def read_sets(config: Config) -> tuple[dict[str, list[Record]], dict[str, list[Record]]]:
    """Return the sets to train on and those to measure."""
    if not config.forget:
        if given := [name for name in (*MEASURED, "retain_perturbed") if getattr(config, name)]:
            raise UserError(f"--forget is missing, but --{given[0].replace('_', '-')} is given; give both or neither")
        sets = fictional.generate(config.corpus)
        sets["general"] += stereotyped.generate(config.stereotyped)["train"]
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


# -------------------------------------------------------------------------------------------- measurements
def knows(reader: Reader, params, asked: Request, sets: Mapping[str, list[Record]], config: MeasureConfig) -> dict:
    """Return Memorisation with its parts, the forget loss and utility without writing; None for what is not finite."""
    return said(gather(reader, params, asked, config.batch_size), reader, sets, config)


def said(evidence: Evidence, reader: Reader, sets: Mapping[str, list[Record]], config: MeasureConfig) -> dict[str, Any]:
    """Return what `knows` does, of answers that are there."""
    row = memorisation.summarise(memorisation.measure(evidence, reader, sets, config), None)
    row = {name: row[name] for name in ("memorisation", "es", "em", "paraprob", "truth")}
    row["forget_nll"] = token_loss(evidence.scored["forget"].scores)
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
