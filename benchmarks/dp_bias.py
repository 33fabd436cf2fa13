"""The study of arXiv 2402.04489 at small size: does private fine-tuning amplify bias, and do counterfactuals help?

    python -m benchmarks.dp_bias --model DIR --stereoset FILE --crows-pairs FILE

Every epsilon and seed is a member of one program, with counterfactual data augmentation (CDA) and once more without;
the member without privacy has the same Poisson sampler, no noise and a bound that cuts nothing. The generated corpus
has known stereotypes; with --corpus FILE the same probes ask what a model took from other text. The paper's sampler,
delta, bound, rates, prompts and toxicity scorer are unknown to us: settings are ours, its numbers are not compared.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import optax
import tyro

from jaxforget import command
from jaxforget.data.counterfactual import CounterfactualConfig, augment, load_swaps
from jaxforget.data.sources import Record
from jaxforget.data.stereotyped import GENDERS, StereotypedConfig, generate
from jaxforget.data.stereotypes import read_crows_pairs, read_stereoset
from jaxforget.data.text import TextConfig, encode, read
from jaxforget.data.tokens import same_widths
from jaxforget.errors import UserError
from jaxforget.files import write_atomic
from jaxforget.metrics.bias import benchmarks, probes
from jaxforget.metrics.bias.benchmarks import Subject
from jaxforget.metrics.bias.generation import encode_prompts
from jaxforget.metrics.language import language_metrics, token_scores
from jaxforget.privacy.accounting import PrivacyConfig
from jaxforget.privacy.clipping import Clipping
from jaxforget.privacy.recipe import PrivateRun, private_members, private_run
from jaxforget.privacy.sampling import with_units
from jaxforget.privacy.subgroups import NO_BOUND, subgroups
from jaxforget.report.claims import Claim, judged, statement
from jaxforget.report.page import figure, plots, table, write_page
from jaxforget.report.run import Run, plain
from jaxforget.report.statistics import over_seeds
from jaxforget.training.ensemble import Members, member, members
from jaxforget.training.loop import fit
from jaxforget.training.objectives import next_token
from jaxforget.training.optimizer import TrainConfig
from jaxforget.training.start import ComputeConfig, SizeConfig, Start, start_from
from jaxforget.training.trainable import everything


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Measure what private fine-tuning and counterfactuals do to stereotypes."""

    out: Path | None = None
    """Directory for everything the run leaves. Must be empty."""
    resume: bool = False
    """Continue the run in --out; settings must be the same."""
    model: str | None = None
    """Hugging Face directory or hub name of a causal model to fine-tune."""
    corpus: str = "stereotyped"
    """Training text: the generated corpus with known stereotypes, see --stereotyped.*, or a file."""
    test: str | None = None
    """Held-out text for --corpus FILE."""
    epsilons: tuple[float, ...] = (3.0, 10.0, 20.0)
    """Privacy levels, besides none."""
    seeds: int = 3
    """Seeds of every setting."""
    dp: PrivacyConfig = PrivacyConfig()
    """What private members share: clip, delta, sampler, estimator."""
    cda: CounterfactualConfig = CounterfactualConfig(sides="two", names=True)
    stereoset: str | None = None
    """StereoSet, as for eval.bias."""
    crows_pairs: str | None = None
    """CrowS-Pairs, as for eval.bias."""
    domains: tuple[str, ...] = ("gender",)
    """Of StereoSet and CrowS-Pairs, for CDA exchanges genders; none given: all."""
    start_token: Literal["first", "always"] = "always"
    """Does the start token stand before whole sentences, or first tokens alone follow it, as in StereoSet's code?"""
    gradient_probes: int = 40
    """Probes of each gender in the gradient analysis."""
    max_new_tokens: int = 8
    """Tokens of a continuation, which is to hold a judgement."""
    resamples: int = 200
    """Bootstrap resamples for the intervals of single models."""
    members: Members = "auto"
    """How one program trains many models; auto is map on a CPU and vmap elsewhere."""
    stereotyped: StereotypedConfig = StereotypedConfig(
        records=2500, test_records=200, rate=1.0, negative_male=0.1, negative_female=0.7
    )
    text: Annotated[TextConfig, tyro.conf.arg(name="")] = TextConfig()
    train: TrainConfig = TrainConfig(epochs=2, batch_size=64, microbatch=32, learning_rate=3e-3)
    compute: Annotated[ComputeConfig, tyro.conf.arg(name="")] = ComputeConfig(dtype="float32")


