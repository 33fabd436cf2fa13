"""The study of FairSISA (arXiv 2312.07420): what equalized odds costs an ensemble, before and after deletions.

    python -m benchmarks.fairsisa --data HATEXPLAIN::split=train --fit HATEXPLAIN::split=val \
        --test HATEXPLAIN::split=test --label-field toxic

For every number of shards, the models of all seeds train in one program, once on all records and once without those
deleted; with one slice a shard that is what deletion from the ensemble gives, bit for bit. Every method of
jaxforget/fairness is fitted on the fit set and reported on both sets, for every group attribute. The paper's tables
and hyper-parameters were not available to us: settings, group rules and deletion shares are ours.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

from jaxforget import command
from jaxforget.data import fictional
from jaxforget.data.sampling import id_keys, order
from jaxforget.data.sources import Record
from jaxforget.data.tasks import class_names
from jaxforget.data.text import TextConfig, encode, read, tokenizer_texts
from jaxforget.errors import UserError
from jaxforget.fairness.dual import solve_many
from jaxforget.fairness.groups import groups_of
from jaxforget.fairness.odds import equalized_odds, program
from jaxforget.fairness.statistics import cell_counts, resample_counts
from jaxforget.fairness.study import Votes, compare
from jaxforget.files import save_arrays, write_atomic
from jaxforget.metrics.classification import class_logp
from jaxforget.report.page import figure, plots, table, write_page
from jaxforget.report.run import Run
from jaxforget.report.statistics import over_seeds
from jaxforget.sisa.plan import uniform
from jaxforget.training.batches import Batches, Stream
from jaxforget.training.ensemble import MemberBatches, Members, member, members, stack
from jaxforget.training.gradients import mean_gradient
from jaxforget.training.loop import fit
from jaxforget.training.objectives import classification
from jaxforget.training.optimizer import TrainConfig, adamw, set_schedule
from jaxforget.training.start import ComputeConfig, SizeConfig, start_from
from jaxforget.training.step import make_step
from jaxforget.training.trainable import everything

RELIGION = "Islam,Jewish,Christian,Hindu,Buddhism"
RACE = "African,Arab,Caucasian,Asian,Hispanic,Indigenous,Indian"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Measure what equalized odds costs an ensemble, before and after deletions."""

    out: Path | None = None
    """Directory for everything the run leaves. Must be empty."""
    resume: bool = False
    """Continue the run in --out; settings must be the same."""
    data: str | None = None
    """Training set."""
    fit: str | None = None
    """Set that post-processing is fitted on."""
    test: str | None = None
    """Set that is reported."""
    groups: tuple[str, ...] = (
        f"targets={RELIGION}", f"targets_maj2={RELIGION}", f"targets={RACE}", f"targets_maj2={RACE}",
    )  # fmt: skip
    """Group attributes, each a column or COLUMN=value,value: named by any annotator, or by two of the three."""
    families: tuple[Literal["bert", "gpt2"], ...] = ("bert", "gpt2")
    """Models trained from scratch."""
    model: str | None = None
    """Hugging Face directory or hub name to start from, instead of --families."""
    tokenizer_data: tuple[str, ...] = ()
    """Text to build a tokenizer from."""
    shards: tuple[int, ...] = (1, 3, 5, 7, 9)
    """Numbers of shards."""
    seeds: int = 3
    """Seeds of shards, initialisation and deletions."""
    deleted: tuple[float, ...] = (0.0, 0.1)
    """Shares of the training records that are deleted."""
    methods: tuple[str, ...] = ("none", "each", "majority", "count", "vector")
    """Post-processing methods."""
    epsilon: tuple[float, ...] = (0.0, 0.02, 0.05)
    """Allowed gaps."""
    resamples: int = 200
    """Bootstrap resamples of the test set."""
    members: Members = "auto"
    """How one program trains many models; auto is map on a CPU and vmap elsewhere."""
    width: int = 0
    """Models in one program; 0 is all seeds and shards."""
    text: Annotated[TextConfig, tyro.conf.arg(name="")] = TextConfig(label_field="label")
    train: TrainConfig = TrainConfig(epochs=2, batch_size=16, learning_rate=1e-3)
    size: SizeConfig = SizeConfig(width=64, layers=2, context=64, vocab_size=2048)
    compute: Annotated[ComputeConfig, tyro.conf.arg(name="")] = ComputeConfig()


