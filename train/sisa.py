"""Train an ensemble from which records can be deleted exactly: `python -m train.sisa --data FILE --out ENSEMBLE`.

The records are dealt to shards and slices, and every shard trains a model of its own. `python -m train.forget` then
deletes records from ENSEMBLE. Without --data it trains on the generated corpus of fictional people.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro

from jaxforget import command, files
from jaxforget.data import fictional
from jaxforget.data.sources import Record
from jaxforget.data.tasks import class_names
from jaxforget.data.text import TextConfig, encode, read, tokenizer_texts
from jaxforget.errors import UserError
from jaxforget.models import hub
from jaxforget.models.sharding import check_members
from jaxforget.report.page import cell, figure, plots, table, write_page
from jaxforget.report.run import Run, plain
from jaxforget.sisa.cost import training_visits
from jaxforget.sisa.deletion import serve
from jaxforget.sisa.ensemble import Ensemble, base_digest, locked
from jaxforget.sisa.ledger import NAME, Ledger, Row
from jaxforget.sisa.plan import by_column, by_deletion_probability, epoch_schedule, uniform
from jaxforget.sisa.recipe import Recipe
from jaxforget.sisa.scoring import score
from jaxforget.training.ensemble import Members
from jaxforget.training.lora import LoraConfig, moving_parts, with_head
from jaxforget.training.optimizer import TrainConfig
from jaxforget.training.start import ComputeConfig, SizeConfig, start_from, tokenizer_files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Train an ensemble of shard models from which records can be deleted exactly."""

    out: Path | None = None
    """Directory of the ensemble; runs/<command>-<time> when not given. Must be empty."""
    resume: bool = False
    """Continue the run in --out; settings must be the same."""
    data: tuple[str, ...] = ()
    """Training text: .jsonl[.gz], .json, .csv, .tsv, .parquet files or hub names. Default: the generated corpus."""
    evaluate: tuple[str, ...] = ()
    """Files to score members and ensemble on. Default: held-out people of the generated corpus."""
    task: Literal["causal", "classification", "masked", "seq2seq"] = "causal"
    """What to learn: the next token, the class of a text, masked tokens, or an answer from an encoded question."""
    shards: int = 4
    """Models, each trained on its own share of the records."""
    slices: int = 2
    """Parts of a shard, trained one after the other; a deletion retrains from its record's slice on."""
    deletion_field: str | None = None
    """Column with the probability that a record will be deleted: likely ones then share few, small shards."""
    shard_field: str | None = None
    """Column whose values are the shards, such as a customer or a source; --shards is then their number."""
    model: str | None = None
    """Hugging Face directory or hub name to start from. Default: from scratch, see --size.*"""
    tokenizer: str | None = None
    """Tokenizer directory or hub name. Default: the model's own, or one built from --tokenizer-data."""
    tokenizer_data: tuple[str, ...] = ()
    """Text to build a tokenizer from. It stays in the tokenizer for good, so it must be text that nobody may have
    deleted. Default: the generated corpus."""
    seed: int = 0
    """Seed of the shards, of initialisation and of data order."""
    trainable: tuple[str, ...] = ()
    """Train only parameters whose path matches one of these regular expressions, such as blocks/attn/.*."""
    lora: LoraConfig = LoraConfig(rank=0)
    compute: Annotated[ComputeConfig, tyro.conf.arg(name="")] = ComputeConfig()
    members: Members = "auto"
    """How one program trains many models: one after the other (map) or batched (vmap); auto is map on a CPU."""
    width: int = 0
    """Models in one program; 0 is all. Fewer need less memory, and under vmap make deletions cheaper."""
    weighting: Literal["sequence", "token"] = "token"
    """Mean over scored tokens of a batch, or over sequences of their means."""
    weights: Literal["equal", "size"] = "equal"
    """Weight of a model in the vote: equal, or its share of the surviving records."""
    checkpoint_every: int = 200
    """Steps between checkpoints inside a slice; every finished slice is kept in any case."""
    export: bool = True
    """Also keep every model as a Hugging Face directory, in members/."""
    text: Annotated[TextConfig, tyro.conf.arg(name="")] = TextConfig()
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig(epochs=16, learning_rate=3e-3)
    size: SizeConfig = SizeConfig()
    corpus: fictional.FictionalConfig = fictional.FictionalConfig()


def default() -> Config:
    """four shards of two slices on the generated corpus, about a minute on two CPU cores"""
    return Config()


def smoke() -> Config:
    """a tiny ensemble on a tiny corpus, seconds"""
    return Config(
        shards=3,
        size=SizeConfig(width=32, layers=2, heads=2, context=64, vocab_size=512),
        corpus=fictional.FictionalConfig(people=12, general_records=30),
        train=TrainConfig(epochs=2, learning_rate=3e-3),
    )