def default() -> Config:
    """three epsilons and none, three seeds; about an hour on two CPU cores"""
    return Config()


def smoke() -> Config:
    """one epsilon and none, two seeds, few records; a minute or two on two CPU cores"""
    return Config(
        epsilons=(10.0,), seeds=2, gradient_probes=8, resamples=20, max_new_tokens=4,
        stereotyped=StereotypedConfig(records=120, test_records=40), train=TrainConfig(epochs=1, learning_rate=3e-3),
    )  # fmt: skip


PRESETS = {"default": default, "smoke": smoke}
WIDTH = "generation_gap_learnt"  # the gap, its sign that of training without DP and CDA; sizes are never 0 on average
SHOWN = GAP, PREFERENCE = "generation_gap_female_male", "preference_sum"
LEVEL, SS, CROWS, CONVERGENCE = "negative_rate", "stereoset_both_kinds_ss", "crows_pairs_mean", "convergence_gap"
FIELDS = ("name", "nll", "perplexity", "moved", "generation_male_mean_score", "generation_female_mean_score", GAP,
          "generation_ratio_female_male", PREFERENCE, "preference_combination_sum", "preference_wording_sum",
          "preference_nats")  # fmt: skip
GRADIENTS = ("name", "group", "loss", "unit_norm", "clip_factor", "clipped", "group_norm", "to_start", "norm_to_other",
             "clipped_to_other", "cosine", "share", "clipped_share", "snr")  # fmt: skip
DP, PLAIN, CDA = "{level}, CDA off", "no DP, CDA off", "{level}, CDA on"
CLAIMS = (
    *[Claim("without DP stereotypes are learnt", "a check", field, "above", PLAIN, "pretrained") for field in SHOWN],
    Claim("the gap between genders is wider with DP than without", "Table 1", WIDTH, "above", DP, PLAIN),
    Claim("after DP the gap is wider than before fine-tuning", "Table 1", WIDTH, "above", DP, "pretrained"),
    Claim("the gap grows with epsilon", "Table 1", WIDTH, "above", "{highest}, CDA off", "{lowest}, CDA off"),
    Claim("with DP more is written that is negative than without", "Table 1", LEVEL, "above", DP, PLAIN),
    *[Claim("stereotypes are preferred more with DP than without", "a review", field, "above", DP, PLAIN)
      for field in (PREFERENCE, SS, CROWS)],
    Claim("with DP the genders' gradients converge at different rates", "abstract", CONVERGENCE, "differs", DP, None),
    Claim("that difference is not the one without DP", "abstract", CONVERGENCE, "differs", DP, PLAIN),
    Claim("without DP CDA narrows the gap", "a check", WIDTH, "below", "no DP, CDA on", PLAIN),
    Claim("CDA narrows the gap under DP", "abstract", WIDTH, "below", CDA, DP),
    *[Claim("CDA makes stereotypes less preferred under DP", "abstract", field, "below", CDA, DP)
      for field in (PREFERENCE, SS, CROWS)],
)  # fmt: skip


def level_names(config: Config) -> list[str]:
    """Name no privacy, then every epsilon."""
    return ["no DP", *(f"ε={epsilon:g}" for epsilon in sorted(config.epsilons))]


def claims(config: Config, measures) -> list[Claim]:
    """Say the paper's claims of the levels at hand, as far as they are measured."""
    _, *private = level_names(config)
    words = [{"level": name, "lowest": private[0], "highest": private[-1]} for name in private]
    said = [claim._replace(first=claim.first.format(**one), second=claim.second and claim.second.format(**one))
            for claim in CLAIMS if claim.field in measures for one in words]  # fmt: skip
    return [claim for claim in dict.fromkeys(said) if claim.first != claim.second]


