"""Train or fine-tune a language model or a classifier: `python -m train.lm --data FILE [--model DIR] --out DIR`.

Leaves a Hugging Face directory in OUT/model and, with --lora.rank, a PEFT adapter in OUT/adapter. Without --data it
trains on the generated corpus of fictional people.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from jaxforget import command
from jaxforget.data import fictional
from jaxforget.data.counterfactual import CounterfactualConfig, augment, load_swaps
from jaxforget.data.sources import Record
from jaxforget.data.tasks import class_names
from jaxforget.data.text import TextConfig, encode, read, tokenizer_texts
from jaxforget.errors import UserError
from jaxforget.files import remove
from jaxforget.metrics.classification import class_logp, classification_metrics
from jaxforget.metrics.language import language_metrics, masked_once, token_scores
from jaxforget.models.adapters import check_adapter, save_adapter
from jaxforget.privacy.accounting import PrivacyConfig
from jaxforget.privacy.recipe import check, private_run
from jaxforget.privacy.sampling import with_units
from jaxforget.report.page import cell, figure, plots, table, write_page
from jaxforget.report.run import Run
from jaxforget.training.batches import Batches, Stream
from jaxforget.training.gradients import mean_gradient
from jaxforget.training.lora import LoraConfig, moving_parts, with_head
from jaxforget.training.objectives import objective_for
from jaxforget.training.optimizer import TrainConfig, adamw
from jaxforget.training.stage import StageBatches, train_stage
from jaxforget.training.start import ComputeConfig, SizeConfig, Start, start_from
from jaxforget.training.step import make_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Train or fine-tune a language model."""

    out: Path | None = None
    """Directory for everything the run leaves; runs/<command>-<time> when not given. Must be empty."""
    resume: bool = False
    """Continue the run in --out; settings must be the same."""
    data: tuple[str, ...] = ()
    """Training text: .jsonl[.gz], .json, .csv, .tsv, .parquet files or hub names. Default: the generated corpus."""
    exclude: tuple[str, ...] = ()
    """Files whose records are left out of training, by id: retraining without them."""
    evaluate: tuple[str, ...] = ()
    """Files to score before and after training, besides the training text."""
    task: Literal["causal", "classification", "masked", "seq2seq"] = "causal"
    """What to learn: the next token, the class of a text, masked tokens, or an answer from an encoded question."""
    model: str | None = None
    """Hugging Face directory or hub name to start from. Default: from scratch, see --size.*"""
    tokenizer: str | None = None
    """Tokenizer directory or hub name. Default: the model's own, or one built from the training text."""
    seed: int = 0
    """Seed of initialisation and data order."""
    trainable: tuple[str, ...] = ()
    """Train only parameters whose path matches one of these regular expressions, such as blocks/attn/.*."""
    lora: LoraConfig = LoraConfig(rank=0)
    compute: Annotated[ComputeConfig, tyro.conf.arg(name="")] = ComputeConfig()
    weighting: Literal["sequence", "token"] = "token"
    """Mean over scored tokens of a batch, or over sequences of their means."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    text: Annotated[TextConfig, tyro.conf.arg(name="")] = TextConfig()
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig(epochs=20, learning_rate=3e-3)
    size: SizeConfig = SizeConfig()
    dp: PrivacyConfig = PrivacyConfig()
    cda: CounterfactualConfig = CounterfactualConfig()
    corpus: fictional.FictionalConfig = fictional.FictionalConfig()


def default() -> Config:
    """a small model on the generated corpus, about a minute on two CPU cores"""
    return Config()


def smoke() -> Config:
    """a tiny model on a tiny corpus, seconds"""
    return Config(
        size=SizeConfig(width=32, layers=2, heads=2, context=64, vocab_size=512),
        corpus=fictional.FictionalConfig(people=12, general_records=60),
        train=TrainConfig(epochs=2, learning_rate=3e-3),
    )


PRESETS = {"default": default, "smoke": smoke}


def fields_of(task: str) -> tuple[str, ...]:
    """Return the columns of the tables."""
    quality = ("accuracy", "macro_f1", "majority") if task == "classification" else ("perplexity", "accuracy")
    return "name", "set", "nll", *quality, "steps", "seconds", "train_tokens", "tokens_per_second"


def run(config: Config) -> None:
    """Read, train, save, score."""
    command.at_least(0, checkpoint_every=config.checkpoint_every, seed=config.seed)
    config.train.microbatch_of(config.train.batch_size)
    if not config.dp.private and config.dp != PrivacyConfig():
        raise UserError("--dp.* flags without --dp.epsilon or --dp.noise: training would not be private")
    out = Run("train.lm", config, config.out, config.resume)
    if config.data:
        records = [record for source in config.data for record in read_for(source, config)]
    else:
        if config.exclude or config.evaluate:
            raise UserError("--exclude and --evaluate need --data; the generated corpus has neither")
        if config.task == "classification":
            raise UserError("--task classification needs --data with a column of classes, see --label-field")
        generated = fictional.generate(config.corpus)
        people = generated["forget"] + generated["retain"]
        records = people if config.task == "seq2seq" else people + generated["general"]
    left_out = {record.id for source in config.exclude for record in read_for(source, config)}
    kept = [record for record in records if record.id not in left_out]
    if not kept:
        raise UserError("--exclude leaves none of the records of --data")
    if config.exclude:
        command.say(f"--exclude names {len(left_out)} records; {len(records) - len(kept)} of them were in the data")
    kept, unit_of = augmented(kept, config)
    labels = class_names(kept, "training text") if config.task == "classification" else ()
    start = start_from(
        config.model, tokenizer_name=config.tokenizer, size=config.size, compute=config.compute, head=config.task,
        labels=labels, tell=command.say,
        texts=tokenizer_texts(kept, config.text) if config.data else fictional.tokenizer_texts(kept),
    )  # fmt: skip
    model = start.model

    def tokens(records, where):
        return encode(
            records, start.tokenizer, config.text, context=model.max_length, where=where, tell=command.say,
            task=config.task, labels=model.config.labels, start_id=getattr(model.config, "decoder_start_token_id", 0),
        )  # fmt: skip

    sets = {"train": tokens(kept, "training text")}
    for source in config.evaluate:
        name = Path(source).name
        sets[source if name in sets else name] = tokens(read_for(source, config), source)
    moving = moving_parts(config.trainable, lora_of(config, model))
    if config.lora.rank:
        check_adapter(model, lora_of(config, model))
    parts = {"model": start.params(config.seed)}
    jax.eval_shape(moving.init, jax.random.key(0), parts)  # tells a pattern that matches nothing
    objective = objective_for(config.task, model, start.tokenizer.mask_token_id)
    private = None
    batches: StageBatches
    if config.dp.private:
        unit = "block" if config.text.text_mode == "pack" else "record"
        examples = sets["train"] if unit == "block" else with_units(sets["train"], {r.id for r in kept}, unit_of)
        private = private_run(config.dp, config.train, examples, config.seed, unit)
        batches, prepare, about = private.batches, private.prepare, private.about
        step = make_step(objective, moving, private.gradient, private.optimizer)
        check(step, objective, moving, parts, private.batches, config.dp.estimator)
        command.say("epsilon {dp_epsilon:.4g} at delta {dp_delta:.3g} for one {dp_unit} ({dp_relation}), {dp_sampler} "
                    "sampling, noise multiplier {dp_sigma:g}".format(**about))  # fmt: skip
        if config.data and not (config.tokenizer or config.model):
            command.say("the tokenizer is built from the training text, which no noise hides; give --tokenizer")
    else:
        weighting = config.weighting if config.task != "classification" else "sequence"
        streams = (Stream(sets["train"], config.train.batch_size),)
        batches = Batches(streams, config.train.epochs, config.seed, weighting)
        mean = mean_gradient(config.train.microbatch_of(config.train.batch_size))
        step = make_step(objective, moving, mean, adamw(config.train))
        prepare, about = lambda state: state, {}
    out.begin()

    rows = [row("before", name, config.task, start, parts["model"], examples) for name, examples in sets.items()]
    with command.progress("training") as show:
        params, record = train_stage(
            out.directory / "model", model, step, parts, batches,
            learning_rate=config.train.learning_rate, save_tokenizer=start.save_tokenizer,
            checkpoints=out.directory / "checkpoints", checkpoint_every=config.checkpoint_every,
            log=lambda step, metrics: out.log("train", step, metrics),
            resumed=lambda step: out.rewind("train", step), show=show,
            save_adapter=lambda params: save_lora(out.directory / "adapter", config, model, params), prepare=prepare,
        )  # fmt: skip
    speed = {"tokens_per_second": record["train_tokens"] / record["seconds"]}
    rows += [
        {**row("after", name, config.task, start, params, examples), **record, **speed, **about}
        for name, examples in sets.items()
    ]
    document = out.finish(rows)
    losses = [(line["step"], line["loss"]) for line in out.metrics()]
    unit = "text" if config.task == "classification" else "token"
    curve = figure(lambda axes: (axes.plot(*zip(*losses, strict=True), lw=1),
                                 axes.set(xlabel="step", ylabel=f"training loss (nats/{unit})")))  # fmt: skip
    sections = [("Before and after", f"A row a set, before and after training. Losses in nats a {unit}, accuracy in "
                 "percent.", table(rows, fields_of(config.task))),
                ("Training loss", "Each point is one batch.", plots(curve))]  # fmt: skip
    if private:
        promise = {name.removeprefix("dp_"): value for name, value in about.items() if value is not None}
        note = ("Holds for the weights that this one run leaves, as long as --seed is secret: who knows it can repeat "
                "the noise. Not for choices made by looking at several runs, a tokenizer or class names taken from the "
                "training text, and the losses, norms and token counts written beside the weights.")  # fmt: skip
        sections.append(("Differential privacy", note, table([{"name": config.dp.sampler, **promise}],
                                                             ("name", *promise))))  # fmt: skip
    old = {row["set"]: row for row in rows if row["name"].startswith("before")}
    found = [f"Loss on `{new['set']}`: {cell(old[new['set']]['nll'])} before, {cell(new['nll'])} after "
             f"(nats a {unit}); accuracy {cell(old[new['set']]['accuracy'])} % before, {cell(new['accuracy'])} % after."
             for new in rows if new["name"].startswith("after")]  # fmt: skip
    if private:
        found.append(f"Private with epsilon {cell(promise.get('epsilon'))} at delta {cell(promise.get('delta'))}, of a "
                     f"{promise['unit']}.")  # fmt: skip
    write_page(
        out.directory / "report.html", f"Training a {model.config.model_type} model: {config.task}",
        f"What does a model learn from {len(kept):,} records? Trained on {record['train_tokens']:,} tokens in "
        f"{cell(record['seconds'])} s, {document['device']}.",
        sections, document["config"], found,
    )  # fmt: skip
    command.print_table(rows, fields_of(config.task), f"train.lm · {out.directory}")


def read_for(source: str, config: Config) -> list[Record]:
    """Read a source with the columns that the task needs."""
    text = config.text
    if config.task == "classification" and text.label_field is None:
        text = dataclasses.replace(text, label_field="label")
    return read(source, text)


def augmented(records: list[Record], config: Config) -> tuple[list[Record], dict[str, str]]:
    """Add counterfactuals as configured; returns the records and which record each of them comes from."""
    if config.cda.sides == "off":
        return records, {}
    found = augment(records, config.cda, config.seed, load_swaps(config.cda))
    command.say(f"counterfactuals of {found.matched} of {len(records)} records; {found.dropped} dropped")
    if not found.records:
        raise UserError("--cda leaves no record: none has a word of the list; keep them with --cda.keep-unmatched")
    return found.records, found.unit_of


def lora_of(config: Config, model) -> LoraConfig:
    """Return the adapter's settings."""
    if config.lora.rank and not config.model:
        raise UserError("--lora.rank needs --model; without one there is no base for the adapter")
    return with_head(config.lora, model)


def save_lora(directory: Path, config: Config, model, params) -> None:
    """Save the adapter beside the merged model, if there is one."""
    if config.lora.rank:
        remove(directory)  # what a kill before the model was saved left
        save_adapter(directory, model, params, lora_of(config, model), base_name=config.model)


def row(name: str, set_name: str, task: str, start: Start, params, examples) -> dict[str, Any]:
    """Score a set. Masked tokens are the same ones every time."""
    if task == "classification":
        metrics = classification_metrics(class_logp(start.model, params, examples), examples.columns["label"])
    else:
        if task == "masked":
            examples = masked_once(examples, start.tokenizer.mask_token_id, start.model.vocab_size)
        metrics = language_metrics(token_scores(start.model, params, examples))
    return {"name": f"{name}:{set_name}", "set": set_name, **metrics}


if __name__ == "__main__":
    command.main(run, PRESETS)