def default() -> Config:
    """two families, five numbers of shards, three seeds; about 40 minutes on two CPU cores"""
    return Config()


PRESETS = {"default": default}
FIELDS = (
    "setting", "fit_accuracy", "fit_eo_max", "test_accuracy", "test_eo_max", "test_eo_avg", "test_accuracy_change",
    "test_eo_max_change", "gap_lower", "gap_higher",
)  # fmt: skip
SUMMARY = (
    "name", "test_accuracy", "test_eo_max", "test_eo_max_noise", "test_accuracy_change", "test_eo_max_change",
    "gap_lower", "gap_higher",
)  # fmt: skip


def run(config: Config) -> None:
    """Train and vote, then post-process and compare."""
    if not (config.data and config.fit and config.test):
        raise UserError("--data, --fit and --test are needed")
    command.at_least(1, seeds=config.seeds, resamples=config.resamples)
    if any(not 0 <= share < 1 for share in config.deleted):
        raise UserError(f"--deleted is {config.deleted}; shares must be at least 0 and below 1")
    out = Run("benchmarks.fairsisa", config, config.out, config.resume)
    sets = {name: read(getattr(config, name), config.text) for name in ("data", "fit", "test")}
    labels = class_names(sets["data"], "training text")
    if len(labels) != 2:
        raise UserError(f"--label-field {config.text.label_field} has the classes {', '.join(labels)}; two are needed")
    for spec in config.groups:
        names = groups_of(sets["fit"], spec, where=config.fit)[1]
        groups_of(sets["test"], spec, names, where=config.test)
    out.begin()
    rows: list[dict[str, Any]] = []
    sizes = {name: dataclasses.replace(config.size, family=name) for name in config.families}
    for family, size in ({config.model: config.size} if config.model else sizes).items():
        votes = vote(config, out, family, size, sets, labels)
        for (shards, share), voted in votes.items():
            for spec in config.groups:
                rows += compared(config, family, shards, share, spec, sets, labels, voted)
    finish(config, out, rows)


def vote(
    config: Config, out: Run, family: str, size: SizeConfig, sets: dict[str, list[Record]], labels: tuple[str, ...]
) -> dict:
    """Return (shards, share) -> set -> votes (seeds, N, K) of the members; what was computed before is read back."""
    texts = [record for source in config.tokenizer_data for record in read(source, TextConfig())]
    start = start_from(
        config.model, tokenizer_name=None, compute=config.compute, head="classification", labels=labels,
        size=size, tell=command.say,
        texts=tokenizer_texts(texts, config.text) if texts else fictional.tokenizer_texts(),
    )  # fmt: skip
    examples = {
        name: encode(records, start.tokenizer, config.text, context=start.model.max_length, where=name,
                     tell=command.say, task="classification", labels=labels)
        for name, records in sets.items()
    }  # fmt: skip
    step = make_step(
        classification(start.model), everything(), mean_gradient(config.train.microbatch_of(config.train.batch_size)),
        adamw(config.train),
    )  # fmt: skip
    ids, result = examples["data"].ids, {}
    for shards in config.shards:
        for share in config.deleted:
            file = out.directory / "votes" / f"{Path(family).name}-{shards}-{share:g}.npz"
            if not file.exists():
                trained = train(config, step, start, examples["data"], ids, shards, share)
                logp = {
                    name: np.stack([class_logp(start.model, params, examples[name]) for params in trained])
                    for name in ("fit", "test")
                }
                file.parent.mkdir(exist_ok=True)
                save_arrays(file, **logp)
            saved = np.load(file)
            # (seeds * shards, N, C) -> hard labels (seeds, N, shards)
            result[shards, share] = {
                name: saved[name].argmax(axis=-1).reshape(config.seeds, shards, -1).transpose(0, 2, 1)
                for name in ("fit", "test")
            }
    return result


