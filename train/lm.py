"""Train or fine-tune a language model: `python -m train.lm --data FILE [--model DIR] --out DIR`.

Leaves a Hugging Face directory in OUT/model. Without --data it trains on the generated corpus of fictional people.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxforget import command
from jaxforget.data import fictional
from jaxforget.data.text import TextConfig, encode, read
from jaxforget.errors import UserError
from jaxforget.metrics.language import language_metrics, token_scores
from jaxforget.report.page import figure, table, write_page
from jaxforget.report.run import Run
from jaxforget.training.batches import Batches, Stream
from jaxforget.training.gradients import mean_gradient
from jaxforget.training.objectives import next_token
from jaxforget.training.optimizer import TrainConfig, adamw
from jaxforget.training.stage import train_stage
from jaxforget.training.start import SizeConfig, start_from
from jaxforget.training.step import make_step
from jaxforget.training.trainable import everything


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
    model: str | None = None
    """Hugging Face directory or hub name to start from. Default: from scratch, see --size.*"""
    tokenizer: str | None = None
    """Tokenizer directory or hub name. Default: the model's own, or one built from the training text."""
    seed: int = 0
    """Seed of initialisation and data order."""
    dtype: str = "auto"
    """Compute precision: auto (bfloat16 on accelerators, float32 on a CPU), float32, bfloat16."""
    weighting: Literal["sequence", "token"] = "token"
    """Mean over scored tokens of a batch, or over sequences of their means."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    text: Annotated[TextConfig, tyro.conf.arg(name="")] = TextConfig()
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig(epochs=20, learning_rate=3e-3)
    size: SizeConfig = SizeConfig()
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


FIELDS = (
    "name", "set", "nll", "perplexity", "accuracy", "steps", "seconds", "train_tokens", "tokens_per_second",
)  # fmt: skip


def run(config: Config) -> None:
    """Read, train, save, score."""
    command.at_least(0, checkpoint_every=config.checkpoint_every, seed=config.seed)
    config.train.microbatch_of(config.train.batch_size)
    out = Run("train.lm", config, config.out, config.resume)
    if config.data:
        records = [record for source in config.data for record in read(source, config.text)]
    else:
        if config.exclude or config.evaluate:
            raise UserError("--exclude and --evaluate need --data; the generated corpus has neither")
        sets = fictional.generate(config.corpus)
        records = sets["forget"] + sets["retain"] + sets["general"]
    left_out = {record.id for source in config.exclude for record in read(source, config.text)}
    kept = [record for record in records if record.id not in left_out]
    if not kept:
        raise UserError("--exclude leaves none of the records of --data")
    if config.exclude:
        command.say(f"--exclude names {len(left_out)} records; {len(records) - len(kept)} of them were in the data")
    start = start_from(
        config.model, tokenizer_name=config.tokenizer, size=config.size,
        dtype=command.compute_dtype(config.dtype), corpus=kept,
    )  # fmt: skip
    model = start.model

    def tokens(records, where):
        return encode(records, start.tokenizer, config.text, context=model.max_length, where=where, tell=command.say)

    sets = {"train": tokens(kept, "training text")}
    for source in config.evaluate:
        name = Path(source).name
        sets[source if name in sets else name] = tokens(read(source, config.text), source)
    out.begin()

    params = start.params(config.seed)
    rows = [_row("before", name, model, params, examples) for name, examples in sets.items()]
    batches = Batches((Stream(sets["train"], config.train.batch_size),), config.train.epochs, config.seed,
                      config.weighting)  # fmt: skip
    gradient = mean_gradient(config.train.microbatch_of(config.train.batch_size))
    step = make_step(next_token(model), everything(), gradient, adamw(config.train))
    with command.progress("training") as show:
        params, record = train_stage(
            out.directory / "model", model, step, {"model": params}, batches,
            learning_rate=config.train.learning_rate, save_tokenizer=start.save_tokenizer,
            checkpoints=out.directory / "checkpoints", checkpoint_every=config.checkpoint_every,
            log=lambda step, metrics: out.log("train", step, metrics),
            resumed=lambda step: out.rewind("train", step), show=show,
        )  # fmt: skip
    speed = {"tokens_per_second": record["train_tokens"] / record["seconds"]}
    rows += [{**_row("after", name, model, params, examples), **record, **speed} for name, examples in sets.items()]
    document = out.finish(rows)
    losses = [(line["step"], line["loss"]) for line in out.metrics()]
    curve = figure(lambda axes: (axes.plot(*zip(*losses, strict=True), lw=1),
                                 axes.set(xlabel="step", ylabel="training loss (nats/token)")))  # fmt: skip
    write_page(
        out.directory / "report.html", "Language model training",
        f"{len(kept):,} records, {record['train_tokens']:,} tokens, {document['device']}.",
        [("Before and after", "Losses in nats a token, accuracy in percent.", table(rows, FIELDS)),
         ("Training loss", "Each point is one batch.", curve)], document["config"],
    )  # fmt: skip
    command.print_table(rows, FIELDS, f"train.lm · {out.directory}")


def _row(name, set_name, model, params, examples) -> dict[str, Any]:
    scores = token_scores(model, params, examples)
    return {"name": f"{name}:{set_name}", "set": set_name, **language_metrics(scores)}


if __name__ == "__main__":
    command.main(run, PRESETS)