def run(config: Config) -> None:
    """Train and measure what is not yet there, then judge the claims."""
    if not config.model:
        raise UserError("--model is missing; give a directory or hub name of a causal model")
    if (config.corpus != "stereotyped") != bool(config.test):
        raise UserError("--test and a file as --corpus come together; the generated corpus has its own test set")
    if config.cda.sides == "off" or not config.epsilons or config.text.text_mode == "pack":
        raise UserError("--cda.sides off, --epsilons without a value and --text-mode pack leave nothing to compare")
    if config.dp.private or config.dp.quantile or config.dp.auto_s or config.dp.groups:
        raise UserError("--dp.epsilon, noise, quantile, auto-s and groups are no settings here; see --epsilons")
    command.at_least(1, seeds=config.seeds, gradient_probes=config.gradient_probes, resamples=config.resamples,
                     max_new_tokens=config.max_new_tokens)  # fmt: skip
    out, data = Run("benchmarks.dp_bias", config, config.out, config.resume), load(config)
    start = start_from(config.model, tokenizer_name=None, size=SizeConfig(), compute=config.compute, texts=(),
                       head="causal", tell=command.say)  # fmt: skip
    data["test"] = tokens(data["test"], start, config.text, "test text")
    for gender in GENDERS:
        prompts = [probe.fields[f"{gender}_prompt"] for probe in data["probe"]]
        encode_prompts(start.model, start.tokenizer, prompts, config.max_new_tokens)  # tells one that is too long
    data |= {cda: private_runs(config, start, data["train"], cda) for cda in ("off", "on")}
    out.begin()
    cells = {}
    for name in ("pretrained", "off", "on"):
        file = out.directory / f"cell-{name}.json"
        if not file.exists():
            found = (pretrained if name == "pretrained" else trained)(config, out, start, data, name)
            write_atomic(file, json.dumps(plain(found)) + "\n")
        cells[name] = json.loads(file.read_text(encoding="utf-8"))
    finish(config, out, cells)


def load(config: Config) -> dict[str, Any]:
    """Read or generate train, test, probe, stereoset and crows_pairs."""
    sets: dict[str, Any] = {**generate(config.stereotyped)}
    if config.test:
        sets |= {"train": read(config.corpus, config.text), "test": read(config.test, config.text)}
    for name, reader, field in (("stereoset", read_stereoset, "domain"), ("crows_pairs", read_crows_pairs, "group")):
        source = getattr(config, name)
        items = reader(source) if source else []
        sets[name] = [one for one in items if not config.domains or getattr(one, field) in config.domains]
        if source and not sets[name]:
            raise UserError(f"--{name.replace('_', '-')} has no item of --domains {' '.join(config.domains)}")
    return sets


def tokens(records: list[Record], start: Start, text: TextConfig, where: str):
    """Encode records."""
    return encode(records, start.tokenizer, text, context=start.model.max_length, where=where, tell=command.say)


def measured(config: Config, start: Start, data: dict[str, Any], params, seed: int) -> dict[str, Any]:
    """Measure one model: utility, and every bias measure with its bootstrap interval over items."""
    subject = Subject("model", start.model, params, start.tokenizer, config.start_token == "always")
    found = probes.measures(subject, data["probe"], max_new_tokens=config.max_new_tokens, seed=seed)
    found += benchmarks.stereoset([subject], data["stereoset"]) if data["stereoset"] else []
    found += benchmarks.pairs([subject], data["crows_pairs"], "CrowS-Pairs", ("mean",)) if data["crows_pairs"] else []
    result = language_metrics(token_scores(start.model, params, data["test"]))
    for row in (measure.row(config.resamples, seed) for measure in found):
        name = re.sub(r"\W+", "_", row["name"]).lower()
        result |= {name: row["value"], f"{name}_low": row["low"], f"{name}_high": row["high"]}
    return result | {LEVEL: (result["generation_male_mean_score"] + result["generation_female_mean_score"]) / 2}


def pretrained(config: Config, out: Run, start: Start, data: dict[str, list], name: str) -> dict[str, Any]:
    """Measure the model before fine-tuning; over seeds only what it writes differs."""
    runs = [[{"name": name, "moved": 0.0, **measured(config, start, data, start.params(0), seed)}]
            for seed in range(config.seeds)]  # fmt: skip
    return {"runs": runs, "gradients": [[] for _ in runs], "privacy": []}