def train(config: Config, step, start, examples, ids, shards: int, share: float) -> list:
    """Train the shard models of all seeds together; returns their parameters, seeds first."""
    states, batches, key_N = [], [], id_keys(ids)
    for seed in range(config.seeds):
        shard_N, _ = uniform(ids, shards, 1, seed)
        kept_N = np.ones(len(ids), bool)
        kept_N[order(key_N, seed, -2)[: round(share * len(ids))]] = False
        parts = {"model": start.params(seed)}
        for shard in range(shards):
            key = jax.random.fold_in(jax.random.key(seed), shard)
            stream = Stream(examples.take(kept_N & (shard_N == shard)), config.train.batch_size)
            batches.append(Batches((stream,), config.train.epochs, seed * 1000 + shard))
            state, frozen = step.init(key, parts)
            rate = config.train.learning_rate
            states.append(set_schedule(state, learning_rate=rate, total=batches[-1].steps))
    width, trained = config.width or len(states), []
    for first in range(0, len(states), width):
        part, rows = states[first : first + width], batches[first : first + width]
        idle = width - len(part)
        with command.progress(f"{shards} shards, {share:.0%} deleted") as show:
            outcome = fit(members(step, config.members), stack(part + [part[0]] * idle), frozen,
                          MemberBatches((*rows, *[None] * idle)), show=show)  # fmt: skip
        trained += [member(outcome.state.trainable, k)["model"] for k in range(len(part))]
    return trained


def attribute(spec: str) -> str:
    """Name a group attribute shortly: `religion, any`."""
    column, _, values = spec.partition("=")
    known = {RELIGION: "religion", RACE: "race"}
    rule = {"targets": "any", "targets_maj2": "maj2"}.get(column, column)
    return f"{known[values]}, {rule}" if values in known else spec