PRESETS = {"default": default, "smoke": smoke}


def fields_of(task: str) -> tuple[str, ...]:
    """Return the columns of the tables."""
    return "name", "nll", *(("accuracy", "macro_f1", "majority") if task == "classification" else
                                   ("perplexity", "accuracy"))  # fmt: skip


def run(config: Config) -> None:
    """Plan, train, score."""
    command.at_least(0, checkpoint_every=config.checkpoint_every, seed=config.seed, width=config.width)
    config.train.microbatch_of(config.train.batch_size)
    if config.text.text_mode == "pack":
        raise UserError("--text-mode pack joins records, so none of them could be deleted; use truncate or split")
    text = config.text
    if config.task == "classification" and text.label_field is None:
        text = dataclasses.replace(text, label_field="label")
    config = dataclasses.replace(config, text=text)
    out = Run("train.sisa", config, config.out, config.resume)
    if not files.through_first((out.directory / NAME).exists):
        plan(config, out)
    with Ensemble(out.directory) as ensemble, locked(out.directory, wait=True, tell=command.say):
        with command.progress("training") as show:
            serve(
                ensemble, export=config.export, tell=command.say, checkpoint_every=config.checkpoint_every, show=show,
                log=lambda tag, step, metrics: out.log(tag, step, metrics),
                resumed=lambda tag, step: out.rewind(tag, step),
            )  # fmt: skip
        report(config, out, ensemble)


def plan(config: Config, out: Run) -> None:
    """Read the records, deal them out, and write the ledger and the initial model: the ensemble, still untrained."""
    if config.data:
        records = [record for source in config.data for record in read(source, config.text)]
    elif config.evaluate or config.task == "classification":
        raise UserError("--evaluate and --task classification need --data; the generated corpus has no classes")
    else:
        sets = fictional.generate(config.corpus)
        records = sets["forget"] + sets["retain"] + ([] if config.task == "seq2seq" else sets["general"])
    seen: dict[str, None] = {}
    for record in records:
        if record.id in seen:
            raise UserError(f"two records of --data have the id {record.id!r}; give each one an id of its own")
        seen[record.id] = None
    shard_N, slice_N, shards = deal(config, records)
    width = min(config.width or shards, shards)
    check_members(width)
    epoch_schedule(config.train.epochs, config.slices)
    labels = class_names(records, "training text") if config.task == "classification" else ()
    texts = [record for source in config.tokenizer_data for record in read(source, TextConfig())]
    if not (config.model or config.tokenizer or texts or not config.data):
        command.say("the tokenizer is built from the generated corpus: one built from --data would remember what is "
                    "deleted; see --tokenizer and --tokenizer-data")  # fmt: skip
    start = start_from(
        config.model, tokenizer_name=config.tokenizer, size=config.size, compute=config.compute, head=config.task,
        labels=labels, tell=command.say,
        texts=tokenizer_texts(texts, config.text) if texts else fictional.tokenizer_texts(),
    )  # fmt: skip
    lora = with_head(config.lora, start.model)
    if lora.rank and not config.model:
        raise UserError("--lora.rank needs --model; without one there is no base for the adapters")
    params = start.params(config.seed)
    moving_parts(config.trainable, lora).init(jax.random.key(0), {"model": params})  # tells a pattern without match

    def tokens(records, where):
        return encode(
            records, start.tokenizer, config.text, context=start.model.max_length, where=where, tell=command.say,
            task=config.task, labels=labels, start_id=getattr(start.model.config, "decoder_start_token_id", 0),
        )  # fmt: skip

    examples = tokens(records, "training text")
    for source in config.evaluate:
        read(source, config.text)  # a wrong file is told now, not after the training
    rows = dict.fromkeys(seen, 0)
    for name in examples.ids:
        rows[name if name in rows else name.rpartition("#")[0]] += 1  # chunks of a record are <id>#<i>
    out.begin()
    base = out.directory / "base"
    files.remove(base, *out.directory.glob(".base.*"))  # of a kill during the planning
    hub.save(base, start.model, params, extra_files=tokenizer_files(start.save_tokenizer))
    recipe = Recipe(
        task=config.task, labels=labels, shards=shards, slices=config.slices, seed=config.seed,
        widths={name: column.shape[1] for name, column in examples.columns.items() if column.ndim == 2},
        weighting="sequence" if config.task == "classification" else config.weighting,
        members=config.members, width=width, trainable=config.trainable, lora=lora,
        compute=config.compute, text=config.text, train=config.train, start=base_digest(base),
    )  # fmt: skip
    meta = {"recipe": json.dumps(plain(recipe)), "config": json.dumps(plain(config))}
    places = zip(records, shard_N.tolist(), slice_N.tolist(), strict=True)
    Ledger.create(out.directory, meta, (Row(record, k, r, rows[record.id]) for record, k, r in places))


