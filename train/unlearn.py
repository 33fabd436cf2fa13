"""Unlearn a forget set with several methods and judge each against retraining: `python -m train.unlearn`.

Without arguments it makes a corpus of fictional people, trains the target model on it and the retrained model on all
but the forget set, then runs every method. `--forget F --retain F` does the same on your data, from scratch or from
`--base DIR`. `--model DIR` unlearns a model that exists; `--retrained DIR` names its yardstick.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from jaxforget import command
from jaxforget.data import fictional
from jaxforget.data.text import TextConfig, encode, read, tokenizer_texts
from jaxforget.data.tokens import concatenate
from jaxforget.errors import NonFiniteLoss, UserError
from jaxforget.models import hub
from jaxforget.report.run import Run
from jaxforget.report.statistics import over_seeds
from jaxforget.training.batches import Batches, Stream
from jaxforget.training.gradients import mean_gradient
from jaxforget.training.lora import LoraConfig, moving_parts
from jaxforget.training.objectives import next_token
from jaxforget.training.optimizer import TrainConfig, adamw
from jaxforget.training.stage import finished, train_stage
from jaxforget.training.start import ComputeConfig, SizeConfig, Start, require_causal, start_from
from jaxforget.training.step import make_step
from jaxforget.training.trainable import everything
from jaxforget.unlearning import METHODS, PAPER, Method, Setting, adjust, check_setting, choose
from jaxforget.unlearning.ascent_descent import AscentDescent
from jaxforget.unlearning.ascent_kl import AscentKL
from jaxforget.unlearning.page import TERMINAL, YARDSTICKS, verdict, write_report
from jaxforget.unlearning.retain import retain_rows
from jaxforget.unlearning.run import sample, unlearn, watched_losses
from jaxforget.unlearning.saliency import candidates, salient
from jaxforget.unlearning.scoring import gaps, score


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Unlearn, and compare with retraining."""

    out: Path | None = None
    """Directory for everything the run leaves; runs/<command>-<time> when not given. Must be empty."""
    resume: bool = False
    """Continue the run in --out; settings must be the same."""
    methods: tuple[str, ...] = ("paper",)
    """Names from METHODS in jaxforget/unlearning/__init__.py; paper is the seven of arXiv 2402.15159, all is every
    one."""
    settings: tuple[str, ...] = ()
    """Method settings as method.field=value, such as ascent_descent_indist.retain_weight=2."""
    model: str | None = None
    """The model to unlearn from, as a Hugging Face directory or hub name. Not given: train it."""
    retrained: str | None = None
    """The model trained without the forget set, the yardstick for --model."""
    base: str | None = None
    """Without --model: fine-tune this model on forget + retain for the target and on retain for the yardstick."""
    tokenizer: str | None = None
    """Tokenizer directory or hub name. Default: the model's own, or one built from the retain text."""
    forget: str | None = None
    """Records to forget. Not given: the generated corpus supplies all sets."""
    retain: str | None = None
    """Records of the same kind that must stay known."""
    approximate: str | None = None
    """Never-trained records of the same kind: what forgetting should look like, and non-members for the attacks."""
    general: str | None = None
    """Other text that must stay known. Trained on as well when the target is trained from scratch."""
    general_test: str | None = None
    """Text that general_* metrics are measured on; --general when not given."""
    seed: int = 0
    """First seed of initialisation, data order and random labels."""
    seeds: int = 1
    """Number of seeds; with several, results are means with 95 % intervals."""
    learning_rates: tuple[float, ...] = ()
    """Try each rate for each method and keep the best by forget loss against its target and by harm to retain and
    general loss. The retrained model plays no part in the choice. Not given: --learning-rate alone."""
    stop_at: Literal["approximate", "retrained", "never"] = "approximate"
    """Stop a method once its forget loss reaches: the original model's loss on the approximate set; the retrained
    model's on the forget set (an oracle, for measurements only); never, all epochs are run."""
    trainable: tuple[str, ...] = ()
    """Unlearn in parameters whose path matches one of these regular expressions alone, such as blocks/mlp/down/.*."""
    density: float = 1.0
    """Unlearn in this share of the parameters alone, those where the gradient of the forget loss is largest (arXiv
    2310.12508), by a sparse difference; of those that match --trainable, where given. 1 is all."""
    lora: LoraConfig = LoraConfig(rank=0)
    evaluate_every: int = 4
    """Unlearning steps between measurements of the sets (curves, and the stopping rule)."""
    curve_records: int = 128
    """Records of each set measured while a method runs. Final numbers use all."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    compute: Annotated[ComputeConfig, tyro.conf.arg(name="")] = ComputeConfig()
    unlearning: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig(
        epochs=30, learning_rate=1e-4, schedule="constant", warmup=0.0
    )
    train: TrainConfig = TrainConfig(epochs=12, learning_rate=3e-3)
    text: Annotated[TextConfig, tyro.conf.arg(name="")] = TextConfig()
    size: SizeConfig = SizeConfig()
    corpus: fictional.FictionalConfig = fictional.FictionalConfig()


def default() -> Config:
    """100 fictional people, a model of 0.3 M parameters, seven methods; about two minutes on two CPU cores"""
    # The paper's 1:1 mix harms the retained people by 15 to 30 % at every rate tried: docs/experiments.md.
    mixed = {name: one for name in PAPER if isinstance(one := METHODS[name], AscentDescent | AscentKL)}
    twice = [f"{name}.{field}" for name, one in mixed.items()
             for field in ("retain_ratio=2", f"retain_weight={2 * one.forget_weight:g}")]  # fmt: skip
    return Config(settings=tuple(twice))


def smoke() -> Config:
    """12 fictional people and a tiny model; half a minute, numbers without meaning"""
    return Config(
        size=SizeConfig(width=32, layers=2, heads=2, context=64, vocab_size=512),
        corpus=fictional.FictionalConfig(people=12, general_records=40, general_test_records=20),
        train=TrainConfig(epochs=4, learning_rate=5e-3),
        unlearning=dataclasses.replace(Config().unlearning, epochs=2),
    )


PRESETS = {"default": default, "smoke": smoke}


def run(config: Config) -> None:
    """Read and check everything, then train, unlearn, score and report."""
    notes: list[str] = []
    methods = choose(config.methods, given(config) or None, notes.append)
    # The default preset has settings for methods that this run may leave out; the user's own must fit the run.
    settings = [one for one in config.settings if one.partition(".")[0] in methods or one not in default().settings]
    methods = adjust(methods, tuple(settings))
    check(config, methods)
    out = Run("train.unlearn", config, config.out, config.resume)
    start, setting, retrained = prepare(config, methods)
    for note in notes:  # not before what is wrong is told
        command.say(note)
    out.begin()
    seeds = range(config.seed, config.seed + config.seeds)
    runs = [one_seed(config, out, start, setting, retrained, methods, seed) for seed in seeds]
    rows = over_seeds(runs)
    document = out.finish(rows)
    write_report(out.directory / "report.html", "Unlearning against retraining", rows,
                 _curves(out, config.seed, runs[0]), document["config"])  # fmt: skip
    command.print_table(rows, TERMINAL, f"train.unlearn · {out.directory}")


def given(config: Config) -> dict[str, str]:
    """Return the sources of the sets that there are, by name; none for the generated corpus."""
    names = ("forget", "retain", "approximate", "general", "general_test")
    return {name: getattr(config, name) for name in names if getattr(config, name)}


def check(config: Config, methods: dict[str, Method]) -> None:
    """Raise UserError for settings that would fail only after minutes of training."""
    command.at_least(1, seeds=config.seeds, evaluate_every=config.evaluate_every, curve_records=config.curve_records)
    command.at_least(0, checkpoint_every=config.checkpoint_every, seed=config.seed)
    config.train.microbatch_of(config.train.batch_size)
    forget_rows = config.unlearning.batch_size
    for method in methods.values():
        mixed = [retain_rows(method, forget_rows)] if method.needs else []
        config.unlearning.microbatch_of(forget_rows, *mixed)
    for rate in config.learning_rates:
        dataclasses.replace(config.unlearning, learning_rate=rate)
    if len(config.learning_rates) > 1:
        generated = not (config.forget or config.model or config.base)  # which has every set
        known = {
            "approximate": config.approximate or generated,
            "retrained": config.retrained or not config.model,
            "never": False,
        }[config.stop_at]
        if not known:
            raise UserError(
                f"--learning-rates with several values needs a target to choose by: --stop-at {config.stop_at} "
                "gives none; give --approximate, or --stop-at retrained and that model"
            )


def prepare(config: Config, methods: dict[str, Method]) -> tuple[Start, Setting, Any]:
    """Read and tokenise every set, load the starting model and the parameters of --retrained, or raise UserError.

    The setting has neither the parameters to unlearn from nor the seed's cache yet.
    """
    sources = given(config)
    if sources or config.model or config.base:
        if "forget" not in sources:
            raise UserError(
                "--forget is missing; give the records to forget, or no data flags for the generated corpus"
            )
        if not config.model and "retain" not in sources:
            raise UserError("--retain is missing; without --model the yardstick is trained on it")
        records = {name: read(source, config.text) for name, source in sources.items()}
    else:
        records = fictional.generate(config.corpus)
    if config.model and config.base:
        raise UserError("--model and --base exclude each other; --model is unlearned as it is, --base is trained first")
    if config.retrained and not config.model:
        raise UserError("--retrained goes with --model; without --model the yardstick is trained here")
    for other in ("retain", "approximate"):
        shared = {record.id for record in records["forget"]} & {record.id for record in records.get(other, ())}
        if shared:
            raise UserError(f"--forget and --{other} share {len(shared)} ids, such as {min(shared)!r}; they must not")

    known = records.get("retain", []) + records.get("general", [])
    texts = tokenizer_texts(known, config.text) if sources else fictional.tokenizer_texts(known)
    start = start_from(
        config.model or config.base, tokenizer_name=config.tokenizer, size=config.size, compute=config.compute,
        texts=texts,
    )  # fmt: skip
    require_causal(start.model, config.model or config.base)
    moving = moving_parts(config.trainable, config.lora)
    jax.eval_shape(moving.init, jax.random.key(0), {"model": start.model.shapes()})  # tells what matches nothing
    if config.density != 1:
        candidates(start.model, config.trainable, config.density)
        if config.lora.rank:
            raise UserError("--density and --lora.rank exclude each other")

    def tokens(records, where, tell=command.say):
        return encode(records, start.tokenizer, config.text, context=start.model.max_length, where=where, tell=tell)

    setting = Setting(
        start.model, None, {name: tokens(part, name) for name, part in records.items()}, config.unlearning.batch_size,
        config.seed, tuple(sorted(set(start.tokenizer.all_special_ids))), start.tokenizer.pad_token_id,
        records["forget"], start.tokenizer, functools.partial(tokens, where="other answers", tell=lambda message: None),
        microbatch=config.unlearning.microbatch_of(config.unlearning.batch_size),
    )  # fmt: skip
    for name, method in methods.items():
        check_setting(method, name, setting)
    retrained = None
    if config.retrained:
        model, retrained = hub.load(config.retrained)
        if model.config != start.model.config:
            raise UserError(f"--retrained {config.retrained} is another architecture than --model {config.model}")
    return start, setting, retrained


def one_seed(
    config: Config, out: Run, start: Start, setting: Setting, retrained, methods: dict[str, Method], seed: int
) -> list[dict]:
    """Train or load the two models, run every method, and return the rows `original`, `retrained`, then the methods."""
    home, sets = out.directory / f"seed{seed}", setting.sets
    scored = {name: sets[name] for name in ("forget", "approximate", "retain") if name in sets}
    if "general" in sets or "general_test" in sets:
        scored["general"] = sets["general_test" if "general_test" in sets else "general"]

    original, original_cost = target_model(config, out, start, sets, None, home, seed, "original")
    retrained, retrained_cost = target_model(config, out, start, sets, retrained, home, seed, "retrained")
    model = start.model
    first = {"name": "original", **score(model, original, scored), **original_cost}
    yardstick = None
    if retrained is not None:
        yardstick = {"name": "retrained", **score(model, retrained, scored), **retrained_cost}
        if "approximate" in scored:
            # How far the paper's stand-in for retraining is from retraining, in perplexity.
            stand_in = first["approximate_perplexity"] - yardstick["forget_perplexity"]
            yardstick["approximate_retraining_error"] = abs(stand_in)
    target = {
        "approximate": first["approximate_nll"],
        "retrained": yardstick and yardstick["forget_nll"],
        "never": None,
    }[config.stop_at]
    if target is None and config.stop_at != "never":
        command.say(f"--stop-at {config.stop_at} needs that set or model, which is not given; all epochs are run")

    setting = setting._replace(params=original, seed=seed, cache=home / "reference")
    moving = moving_parts(config.trainable, config.lora)
    if config.density != 1:
        moving = salient(setting, config.trainable, config.density)
    rows = [first, *([yardstick] if yardstick else [])]
    for name, method in methods.items():
        try:
            params, cost = best_rate(config, out, start, setting, home, name, method, moving, target, scored)
        except NonFiniteLoss as error:
            rows.append({"name": name, **dict.fromkeys(first.keys() - {"name"}), "note": f"failed: {error}"})
            continue
        rows.append({"name": name, **score(model, params, scored), **cost, "target_nll": target})
    base = yardstick and yardstick.get("train_flops")
    for row in rows:
        failed = row["forget_nll"] is None
        row.update(gaps(row, yardstick))
        row["flops_vs_retraining"] = row["train_flops"] / base if base and row.get("train_flops") else None
        if row.get("retain_perplexity") and not failed:
            row["retain_perplexity_change"] = 100.0 * (row["retain_perplexity"] / first["retain_perplexity"] - 1.0)
        if row["name"] not in YARDSTICKS:
            row["verdict"] = "failed" if failed else verdict(row, first, yardstick)
    return rows


def target_model(config: Config, out: Run, start: Start, sets, given, home: Path, seed: int, name: str):
    """Return (params, cost) of the model `original` or `retrained`: given, or trained with or without the forget set.

    The general set is trained on only from scratch: a base model or a given one has seen such text already.
    """
    unknown = dict.fromkeys(("steps", "seconds", "train_tokens", "tokens_per_second", "train_flops"))
    if config.model:
        path, params = (config.model, start.params(seed)) if name == "original" else (config.retrained, given)
        record = (finished(Path(path)) if path else None) or {}
        return params, {field: record.get(field) for field in unknown}
    used = ["forget"] * (name == "original") + ["retain"] + ["general"] * (config.base is None and "general" in sets)
    examples = concatenate([sets[part] for part in used])
    train, model = config.train, start.model
    batches = Batches((Stream(examples, train.batch_size),), train.epochs, seed, "token")
    step = make_step(
        next_token(model), everything(), mean_gradient(train.microbatch_of(train.batch_size)), adamw(train)
    )
    return run_stage(
        out, home, seed, name, train_stage, model, step, {"model": start.params(seed)}, batches,
        learning_rate=train.learning_rate, save_tokenizer=start.save_tokenizer,
        checkpoint_every=config.checkpoint_every,
    )  # fmt: skip


def best_rate(config: Config, out: Run, start: Start, setting, home, name, method, moving, target, scored):
    """Run a method once, or once a learning rate and keep the best. Returns (params, cost).

    Best: least |forget loss - target| plus the rise of retain and general loss over the original's, nats a token, on
    the watched records. The retrained model is not consulted.
    """
    watched = {part: sample(examples, config.curve_records) for part, examples in scored.items()}
    rates = config.learning_rates or (config.unlearning.learning_rate,)
    before = watched_losses(setting.model, setting.params, watched) if len(rates) > 1 else None
    tried = []
    for rate in rates:
        stage = name if len(rates) == 1 else f"{name}@{rate:g}"
        try:
            params, cost = run_stage(
                out, home, setting.seed, stage, unlearn, method, setting, config.unlearning, moving,
                learning_rate=rate, watched=watched, target=target, evaluate_every=config.evaluate_every,
                curve=lambda step, losses, stage=stage: out.log(stage, step, {"seed": setting.seed, **losses}),
                save_tokenizer=start.save_tokenizer, checkpoint_every=config.checkpoint_every,
            )  # fmt: skip
        except NonFiniteLoss:
            if len(rates) == 1:
                raise
            continue
        losses, merit = cost.pop("watched"), 0.0
        if before is not None:
            kept = [f"{part}_nll" for part in ("retain", "general") if part in watched]
            harm = sum(max(0.0, losses[field] - before[field]) for field in kept)
            merit = abs(losses["forget_nll"] - target) + harm
        tried.append((merit, rate, params, cost))
    if not tried:
        raise NonFiniteLoss("every learning rate tried ended in a non-finite loss")
    best = min(tried, key=lambda one: one[0])
    return best[2], {**best[3], "rates_tried": len(rates)}


def run_stage(out: Run, home: Path, seed: int, stage: str, work, *args: Any, **settings: Any):
    """Call a stage with its directory, checkpoints, log and progress bar filled in."""
    label = stage if seed == 0 else f"{stage} (seed {seed})"
    tag = {"seed": seed}
    with command.progress(label) as show:
        return work(
            home / "models" / stage, *args, checkpoints=home / "checkpoints" / stage,
            log=lambda step, metrics: out.log(stage, step, {**tag, **metrics}),
            resumed=lambda step: out.rewind(stage, step, **tag), show=show, **settings,
        )  # fmt: skip


def _curves(out: Run, seed: int, rows: list[dict]) -> list[dict]:
    """Return the lines of a seed's measurements, of every method at the rate that was kept."""
    kept = {row["name"]: row["name"] for row in rows}
    kept |= {f"{row['name']}@{row['learning_rate']:g}": row["name"] for row in rows if row.get("learning_rate")}
    return [line | {"stage": kept[line["stage"]]} for line in out.metrics()
            if line["seed"] == seed and "forget_nll" in line and line["stage"] in kept]  # fmt: skip


if __name__ == "__main__":
    command.main(run, PRESETS)
