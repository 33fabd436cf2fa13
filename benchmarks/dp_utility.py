"""What privacy costs in utility: one pretrained model fine-tuned on real data, private and not.

    python -m benchmarks.dp_utility --model DIR --task classification --data sst2/train.tsv \
        --validation sst2/dev.tsv --test sst2/test.tsv
    python -m benchmarks.dp_utility --model DIR --task causal --data e2e/devset.csv --test e2e/testset_w_refs.csv \
        --question-field mr --answer-field ref

Privacy levels, learning rates, clipping norms and seeds are members of one program. Every level gets the rate and norm
that are best on the validation data with the first seed; the other seeds train with these alone, and the test data is
read at the end. The epsilons do not cover this choice. The level without privacy has the same Poisson batches, no noise
and no bound. Generated text is compared by sacrebleu (pip install sacrebleu) with all answers that a question has.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import numpy as np
import tyro

from jaxforget import checks, command
from jaxforget.data.sampling import hash64, id_keys
from jaxforget.data.sources import Record
from jaxforget.data.text import TextConfig, encode, read
from jaxforget.data.tokens import Examples, same_widths
from jaxforget.errors import UserError
from jaxforget.files import write_atomic
from jaxforget.metrics.bias.generation import continuations
from jaxforget.metrics.classification import class_logp, classification_metrics
from jaxforget.metrics.language import language_metrics, token_scores
from jaxforget.models.layers import merge
from jaxforget.privacy.accounting import PrivacyConfig
from jaxforget.privacy.recipe import private_members, private_run
from jaxforget.privacy.subgroups import NO_BOUND
from jaxforget.report.page import cell as number
from jaxforget.report.page import figure, plots, table, write_page
from jaxforget.report.run import Run, plain
from jaxforget.report.statistics import over_seeds
from jaxforget.training.ensemble import Members, member, members
from jaxforget.training.loop import fit
from jaxforget.training.lora import LoraConfig, moving_parts, with_head
from jaxforget.training.objectives import objective_for
from jaxforget.training.optimizer import TrainConfig
from jaxforget.training.start import ComputeConfig, SizeConfig, Start, start_from


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Measure what private fine-tuning costs in utility."""

    out: Path | None = None
    """Directory for everything the run leaves. Must be empty."""
    resume: bool = False
    """Continue the run in --out; settings must be the same."""
    model: str | None = None
    """Hugging Face directory or hub name to fine-tune."""
    task: Literal["classification", "causal"] = "classification"
    """What to learn: the class of a text, or an answer to a question."""
    data: str | None = None
    """Training data."""
    validation: str | None = None
    """Data that rates are chosen on. Default: a tenth of the questions or texts of --data, left out of training."""
    test: str | None = None
    """Data that results are of."""
    epsilons: tuple[float, ...] = (3.0, 8.0)
    """Privacy levels, besides none."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    """Rates to choose from."""
    clips: tuple[float, ...] = (0.1,)
    """Clipping norms to choose from, at the levels with privacy."""
    seeds: int = 3
    """Seeds of every level."""
    prompts: int = 200
    """Questions of the test data to answer in writing; for --task causal."""
    max_new_tokens: int = 80
    """Tokens of a written answer."""
    trainable: tuple[str, ...] = ()
    """Train only parameters whose path matches one of these regular expressions; see train.lm."""
    lora: LoraConfig = LoraConfig(rank=0)
    dp: PrivacyConfig = PrivacyConfig()
    """What private members share: delta, sampler, estimator."""
    members: Members = "auto"
    """How one program trains many models; auto is map on a CPU and vmap elsewhere."""
    text: Annotated[TextConfig, tyro.conf.arg(name="")] = TextConfig()
    train: TrainConfig = TrainConfig(epochs=5, batch_size=256, microbatch=32)
    compute: Annotated[ComputeConfig, tyro.conf.arg(name="")] = ComputeConfig(dtype="float32")


def default() -> Config:
    """epsilon 3, 8 and none, three rates, three seeds; half an hour for a small model and 7,000 texts"""
    return Config()


def smoke() -> Config:
    """epsilon 8 and none, one rate, two seeds, one epoch"""
    return Config(epsilons=(8.0,), learning_rates=(3e-3,), seeds=2, prompts=4, max_new_tokens=8,
                  text=TextConfig(limit=64), train=TrainConfig(epochs=1, batch_size=16))  # fmt: skip


PRESETS = {"default": default, "smoke": smoke}
NONE = "no DP"
FIELDS = {
    "classification": ("accuracy", "macro_f1", "nll", "majority"),
    "causal": ("nll", "token_perplexity", "accuracy", "bleu", "chrf"),
}


def run(config: Config) -> None:
    """Choose rates with the first seed, train the others, then score the test data."""
    checks.given("--model", config.model)
    data, test = checks.given("--data", config.data), checks.given("--test", config.test)
    if config.dp.private or config.dp.clip != PrivacyConfig().clip or config.text.text_mode != "truncate":
        raise UserError("--dp.epsilon, noise and clip and --text-mode split or pack are no settings here; see "
                        "--epsilons and --clips")  # fmt: skip
    for name in ("epsilons", "learning_rates", "clips"):
        if not getattr(config, name):
            raise UserError(f"--{name.replace('_', '-')} is empty; give one or more")
    command.at_least(1, seeds=config.seeds, prompts=config.prompts, max_new_tokens=config.max_new_tokens)
    out, records = Run("benchmarks.dp_utility", config, config.out, config.resume), load(config, data, test)
    labels = ()
    if config.task == "classification":
        labels = tuple(sorted({record.fields["label"] for record in records["train"]}))
    start = start_from(config.model, tokenizer_name=None, size=SizeConfig(), compute=config.compute, texts=(),
                       head=config.task, labels=labels, tell=command.say)  # fmt: skip
    sets = {
        name: encode(some, start.tokenizer, config.text, context=start.model.max_length, where=f"{name} data",
                     tell=command.say, task=config.task, labels=labels)
        for name, some in records.items()
    }  # fmt: skip
    sets = dict(zip(sets, same_widths(list(sets.values())), strict=True))
    levels = {NONE: dataclasses.replace(config.dp, noise=0.0, clip=NO_BOUND)}
    levels |= {f"ε={epsilon:g}": dataclasses.replace(config.dp, epsilon=epsilon) for epsilon in sorted(config.epsilons)}
    for level in levels.values():  # tells what cannot be reached, and keeps what can
        for clip in config.clips:
            private_run(dataclasses.replace(level, clip=clip), config.train, sets["train"], 1, "record")
    moving = moving_parts(config.trainable, with_head(config.lora, start.model))
    moving.init(jax.random.key(0), {"model": start.params(0)})  # tells a pattern without match
    out.begin()
    clips = {level: (NO_BOUND,) if level == NONE else config.clips for level in levels}
    tried = [Member(level, rate, clip, 0)
             for level in levels for rate in config.learning_rates for clip in clips[level]]  # fmt: skip
    found = cell(config, out, start, sets, records, levels, "first seed", tried)
    best = {level: min((row for row in found if row["level"] == level), key=lambda row: row["validation_nll"])
            for level in levels}  # fmt: skip
    more = [Member(level, best[level]["learning_rate"], best[level]["clip"] or NO_BOUND, seed)
            for level in levels for seed in range(1, config.seeds)]  # fmt: skip
    others = cell(config, out, start, sets, records, levels, "other seeds", more) if more else []
    finish(config, out, start, sets, records, tried=found, chosen=[*best.values(), *others])


def load(config: Config, data: str, test: str) -> dict[str, list[Record]]:
    """Read train, validation and test; records with the same question or text stay on one side."""
    text = config.text
    if config.task == "classification" and text.label_field is None:
        text = dataclasses.replace(text, label_field="label")
    sets = {"train": read(data, text)}
    if config.validation:
        sets["validation"] = read(config.validation, text)
    else:
        out_N = hash64(id_keys([record.prompt or record.text for record in sets["train"]])) % np.uint64(10) == 0
        kept = list(zip(sets["train"], out_N, strict=True))
        sets = {name: [record for record, out in kept if out == held] for name, held in
                (("train", False), ("validation", True))}  # fmt: skip
        if not all(sets.values()):
            raise UserError("--data is too small to hold out a tenth; give --validation")
    return sets | {"test": read(test, text)}


class Member(NamedTuple):
    """A model to be trained."""

    level: str
    learning_rate: float
    clip: float
    seed: int



def cell(
    config: Config, out: Run, start: Start, sets: dict[str, Examples], records: dict[str, list[Record]],
    levels: dict[str, PrivacyConfig], name: str, wanted: Sequence[Member],
) -> list[dict[str, Any]]:  # fmt: skip
    """Train members side by side and score them, or read what an interrupted run had scored."""
    file = out.directory / f"cell-{name.replace(' ', '-')}.json"
    if not file.exists():
        write_atomic(file, json.dumps(plain(trained(config, out, start, sets, records, levels, name, wanted))) + "\n")
    return json.loads(file.read_text(encoding="utf-8"))


def trained(config: Config, out: Run, start, sets, records, levels, name, wanted) -> list[dict[str, Any]]:
    """Train members side by side and score every one."""
    runs = [
        private_run(dataclasses.replace(levels[one.level], clip=one.clip), config.train, sets["train"], 1 + one.seed,
                    "record")
        for one in wanted
    ]  # fmt: skip
    objective, parts = objective_for(config.task, start.model, None), {"model": start.params(0)}
    moving = moving_parts(config.trainable, with_head(config.lora, start.model))
    step, states, frozen, batches = private_members(
        runs, [one.learning_rate for one in wanted], objective, moving, parts, config.dp.estimator
    )
    with command.progress(name) as show:
        outcome = fit(members(step, config.members), states, frozen, batches,
                      log=lambda step, metrics: out.log(name, step, metrics),
                      resumed=lambda step: out.rewind(name, step), show=show)  # fmt: skip
    rows = []
    for k, (one, private) in enumerate(zip(wanted, runs, strict=True)):
        params = jax.tree.map(np.asarray, merge(step.combine(frozen, member(outcome.state.trainable, k))["model"]))
        clipped = f", clip {one.clip:g}" if one.level != NONE else ""
        rows.append({"name": f"{one.level}, rate {one.learning_rate:g}{clipped}", **one._asdict(),
                     **{f"validation_{field}": value for field, value in
                        scores(config, start, params, sets["validation"]).items()},
                     **scores(config, start, params, sets["test"], records["test"]),
                     **private.mechanism.row(), "clip": one.clip if clipped else None})  # fmt: skip
        command.say(f"{name}: scored {rows[-1]['name']}, seed {one.seed}, {k + 1} of {len(wanted)}")
    return rows


def scores(config: Config, start: Start, params, examples: Examples, records: Sequence[Record] = ()) -> dict[str, Any]:
    """Score examples; with records, also what the model writes."""
    if config.task == "classification":
        return classification_metrics(class_logp(start.model, params, examples), examples.columns["label"])
    return language_metrics(token_scores(start.model, params, examples)) | written(config, start, params, records)


def written(config: Config, start: Start, params, records: Sequence[Record]) -> dict[str, float]:
    """Answer the first questions greedily: corpus BLEU and chrF against all answers that each has, in percent."""
    answers: dict[str, list[str]] = {}
    for record in records:
        answers.setdefault(record.question, []).append(record.text)
    asked = list(answers)[: config.prompts]
    try:
        import sacrebleu
    except ImportError:
        asked = []
    if not asked:
        return {}
    prompts = [config.text.prompt_template.replace("{question}", question) for question in asked]
    texts = continuations(start.model, params, start.tokenizer, prompts, samples=1, temperature=0.0, top_p=1.0, seed=0,
                          max_new_tokens=config.max_new_tokens)  # fmt: skip
    said = [one.strip() for (one,) in texts]
    most = max(len(answers[question]) for question in asked)
    references = [[answers[q][n] if n < len(answers[q]) else None for q in asked] for n in range(most)]
    return {name: getattr(sacrebleu, f"corpus_{name}")(said, references).score for name in ("bleu", "chrf")}


def finish(config: Config, out: Run, start: Start, sets, records, tried, chosen) -> None:
    """Write results.json and the page."""
    before = scores(config, start, start.params(0), sets["test"], records["test"])
    by_seed = [[{**row, "name": row["level"]} for row in chosen if row["seed"] == seed] for seed in range(config.seeds)]
    rows = [{"name": "before fine-tuning", **before}, *over_seeds(by_seed)]
    document = out.finish(rows, tried=tried, by_seed=by_seed)
    field, label = ("accuracy", "test accuracy (%)") if config.task == "classification" else ("nll", "test loss (nats)")

    def draw(axes):
        axes.errorbar([row["name"] for row in rows], [row[field] for row in rows],
                      [row.get(f"{field}_ci95", 0.0) for row in rows], fmt="o", capsize=3)  # fmt: skip
        axes.set(xlabel="privacy", ylabel=label)

    shown = FIELDS[config.task]
    fields = ("name", "learning_rate", "clip", *shown, "epsilon", "sigma")
    sections = [
        ("Utility", f"Test data; means and 95 % intervals over {config.seeds} seeds. The unit of privacy is a record; "
         "the choice of rate and norm is not covered by epsilon.",
         plots(figure(draw)) + table(rows, fields)),
        ("Settings tried", "First seed. What has the least validation loss was taken.",
         table(tried, ("name", "validation_nll", "validation_accuracy", *shown))),
    ]  # fmt: skip
    lead = (f"What does differential privacy cost a model that is fine-tuned with it? {config.model}, {config.data}, "
            f"{document['device']}.")  # fmt: skip
    found = [f"`{row['name']}`: {label} {number(row[field], row.get(f'{field}_ci95'))}."
             for row in rows]  # fmt: skip
    write_page(out.directory / "report.html", "What privacy costs in utility", lead, sections, document["config"],
               found)  # fmt: skip
    command.print_table(rows, fields, f"benchmarks.dp_utility · {out.directory}")


if __name__ == "__main__":
    command.main(run, PRESETS)