def deal(config: Config, records: list[Record]) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the shard and the slice of every record, and how many shards there are."""
    ids = [record.id for record in records]
    if config.shard_field and config.deletion_field:
        raise UserError("--shard-field and --deletion-field exclude each other")
    if config.shard_field:
        values = [_field(record, config.shard_field) for record in records]
        shard_N, slice_N, names = by_column(ids, values, config.slices, config.seed)
        command.say("shards: " + ", ".join(f"{k} is {name}" for k, name in enumerate(names)))
        return shard_N, slice_N, len(names)
    if config.deletion_field:
        try:
            probability_N = np.asarray([float(_field(record, config.deletion_field)) for record in records])
        except (TypeError, ValueError) as error:
            raise UserError(f"--deletion-field {config.deletion_field}: {error}; it must be a probability") from None
        dealt = by_deletion_probability(ids, probability_N, config.shards, config.slices, config.seed)
    else:
        dealt = uniform(ids, config.shards, config.slices, config.seed)
    return (*dealt, config.shards)


def _field(record: Record, name: str):
    if name not in record.fields:
        raise UserError(f"record {record.id!r} has no field {name!r}; it has {', '.join(record.fields) or 'none'}")
    return record.fields[name]


def report(config: Config, out: Run, ensemble: Ensemble) -> None:
    """Score, and write results.json and report.html."""
    recipe, ledger = ensemble.recipe, ensemble.ledger
    sets = {source: read(source, config.text) for source in config.evaluate}
    if not config.data:
        sets = {"held-out people": fictional.generate(config.corpus)["approximate"]}
    rows = []
    for source, records in sets.items():
        examples = ensemble.encode(records, where=source, tell=command.say)
        rows += score(ensemble, Path(source).name, examples, config.weights)
    count_SR = ledger.counts(recipe.shards, recipe.slices)
    visits = training_visits(count_SR, recipe.epochs)
    summary = {
        "name": "training", "examples": int(count_SR.sum()), "shards": recipe.shards, "slices": recipe.slices,
        "epochs_by_slice": list(recipe.epochs), "examples_visited": visits, "config_sha256": recipe.digest,
    }  # fmt: skip
    losses: dict[str, list] = {}
    for line in out.metrics():
        present = [x for x in line["loss"] if x is not None]
        losses.setdefault(line["stage"], []).append((line["step"], sum(present) / len(present)))
    document = out.finish([summary, *rows], examples_by_shard_and_slice=count_SR.tolist())

    def curves(axes):
        done = 0
        for tag, points in losses.items():
            axes.plot([done + step for step, _ in points], [loss for _, loss in points], lw=1, label=tag)
            done += points[-1][0]
        axes.set(xlabel="step", ylabel="training loss, mean over models (nats)")
        axes.legend()

    def sizes(axes):
        shards, floor = np.arange(recipe.shards), np.zeros(recipe.shards)
        for cut in range(recipe.slices):
            axes.bar(shards, count_SR[:, cut], bottom=floor, label=f"slice {cut}")
            floor = floor + count_SR[:, cut]
        axes.set(xlabel="shard", ylabel="examples", xticks=shards)
        axes.legend()

    unit = "text" if recipe.task == "classification" else "token"
    found = [f"`{row['name']}`: accuracy {cell(row['accuracy'])} %"
             + (f", loss {cell(row['nll'])} nats a {unit}." if row.get("nll") is not None else ".")
             for row in rows if not row["name"].startswith("member ")]  # fmt: skip
    write_page(
        out.directory / "report.html", f"An ensemble of {recipe.shards} {ensemble.model.config.model_type} models",
        f"How good is an ensemble from which records can be deleted exactly (SISA)? {int(count_SR.sum()):,} examples "
        f"in {recipe.shards} shards of {recipe.slices} slices, one model a shard, trained for "
        f"{', '.join(map(str, recipe.epochs))} epochs a slice: {visits:,} visits of examples, {document['device']}.",
        [("Quality", "Every model, their mean, and their votes joined in three ways.",
          table(rows, fields_of(recipe.task))),
         ("Training and shards", "Every slice starts from the parameters that the one before left, with a fresh "
          "optimizer.", plots(figure(curves), figure(sizes)))],
        document["config"], found,
    )  # fmt: skip
    command.print_table(rows, fields_of(recipe.task), f"train.sisa · {out.directory}")


if __name__ == "__main__":
    command.main(run, PRESETS)
