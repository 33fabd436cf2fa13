"""Trace which data causes which behaviour: `python -m train.untrac --model DIR --train NAME=FILE ... --test NAME=FILE`.

Scores every training dataset for every query: how much the query's loss rises once the dataset is unlearned (UnTrac),
the reverse (UnTrac-Inv), and baselines made of gradients. Positive: the dataset helps the query. Without --model the
model is trained on all datasets first; without --train and --test on a generated corpus whose answer is known.
OUT/scores holds a file a method; `eval.influence` compares them with retraining.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from jaxforget import choice, command
from jaxforget.data.tokens import concatenate
from jaxforget.errors import UserError
from jaxforget.influence import Method, choose
from jaxforget.influence.scores import Scores, heat_map, load, measure, rows_of, save
from jaxforget.influence.study import Study, StudyConfig, read_study
from jaxforget.models.sharding import check_rows, host
from jaxforget.report.page import figure, plots, table, write_page
from jaxforget.report.run import Run
from jaxforget.training.batches import Batches, Stream
from jaxforget.training.checkpoints import load_tree, save_tree
from jaxforget.training.gradients import mean_gradient
from jaxforget.training.optimizer import ScheduleState, TrainConfig, adamw, rate_at
from jaxforget.training.stage import train_stage
from jaxforget.training.start import SizeConfig
from jaxforget.training.step import make_step
from jaxforget.training.trainable import everything


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Trace which training data causes which behaviour."""

    out: Path | None = None
    """Directory for everything the run leaves; runs/<command>-<time> when not given. Must be empty."""
    resume: bool = False
    """Continue the run in --out; settings must be the same."""
    methods: tuple[str, ...] = ("untrac", "untrac_inv", "grad_dot", "grad_cos", "grad_sign")
    """Names from jaxforget/influence/__init__.py, or all."""
    settings: tuple[str, ...] = ()
    """Method settings as method.field=value, such as untrac.optimizer=adafactor."""
    snapshots: int = 0
    """Parameters kept on the way while a model is trained here, evenly spread; tracin needs at least 1."""
    checkpoint_every: int = 200
    """Training steps between checkpoints."""
    study: Annotated[StudyConfig, tyro.conf.arg(name="")] = StudyConfig()


def default() -> Config:
    """five generated datasets, a model of 0.1 M parameters from scratch; about a minute on two CPU cores"""
    # At 3e-5 UnTrac destroys so small a model, and at 1e-3 UnTrac-Inv does.
    training = TrainConfig(epochs=1, batch_size=4, learning_rate=1e-3)
    return Config(settings=("untrac.learning_rate=1e-5", "untrac_inv.learning_rate=5e-4"),
                  study=StudyConfig(training=training))  # fmt: skip


def smoke() -> Config:
    """tiny generated sets and a tiny model; seconds, numbers without meaning"""
    return Config(study=StudyConfig(
        rows=24, training=TrainConfig(epochs=1, learning_rate=3e-3),
        size=SizeConfig(width=16, layers=1, heads=2, context=64, vocab_size=300),
    ))  # fmt: skip


PRESETS = {"default": default, "smoke": smoke}


def run(config: Config) -> None:
    """Read and check everything, train if there is no model, ask every method, report."""
    methods = chosen(config)
    out = Run("train.untrac", config, config.out, config.resume)
    study = read_study(config.study, command.say)
    out.begin()
    params, record = trained(config, out, study)
    question = study.question(params, config.study.seed, snapshots(config, out, params, record))
    (out.directory / "scores").mkdir(exist_ok=True)
    everyone: list[Scores] = []
    for name, method in methods.items():
        file = out.directory / "scores" / f"{name}.npz"
        if not file.exists():
            scores = measure(name, method, question)
            out.rewind(name, 0)
            for line in curve(scores):
                out.log(name, **line)
            save(file, scores)
            command.say(f"{name}: {scores.seconds:.1f} s")
        everyone.append(load(file))
    report(config, out, everyone, record)


def chosen(config: Config) -> dict[str, Method]:
    """Look up the methods and their settings; raise UserError for what would fail only after training."""
    command.at_least(0, snapshots=config.snapshots, checkpoint_every=config.checkpoint_every)
    config.study.training.microbatch_of(config.study.training.batch_size)
    # Presets have settings for methods that this run may leave out; the user's own must fit the run.
    methods = choose(config.methods)
    preset = [one for make in PRESETS.values() for one in make().settings]
    settings = [one for one in config.settings if one.partition(".")[0] in methods or one not in preset]
    methods = choice.adjust(methods, settings)
    for method in methods.values():
        check_rows(getattr(method, "batch_size", 0))
    if "tracin" in methods and not config.snapshots:
        if "all" not in config.methods:
            raise UserError("method tracin needs --snapshots 1 or more, of a model that is trained here")
        del methods["tracin"]
        command.say("tracin is left out; it needs --snapshots of a model that is trained here")
    if config.snapshots and config.study.model:
        raise UserError("--snapshots are taken while a model is trained here; --model is trained already")
    return methods