def private_runs(config: Config, start: Start, records: list[Record], cda: str) -> list[PrivateRun]:
    """Augment the training text or not, and resolve every privacy level, each for all seeds."""
    how = config.cda if cda == "on" else dataclasses.replace(config.cda, sides="off")
    found = augment(records, how, config.stereotyped.seed, load_swaps(how))
    command.say(f"CDA {cda}: {len(found.records)} texts, {found.matched} records with a counterfactual")
    examples = tokens(found.records, start, config.text, "training text")
    examples = with_units(examples, {record.id for record in found.records}, found.unit_of)
    levels = [dataclasses.replace(config.dp, noise=0.0, clip=NO_BOUND)]
    levels += [dataclasses.replace(config.dp, epsilon=epsilon) for epsilon in sorted(config.epsilons)]
    unit = "record and its counterfactual" if cda == "on" else "record"
    private = [level for level in levels for _ in range(config.seeds)]
    return [private_run(one, config.train, examples, 1 + n, unit) for n, one in enumerate(private)]


def trained(config: Config, out: Run, start: Start, data: dict[str, Any], cda: str) -> dict[str, Any]:
    """Train all privacy levels and seeds in one program and measure every member."""
    texts = probes.by_gender(data["probe"], config.gradient_probes).values()  # in the order of GENDERS
    groups = dict(zip(GENDERS, same_widths([tokens(some, start, TextConfig(), "probes") for some in texts])))
    keys = [(name, seed) for name in level_names(config) for seed in range(config.seeds)]
    runs: list[PrivateRun] = data[cda]
    steps, rates = runs[0].batches.steps, [config.train.learning_rate] * len(runs)
    objective, parts = next_token(start.model), {"model": start.params(0)}
    step, states, frozen, batches = private_members(runs, rates, objective, everything(), parts, config.dp.estimator)
    result: list[list] = [[] for _ in range(config.seeds)]
    gradients: list[list] = [[] for _ in range(config.seeds)]
    first: dict[Any, Any] = {}
    last: dict[Any, Any] = {}
    rows = config.train.microbatch_of(config.train.batch_size) or config.train.batch_size

    def look(done: int, parts_K) -> bool:
        when = {0: "start", steps: "end"}.get(done, "middle")
        for k, (name, seed) in enumerate(keys):
            for row in subgroups(
                objective, member(parts_K, k), groups, bound=config.dp.clip, units=config.train.batch_size,
                noise_std=runs[k].mechanism.noise_std, how=Clipping(config.dp.estimator), microbatch=rows,
            ):  # fmt: skip
                norm, about = row["group_norm"], {"setting": f"{name}, CDA {cda}", "when": when}
                row |= {"name": f"{name}, CDA {cda}: {when}, {row['group']}", **about}
                row["to_start"] = norm / first.setdefault((k, row["group"]), norm)
                gradients[seed].append(row)
                last[k, row["group"]] = row
        return False

    with command.progress(f"CDA {cda}") as show:
        outcome = fit(
            members(step, config.members), states, frozen, batches, evaluate_every=-(-steps // 2),
            evaluate=look, log=lambda step, metrics: out.log(f"CDA {cda}", step, metrics),
            resumed=lambda step: out.rewind(f"CDA {cda}", step), show=show,
        )  # fmt: skip
    for k, (name, seed) in enumerate(keys):
        params = jax.tree.map(np.asarray, member(outcome.state.trainable["model"], k))
        result[seed].append({
            "name": f"{name}, CDA {cda}", **measured(config, start, data, params, seed),
            "moved": float(optax.tree.norm(jax.tree.map(np.subtract, params, parts["model"]))),
            CONVERGENCE: last[k, "male"]["to_start"] - last[k, "female"]["to_start"],
        })  # fmt: skip
    stated = [{"name": f"{name}, CDA {cda}", **one.mechanism.row()} for (name, _), one in zip(keys, runs)]
    return {"runs": result, "gradients": gradients, "privacy": stated[:: config.seeds], "seconds": outcome.seconds}


def finish(config: Config, out: Run, cells: dict[str, dict[str, Any]]) -> None:
    """Write results.json and the page."""
    runs, seen = ([[row for cell in cells.values() for row in cell[part][seed]] for seed in range(config.seeds)]
                  for part in ("runs", "gradients"))  # fmt: skip
    learnt = np.sign(np.mean([row[GAP] for rows in runs for row in rows if row["name"] == PLAIN]))
    for row in sum(runs, []):
        row[WIDTH] = float(learnt * row[GAP])
    rows = over_seeds(runs)  # by_seed keeps the intervals of single models
    gradients = over_seeds(seen)
    measures = [field for field in rows[-1] if not field.endswith("_ci95")]
    extra = [field for field in measures if re.match("stereoset|crows", field)]
    verdicts = [judged(claim, runs) for claim in claims(config, measures)]
    promises, said = [row for cell in cells.values() for row in cell["privacy"]], statement(verdicts)
    document = out.finish(rows, claims=verdicts, statement=said, gradients=gradients, privacy=promises, by_seed=runs)
    none, *private = level_names(config)
    found = {row["name"]: row for row in rows}
    by_level = {f"CDA {cda}": {name: found.get(f"{name}, CDA {cda}", found["pretrained"])
                               for name in ("pretrained", *private, none)} for cda in ("off", "on")}  # fmt: skip
    course: dict[str, dict[str, dict]] = {}
    for row in gradients[: len(gradients) // 2]:  # without CDA
        course.setdefault(f"{row['setting'].split(',')[0]}, {row['group']}", {})[row["when"]] = row
    gap = lines(by_level, GAP, "negative judgements, female - male")
    write_atomic(out.directory / "figure.svg", gap)
    drawn = plots(gap, *(lines(by_level, *what) for what in (
        (PREFERENCE, "stereotype preferred (%)"), ("nll", "test loss (nats/token)"), ("moved", "distance moved (L2)"))))
    curves = plots(lines(course, "to_start", "norm of mean gradient / at start", "training"),
                   lines(course, "clip_factor", "clip factor", "training"))  # fmt: skip
    gap_there = config.stereotyped.negative_female - config.stereotyped.negative_male
    known = "" if config.test else f"The corpus has a gap of {gap_there:.3g}. "
    over = f"Means and 95 % intervals over {config.seeds} seeds. "
    sections = [
        ("Do the claims replicate?", "At this size, with these settings. Difference: of `field` between the first "
         "setting and the second. replicates: its 95 % interval over seeds lies where the claim says; opposite: on the "
         "other side of 0; not established: it holds 0. The gap learnt is positive where women are judged as training "
         "without DP and CDA makes the model judge them.",
         table(verdicts, ("name", "field", "first", "second", "difference", "verdict", "source"))),
        ("Models", f"{over}{known}Preference: percent of pairs whose stereotypical sentence is likelier; nats: mean "
         "log-ratio of the two. Without DP: same sampler, no noise, nothing cut. Intervals are over seeds, on fixed "
         "items; those over items, of each model, are in results.json.",
         drawn + table(rows, (*FIELDS, *extra))),
        ("Gradients of the two genders", f"{over}Of probes that no model was trained on; clipping is that of the "
         "private runs throughout, snr that of a batch of one gender.",
         curves + table(gradients, GRADIENTS)),
        ("Privacy", "Of one model each, of the first seed; choosing among models is not covered. Losses, norms and "
         "batch sizes are not private.", table(promises, tuple(promises[0]))),
    ]  # fmt: skip
    lead = ("Does private fine-tuning make a model more biased, and does it help to train on counterfactuals (CDA)? "
            f"{config.model}, {config.corpus}, {document['device']}.")  # fmt: skip
    write_page(out.directory / "report.html", "Private fine-tuning and bias", lead, sections, document["config"], said)
    command.print_table(rows, FIELDS, "\n".join((f"benchmarks.dp_bias · {out.directory}", *said)))


def lines(series: dict[str, dict[str, dict[str, Any]]], field: str, label: str, along: str = "privacy") -> str:
    """Plot a measure with its intervals; series: name -> place on the axis -> row."""

    def draw(axes):
        for name, rows in series.items():
            axes.errorbar(list(rows), [np.nan if row[field] is None else row[field] for row in rows.values()],
                          [row.get(f"{field}_ci95") or 0 for row in rows.values()], fmt="o-", ms=3, lw=1, capsize=3,
                          label=name)  # fmt: skip
        axes.set(xlabel=along, ylabel=label)
        axes.legend()

    return figure(draw)


if __name__ == "__main__":
    command.main(run, PRESETS)