def compared(config: Config, family, shards, share, spec, sets, labels, voted) -> list[dict[str, Any]]:
    """Fit and score every method on the votes of every seed; means over seeds."""
    group_N = {}
    group_N["fit"], names = groups_of(sets["fit"], spec, where="fit")
    group_N["test"], _ = groups_of(sets["test"], spec, names, where="test")
    runs = []
    for seed in range(config.seeds):
        fitted, tested = (
            Votes(
                voted[name][seed],
                np.asarray([str(record.fields["label"]) == labels[1] for record in sets[name]], np.int32),
                group_N[name],
                id_keys([record.id for record in sets[name]]),
            )
            for name in ("fit", "test")
        )
        found = compare(fitted, tested, names, methods=config.methods, epsilons=config.epsilon,
                        resamples=config.resamples, seed=seed)  # fmt: skip
        runs.append([
            {n: v for n, v in row.items() if not isinstance(v, (list, dict))}
            | {"gap_lower": float(row["test_eo_max_change_high"] < 0),  # by more than resampling explains
               "gap_higher": float(row["test_eo_max_change_low"] > 0)}
            for row, _ in found
        ])  # fmt: skip
    about = {"family": Path(family).name, "shards": shards, "deleted": share, "attribute": attribute(spec)}
    return [
        {**row, **about, "method": row["name"], "setting": f"S={shards}, {share:.0%} deleted: {row['name']}",
         "name": f"{about['family']} S={shards} {share:.0%} deleted, {about['attribute']}: {row['name']}"}
        for row in over_seeds(runs)
    ]  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Average over numbers of shards (1 aside, where all methods are one) and deletions, for every method."""
    result = []
    keys = dict.fromkeys((row["family"], row["attribute"], row["method"]) for row in rows)
    for family, name, method in keys:
        mine = [row for row in rows if (row["family"], row["attribute"], row["method"]) == (family, name, method)]
        mine = [row for row in mine if row["shards"] > 1] or mine
        means = {field: float(np.mean([row[field] for row in mine])) for field in SUMMARY[1:]}
        result.append({"name": f"{family}, {name}: {method}", "family": family, "attribute": name, "method": method,
                       "settings": len(mine), **means})  # fmt: skip
    return result


def finish(config: Config, out: Run, rows: list[dict[str, Any]]) -> None:
    """Write results.json and the page."""
    average, refitted = summary(rows), refits()
    document = out.finish(rows, summary=average, refits=refitted)
    families = list(dict.fromkeys(row["family"] for row in rows))
    attributes = list(dict.fromkeys(row["attribute"] for row in rows))
    exact = f"ε={min(config.epsilon):g}"
    about = ("Means over seeds, deletions and numbers of shards above 1. Change: difference from the plain vote. "
             "gap lower, gap higher: share of cases in which the paired 95 % bootstrap interval of the change of the "
             "gap lies below, above 0; chance alone gives 0.025 each.")  # fmt: skip
    shown = [row for row in average if row["method"] == "none" or row["method"].endswith(exact)]
    overview = figure(changes(config, shown))
    write_atomic(out.directory / "figure.svg", overview)
    sections = [("Summary", f"{about} {exact}; others in results.json.",
                 plots(overview) + table(shown, SUMMARY))]  # fmt: skip
    for family in families:
        for name in attributes:
            mine = [row for row in rows if row["family"] == family and row["attribute"] == name]
            drawn = plots(*(figure(panel(config, mine, share)) for share in config.deleted), figure(gaps(config, mine)))
            exactly = [row for row in mine if row["method"] == "none" or row["method"].endswith(exact)]
            told = [row for row in exactly if row["shards"] > 1 or row["method"].split()[0] in ("none", "majority")]
            body = drawn + table(told, FIELDS)
            sections.append((f"{family}, {name}", "Test accuracy against the equalized-odds gap, one point a number of "
                             f"shards, means and 95 % intervals over {config.seeds} seeds; {exact}. Other epsilons are "
                             "in results.json.", body))  # fmt: skip
    about = ("Bootstrap refits of count for nine members and two groups: one program, compiling included or not, "
             "against a loop of HiGHS, and the largest difference of their objectives.")  # fmt: skip
    sections.append((refitted[0]["name"], about, table(refitted, tuple(refitted[0]))))
    lead = ("Does splitting the training data into shards, or deleting part of it, make an ensemble unfair, and what "
            "do post-processing methods repair at which cost? eo max, the equalized-odds gap: the larger difference of "
            f"true or false positive rates between groups. {config.seeds} seeds, {document['device']}.")  # fmt: skip
    write_page(out.directory / "report.html", "Equalized odds of ensembles", lead, sections, document["config"],
               [sentence(shown, method) for method in config.methods])  # fmt: skip
    command.print_table(shown, SUMMARY, f"benchmarks.fairsisa · {out.directory}")


def sentence(rows: list[dict[str, Any]], method: str) -> str:
    """Say what a method did, over all models and attributes."""
    mine = [row for row in rows if row["method"].split()[0] == method]
    if not mine:
        return f"`{method}`: not measured."
    spans = {field: (min(row[field] for row in mine), max(row[field] for row in mine)) for field in SUMMARY[1:]}
    if method == "none":
        return "Without repair (`none`) the gap is {:.3f} to {:.3f}, the accuracy {:.1f} to {:.1f} %.".format(
            *spans["test_eo_max"], *spans["test_accuracy"])  # fmt: skip
    lower, higher = (sum(row[field] for row in mine) / len(mine) for field in ("gap_lower", "gap_higher"))
    return ("`{}` changes the gap by {:+.3f} to {:+.3f} and the accuracy by {:+.1f} to {:+.1f} points; the gap is "
            "lower by more than resampling explains in {:.0%} of cases, higher in {:.0%}.").format(
            method, *spans["test_eo_max_change"], *spans["test_accuracy_change"], lower, higher)  # fmt: skip


def changes(config: Config, rows):
    """Plot what every method changes against what it costs: a colour a method, a shape an attribute."""

    def draw(axes):
        methods = [method for method in config.methods if method != "none"]
        shapes = dict(zip(dict.fromkeys(row["attribute"] for row in rows), itertools.cycle("osD^v<>Ph*"), strict=False))
        for row in rows:
            if row["method"] == "none":
                continue
            colour = f"C{1 + methods.index(row['method'].split()[0])}"
            axes.plot(row["test_accuracy_change"], row["test_eo_max_change"], shapes[row["attribute"]], ms=5,
                      color=colour, mfc=colour if row["family"] == rows[0]["family"] else "none")  # fmt: skip
        for k, method in enumerate(methods):
            axes.plot([], [], "-", lw=3, color=f"C{1 + k}", label=method)
        for name, shape in shapes.items():
            axes.plot([], [], shape, color="0.4", ms=5, label=name)
        for family in dict.fromkeys(row["family"] for row in rows):
            filled = "0.4" if family == rows[0]["family"] else "none"
            axes.plot([], [], "o", color="0.4", ms=5, mfc=filled, label=family)
        axes.axhline(0, color="0.6", lw=0.8)
        axes.set(xlabel="change of test accuracy (points)", ylabel="change of the equalized-odds gap (max)")
        axes.legend()

    return draw


def refits(resamples: int = 1000) -> list[dict[str, Any]]:
    """Time bootstrap refits of `count` for nine members and two groups by dual.solve_many and by a loop of HiGHS.

    The votes are made up: 1,922 records, a rarer group that is named more often, members that err together.
    """
    rng, N, K = np.random.default_rng(0), 1922, 9
    group_N = (rng.random(N) < 0.26).astype(int)
    label_N = (rng.random(N) < np.where(group_N, 0.84, 0.51)).astype(int)
    score_N = 0.75 * (2 * label_N - 1) + 0.45 * group_N + np.sqrt(0.6) * rng.normal(size=N)
    count_N = np.sum(score_N[:, None] + np.sqrt(0.4) * rng.normal(size=(N, K)) > 0, axis=1)
    count_RAYT = resample_counts(np.asarray(cell_counts(count_N, label_N, group_N, K + 1, 2)), resamples)
    kept = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)  # the next run is to compile it too
    seconds = []
    for _ in range(4):  # the first compiles, the fastest of the others counts
        began = time.perf_counter()
        found = solve_many(count_RAYT)
        seconds.append(time.perf_counter() - began)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", kept)
    began = time.perf_counter()
    highs_RAT = np.stack([equalized_odds(count_AYT) for count_AYT in count_RAYT])
    highs = time.perf_counter() - began
    cost_RAT = np.stack([program(count_AYT, "error", 1.0, 1.0)[0] for count_AYT in count_RAYT])
    return [{
        "name": f"{resamples} refits", "seconds_with_compile": seconds[0], "seconds": min(seconds[1:]),
        "highs_seconds": highs, "times_faster": highs / min(seconds[1:]),
        "largest_difference": np.abs(found.value_x - np.sum(cost_RAT * highs_RAT, axis=(1, 2))).max(),
        "largest_certificate": np.abs(found.value_x - found.bound_x).max(),
    }]  # fmt: skip


def panel(config: Config, rows, share: float):
    """Plot accuracy against the gap for every method at the smallest epsilon."""
    exact = f" ε={min(config.epsilon):g}"

    def draw(axes):
        for colour, method in enumerate(config.methods):
            wanted = method + (exact if method != "none" else "")
            mine = [row for row in rows if row["method"] == wanted and row["deleted"] == share]
            axes.errorbar([row["test_eo_max"] for row in mine], [row["test_accuracy"] for row in mine],
                          xerr=[row.get("test_eo_max_ci95", 0) for row in mine], fmt="o-", lw=0.7, ms=3,
                          color=f"C{colour}", elinewidth=0.5, label=method)  # fmt: skip
            for row in mine:
                axes.annotate(str(row["shards"]), (row["test_eo_max"], row["test_accuracy"]), fontsize=7,
                              xytext=(2, 2), textcoords="offset points")  # fmt: skip
        axes.set(xlabel="equalized-odds gap (max) on the test set", ylabel="test accuracy (%)", xlim=(0, None),
                 title=f"{share:.0%} deleted")  # fmt: skip
        axes.legend()

    return draw


def gaps(config: Config, rows):
    """Plot the gap of the plain vote against shards, before and after deletion."""

    def draw(axes):
        for colour, share in enumerate(config.deleted):
            mine = [row for row in rows if row["method"] == "none" and row["deleted"] == share]
            axes.errorbar([row["shards"] for row in mine], [row["test_eo_max"] for row in mine],
                          [row.get("test_eo_max_ci95", 0) for row in mine], fmt="o-", color=f"C{colour}", capsize=3,
                          label=f"{share:.0%} deleted")  # fmt: skip
        axes.set(xlabel="shards", ylabel="gap (max) of the plain vote", xticks=config.shards, ylim=(0, None))
        axes.legend()

    return draw


if __name__ == "__main__":
    command.main(run, PRESETS)