def trained(config: Config, out: Run, study: Study) -> tuple[Any, dict[str, Any]]:
    """Return the parameters after training on all datasets, and the record of that training if it was here."""
    settings = config.study
    if settings.model:
        return study.start.params(settings.seed), {}
    training = settings.training
    step = make_step(study.objective, everything(), mean_gradient(training.microbatch_of(training.batch_size)),
                     adamw(training))  # fmt: skip
    examples = concatenate(list(study.train.values()))
    batches = Batches((Stream(examples, training.batch_size),), training.epochs, settings.seed, "token")

    def keep(at: int, parts) -> bool:
        if at:
            save_tree(out.directory / "snapshots" / str(at), host(parts["model"]))
        return False

    with command.progress("training on all datasets") as show:
        return train_stage(
            out.directory / "model", study.start.model, step, {"model": study.start.params(settings.seed)}, batches,
            learning_rate=training.learning_rate, save_tokenizer=study.start.save_tokenizer,
            checkpoints=out.directory / "checkpoints", checkpoint_every=config.checkpoint_every, evaluate=keep,
            evaluate_every=-(-batches.steps // config.snapshots) if config.snapshots else 0,
            log=lambda step, metrics: out.log("train", step, metrics), show=show,
            resumed=lambda step: out.rewind("train", step),
        )  # fmt: skip


def kept_at(config: Config, steps: int) -> list[int]:
    """Return the steps after which parameters are kept."""
    every = -(-steps // config.snapshots)
    return sorted({*range(every, steps, every), steps})


def snapshots(config: Config, out: Run, params, record) -> tuple[tuple[float, Any], ...]:
    """Load what was kept, with the learning rate of the step before."""
    if not config.snapshots:
        return ()
    training, steps, found = config.study.training, record["steps"], []
    for at in kept_at(config, steps):
        state = ScheduleState(np.int32(at - 1), np.float32(training.learning_rate), np.float32(steps))
        found.append((float(rate_at(training, state)), load_tree(out.directory / "snapshots" / str(at), params)))
    return tuple(found)


def curve(scores: Scores) -> list[dict[str, Any]]:
    """Give lines for metrics.jsonl: the mean influence of every dataset on the way, or at the end alone."""
    curves = scores.answer.curves
    if "query_change" not in curves:
        return [{"step": 0, "metrics": {"seconds": scores.seconds}}]
    return [
        {"step": int(step), "metrics": {f"change_{name}": float(change_KQ[k].mean())
                                        for k, name in enumerate(scores.datasets)}}
        for step, change_KQ in zip(curves["step"], curves["query_change"], strict=True)
    ]  # fmt: skip


def report(config: Config, out: Run, everyone: list[Scores], record: dict[str, Any]) -> None:
    """Write results.json and the page, print the table."""
    rows = [row for scores in everyone for row in rows_of(scores)]
    notes = [f"{scores.method}: {note}" for scores in everyone for note in scores.answer.notes]
    document = out.finish(rows, notes=notes, training=record or None)
    queries = everyone[0].queries
    fields = ("name", *(f"influence_{query}" for query in queries), "collapsed_at", "seconds")
    shown = fields if len(queries) <= 8 else ("name", *(f"influence_{query}" for query in queries[:8]), "seconds")
    maps = plots(*(
        figure(heat_map(scores.answer.scores_KQ, scores.datasets, queries, scores.method),
               width=max(3.0, 1.6 + 0.5 * len(queries)), height=max(2.6, 1.2 + 0.22 * len(scores.datasets)))
        for scores in everyone
    ))  # fmt: skip
    curves = plots(*(figure(curves_of(scores)) for scores in everyone if len(scores.answer.curves.get("step", ())) > 1))
    sections = [
        ("Influence", "Every column is divided by its largest absolute value. Red: the dataset helps the query.",
         maps),
        *([("While a dataset is unlearned", "Mean change of the loss of all queries, nats a token.", curves)]
          if "<svg" in curves else []),
        ("Scores", "UnTrac and UnTrac-Inv in nats a token, the others in units of their own: compare within a method. "
         "Collapsed at: the step at which the model was destroyed.", table(rows, fields)),
    ]  # fmt: skip
    lead = ("Which of the datasets that a model was trained on helps it with which query? Influence is loss after the "
            "dataset is unlearned minus loss before: positive where the dataset helps the query. No score is checked "
            "here; eval.influence compares scores with retraining.")  # fmt: skip
    write_page(out.directory / "report.html", "Which data causes which behaviour", lead, sections, document["config"],
               [*(most_helpful(scores) for scores in everyone), *notes])  # fmt: skip
    command.print_table(rows, shown, f"train.untrac · {out.directory}")
    for note in notes:
        command.say(note)


def most_helpful(scores: Scores) -> str:
    """Name the dataset that a method finds most helpful for every query, of at most eight."""
    score_KQ = scores.answer.scores_KQ
    known = [q for q in range(len(scores.queries)) if np.isfinite(score_KQ[:, q]).all()]
    told = [f"{scores.datasets[score_KQ[:, q].argmax()]} for {scores.queries[q]}" for q in known[:8]]
    more = f", and {len(known) - 8} more queries" if len(known) > 8 else ""
    return f"Most helpful by `{scores.method}`: {', '.join(told) or 'none, for scores are missing'}{more}."


def curves_of(scores: Scores):
    """Draw how the loss of the queries changes while each dataset is unlearned."""

    def draw(axes):
        step_S, change_SKQ = (scores.answer.curves[name] for name in ("step", "query_change"))
        for k, name in enumerate(scores.datasets):
            axes.plot(step_S, change_SKQ[:, k].mean(axis=-1), label=name)
        axes.set(xlabel="step of unlearning", ylabel="change of loss (nats a token)", title=scores.method)
        axes.legend()

    return draw


if __name__ == "__main__":
    command.main(run, PRESETS)
