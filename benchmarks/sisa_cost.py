"""What SISA costs and what it saves: visits of examples, seconds and accuracy, against shards, slices and requests.

    python -m benchmarks.sisa_cost --task classification --data TRAIN --evaluate TEST --label-field FIELD

`cost` compares the formulas of jaxforget/sisa/cost.py with counts on real plans of the data. `accuracy` trains an
ensemble for every number of shards and slices, serves a request for one record and one for a share of all, and checks
the result against training from scratch, bit for bit. `speed` compares one program for all shards with one a shard.
Source of algorithm and setting: SISA (arXiv 1912.03817) on the data of FairSISA (arXiv 2312.07420).
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from jaxforget import checks, command
from jaxforget.data.sampling import id_keys, order
from jaxforget.data.text import TextConfig, read
from jaxforget.errors import UserError
from jaxforget.files import write_atomic
from jaxforget.report.page import cell as number
from jaxforget.report.page import figure, plots, table, write_page
from jaxforget.report.run import Run
from jaxforget.report.statistics import over_seeds
from jaxforget.sisa.aggregation import AGGREGATIONS
from jaxforget.sisa.cost import batched_with_slices, one_request, sequential, simulate, training_visits
from jaxforget.sisa.deletion import ask, serve, verify
from jaxforget.sisa.ensemble import Ensemble
from jaxforget.sisa.plan import epoch_schedule, uniform
from jaxforget.sisa.scoring import score
from jaxforget.sisa.store import Scratch
from jaxforget.training.optimizer import TrainConfig
from jaxforget.training.start import SizeConfig
from train import sisa

Part = Literal["cost", "accuracy", "speed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Measure what SISA costs and what it saves."""

    out: Path | None = None
    """Directory for everything the run leaves. Must be empty."""
    resume: bool = False
    """Continue the run in --out; settings must be the same."""
    parts: tuple[Part, ...] = ("cost", "accuracy", "speed")
    """What to measure."""
    data: tuple[str, ...] = ()
    """Training text, as for train.sisa."""
    evaluate: str | None = None
    """Test set."""
    task: Literal["causal", "classification", "masked", "seq2seq"] = "classification"
    """What to learn."""
    model: str | None = None
    """Hugging Face directory or hub name to start from. Default: from scratch, see --size.*"""
    tokenizer_data: tuple[str, ...] = ()
    """Text to build a tokenizer from."""
    shards: tuple[int, ...] = (1, 3, 5, 7, 9)
    """Numbers of shards."""
    slices: tuple[int, ...] = (1, 3)
    """Numbers of slices."""
    seeds: int = 3
    """Seeds of plan, initialisation and requests."""
    share: float = 0.01
    """Share of the records in the larger request."""
    speed_shards: int = 8
    """Shards of the part `speed`, of one slice."""
    repeats: int = 3
    """Repeats of every timing in the part `speed`; the fastest counts."""
    text: Annotated[TextConfig, tyro.conf.arg(name="")] = TextConfig()
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig(epochs=3, batch_size=32, learning_rate=1e-3)
    size: SizeConfig = SizeConfig(width=64, layers=2, context=64, vocab_size=2048)


def default() -> Config:
    """5 x 2 ensembles, 3 seeds; about an hour on two CPU cores with 15,000 short texts"""
    return Config()


PRESETS = {"default": default}


def run(config: Config) -> None:
    """Measure the parts one after the other."""
    if not config.data or not config.evaluate:
        raise UserError("--data and --evaluate are needed: a training and a test set")
    if not 0 < config.share < 1:
        raise UserError(f"--share is {config.share}; it must be between 0 and 1")
    command.at_least(1, seeds=config.seeds, repeats=config.repeats, speed_shards=config.speed_shards)
    out = Run("benchmarks.sisa_cost", config, config.out, config.resume)
    ids = [record.id for source in config.data for record in read(source, ensemble_config(config, 1, 1, 0).text)]
    for shards in config.shards:
        for slices in config.slices:
            uniform(ids, shards, slices, 0)
            epoch_schedule(config.train.epochs, slices)
    out.begin()
    rows: list[dict] = []
    sections: list[tuple[str, str, str]] = []
    for part in config.parts:
        more, section = {"cost": cost, "accuracy": accuracy, "speed": speed}[part](config, out, ids)
        rows, sections = [*rows, *more], [*sections, section]
    document = out.finish(rows)
    lead = ("What does an ensemble of shards and slices cost in accuracy, and what does it save when records are "
            f"deleted? {len(ids):,} records, {document['device']}.")  # fmt: skip
    write_page(out.directory / "report.html", "What SISA costs and what it saves", lead, sections, document["config"],
               told(rows))  # fmt: skip


def told(rows: list[dict]) -> list[str]:
    """Say what came out, in sentences."""
    found = []
    if visits := [row for row in rows if row["part"] == "cost" and row["requests"] == 1 and "together" in row["name"]]:
        least = min(visits, key=lambda row: row["share"])
        found.append(f"Deleting one record costs {least['share']:.1%} of the visits of retraining everything at best, "
                     f"with S={least['shards']} shards of R={least['slices']} slices.")  # fmt: skip
    for row in (row for row in rows if row["part"] == "accuracy"):
        accuracy = number(row["mean_probability_accuracy"], row.get("mean_probability_accuracy_ci95"))
        found.append(f"S={row['shards']} shards, R={row['slices']} slices: {accuracy} % accuracy as an ensemble; one "
                     f"deletion took {row['one_seconds_share']:.1%} of the time of retraining.")
    for row in (row for row in rows if row["part"] == "speed"):
        found.append(f"{row['name'].removeprefix('speed: ').capitalize()}: {number(row['seconds'])} s.")
    return found


def ensemble_config(config: Config, shards: int, slices: int, seed: int, out: Path | None = None) -> sisa.Config:
    """Return the settings of one ensemble."""
    text = config.text
    if config.task == "classification" and text.label_field is None:
        text = dataclasses.replace(text, label_field="label")
    return sisa.Config(
        out=out, data=config.data, task=config.task, model=config.model, tokenizer_data=config.tokenizer_data,
        shards=shards, slices=slices, seed=seed, text=text, train=config.train, size=config.size, export=False,
    )  # fmt: skip


def opened(config: Config, directory: Path, shards: int, slices: int, seed: int) -> Ensemble:
    """Plan an ensemble, or open the one that an earlier run planned."""
    settings = ensemble_config(config, shards, slices, seed, directory)
    if not (directory / sisa.NAME).exists():
        shutil.rmtree(directory, ignore_errors=True)
        sisa.plan(settings, Run("train.sisa", settings, directory, False))
    return Ensemble(directory)


# ------------------------------------------------------------------------------------------------------------- cost


def cost(config: Config, out: Run, ids: list[str]) -> tuple[list[dict], tuple[str, str, str]]:
    """Compare expected visits with those counted on plans of the data, as shares of retraining everything."""
    N, epochs, rows = len(ids), config.train.epochs, []
    requests = sorted({1, 4, 16, 64, max(1, round(config.share * N)), max(1, round(10 * config.share * N))})
    for shards in config.shards:
        for slices in config.slices:
            plan, schedule = uniform(ids, shards, slices, 0), epoch_schedule(epochs, slices)
            count_SR = np.zeros((shards, slices), np.int64)
            np.add.at(count_SR, plan, 1)
            full = training_visits(count_SR, schedule)
            for K in requests:
                counted = simulate(*plan, schedule, K, 50, seed=0) / full
                row = {
                    "name": f"S={shards} R={slices} K={K} together", "part": "cost", "shards": shards,
                    "slices": slices, "requests": K, "records": N, "full_visits": full, "share": counted.mean(),
                    "share_ci95": 1.96 * counted.std(ddof=1) / math.sqrt(len(counted)),
                    "expected_share": batched_with_slices(N, shards, slices, epochs, K) / (N * epochs),
                }  # fmt: skip
                if K == 1:
                    row["expected_share_one"] = one_request(N / shards, slices, epochs) / (N * epochs)
                rows.append(row)
                if K <= 64 and slices == 1:
                    counted = simulate(*plan, schedule, K, 20, seed=0, batch=1) / full
                    rows.append(row | {
                        "name": f"S={shards} R={slices} K={K} one by one", "share": counted.mean(),
                        "share_ci95": 1.96 * counted.std(ddof=1) / math.sqrt(len(counted)),
                        "expected_share": sequential(N, shards, K) / N,
                    })  # fmt: skip

    def curves(slices):
        def draw(axes):
            for colour, shards in enumerate(config.shards):
                mine = [r for r in rows if r["shards"] == shards and r["slices"] == slices and "together" in r["name"]]
                x = [r["requests"] for r in mine]
                axes.plot(x, [r["expected_share"] for r in mine], color=f"C{colour}", lw=1, label=f"S={shards}")
                axes.errorbar(x, [r["share"] for r in mine], [r["share_ci95"] for r in mine], fmt="o", capsize=2,
                              color=f"C{colour}", ms=4)  # fmt: skip
            axes.set(xscale="log", xlabel="requests served together", title=f"R={slices}",
                     ylabel="visits / retraining everything", ylim=(0, None))  # fmt: skip
            axes.legend()

        return figure(draw)

    drawn = plots(*(curves(slices) for slices in config.slices))
    fields = ("name", "share", "expected_share", "expected_share_one", "full_visits")
    note = ("S shards of R slices, K requests. Lines: formulas. Dots: mean of 50 draws on the plan of the data with "
            "its 95 % interval, where deleted records are no longer visited and epochs are whole.")  # fmt: skip
    return rows, ("Visits of examples", note, drawn + table(rows, fields))


# --------------------------------------------------------------------------------------------------------- accuracy


ACCURACY_FIELDS = (
    "name", "members_accuracy", "majority_accuracy", "mean_probability_accuracy", "mean_logits_accuracy",
    "after_mean_probability_accuracy", "one_visits_share", "one_expected_share", "one_seconds_share",
    "many_visits_share", "many_expected_share", "many_seconds_share", "full_seconds", "stages_equal", "stages",
)  # fmt: skip


def accuracy(config: Config, out: Run, ids: list[str]) -> tuple[list[dict], tuple[str, str, str]]:
    """Train, delete and check an ensemble for every number of shards and slices."""
    rows = []
    for slices in config.slices:
        for shards in config.shards:
            cells = [cell(config, out, shards, slices, seed, ids) for seed in range(config.seeds)]
            served = {name: value for name, value in cells[0].items() if name not in cells[-1]}
            shared = [[{n: v for n, v in each.items() if n not in served}] for each in cells]
            rows += [row | served for row in over_seeds(shared)]
            command.print_table(rows, ACCURACY_FIELDS[:6], "accuracy")

    def against_shards(axes):
        for colour, slices in enumerate(config.slices):
            mine = [row for row in rows if row["slices"] == slices]
            for style, field in (("o-", "mean_probability"), ("s:", "members")):
                axes.errorbar([row["shards"] for row in mine], [row[f"{field}_accuracy"] for row in mine],
                              [row.get(f"{field}_accuracy_ci95", 0) for row in mine], fmt=style, color=f"C{colour}",
                              capsize=3, label=f"{field.replace('_', ' ')}, {slices} slices")  # fmt: skip
        axes.set(xlabel="shards", ylabel="test accuracy (%)", xticks=config.shards)
        axes.legend()

    def seconds(axes):
        for colour, slices in enumerate(config.slices):
            mine = [row for row in rows if row["slices"] == slices]
            x = [row["shards"] for row in mine]
            for style, what in (("o", "one"), ("s", "many")):
                label = f"{'one record' if what == 'one' else f'{config.share:.0%}'}, {slices} slices"
                axes.plot(x, [row[f"{what}_seconds_share"] for row in mine], style + "-", color=f"C{colour}", ms=4,
                          label=label)  # fmt: skip
                axes.plot(x, [row[f"{what}_visits_share"] for row in mine], ":", color=f"C{colour}")
        axes.set(xlabel="shards", ylabel="share of retraining", xticks=config.shards, ylim=(0, None))
        axes.legend()

    note = (f"Accuracies are means over {config.seeds} seeds on the test set; deletions are of the first. `one` is a "
            "request for one record, `many` for "
            f"{config.share:.0%} of all, after it; shares are of training everything on what is left, measured warm. "
            "In the right plot solid lines with markers are seconds, dotted ones visits of examples.")  # fmt: skip
    drawn = plots(figure(against_shards), figure(seconds))
    command.print_table(rows, ACCURACY_FIELDS, f"benchmarks.sisa_cost · {out.directory}")
    return rows, ("Accuracy and deletions", note, drawn + table(rows, ACCURACY_FIELDS))


def cell(config: Config, out: Run, shards: int, slices: int, seed: int, ids: list[str]) -> dict[str, Any]:
    """Measure one ensemble, the first seed's deletions too; a finished one is read back."""
    name = f"shards-{shards}-slices-{slices}-seed-{seed}"
    done = out.directory / "cells" / f"{name}.json"
    if done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    command.say(f"{name}")
    directory = out.directory / "ensembles" / name
    shutil.rmtree(directory, ignore_errors=True)  # timings of a half-finished one would be of two processes
    with opened(config, directory, shards, slices, seed) as ensemble:
        began = time.perf_counter()
        serve(ensemble)
        row: dict[str, Any] = {"name": f"S={shards} R={slices}", "part": "accuracy", "shards": shards,
                               "slices": slices, "train_seconds": time.perf_counter() - began}  # fmt: skip
        examples = ensemble.encode(read(checks.given("--evaluate", config.evaluate), ensemble.recipe.text))
        row |= qualities(score(ensemble, "test", examples))
        if seed == 0:
            row |= deletions(config, ensemble, ids, examples)
    shutil.rmtree(directory)
    done.parent.mkdir(exist_ok=True)
    write_atomic(done, json.dumps(row) + "\n")
    return row


def deletions(config: Config, ensemble: Ensemble, ids: list[str], examples) -> dict[str, Any]:
    """Serve a request for one record and a larger one, then check everything against training from scratch."""
    N, recipe = len(ids), ensemble.recipe
    row: dict[str, Any] = {}
    drawn = [ids[n] for n in order(id_keys(ids), 0, -2)]
    many = max(1, round(config.share * N))
    for what, wanted in (("one", drawn[:1]), ("many", drawn[1 : 1 + many])):
        began = time.perf_counter()
        ensemble.ledger.receive(ask(ensemble, wanted).new)
        (receipt,) = serve(ensemble)
        visits, full = receipt["examples_revisited"], receipt["examples_of_full_retraining"]
        expected = batched_with_slices(N, recipe.shards, recipe.slices, recipe.train.epochs, len(wanted))
        row |= {
            f"{what}_seconds": time.perf_counter() - began, f"{what}_visits": visits,
            f"{what}_visits_share": visits / full, f"{what}_expected_share": expected / (N * recipe.train.epochs),
        }  # fmt: skip
    row |= {f"after_{name}": value for name, value in qualities(score(ensemble, "test", examples)).items()}
    began = time.perf_counter()
    checks = verify(ensemble)
    row |= {"full_seconds": time.perf_counter() - began, "full_visits": full, "stages": len(checks),
            "stages_equal": sum(check.same for check in checks)}  # fmt: skip
    return row | {f"{what}_seconds_share": row[f"{what}_seconds"] / row["full_seconds"] for what in ("one", "many")}


def qualities(rows: list[dict]) -> dict[str, float | None]:
    """Flatten the rows of `score`: the members' mean, and every aggregation."""
    by_name = {row["name"].partition(":")[0]: row for row in rows}
    named = {"members": "mean of members", **{rule: f"ensemble, {rule}" for rule in AGGREGATIONS}}
    return {
        f"{short}_{field}": by_name[long][field]
        for short, long in named.items()
        for field in ("nll", "accuracy", "macro_f1", "perplexity")
        if field in by_name[long]
    }


# ------------------------------------------------------------------------------------------------------------ speed


def speed(config: Config, out: Run, ids: list[str]) -> tuple[list[dict], tuple[str, str, str]]:
    """Time training all shards: in one program, mapped or vmapped, and in one program a shard; and one shard alone."""
    shards = config.speed_shards
    ways: dict[str, dict[str, Any]] = {
        "one program, map": {"members": "map", "width": shards},
        "one program, vmap": {"members": "vmap", "width": shards},
        "one program a shard": {"members": "map", "width": 1},
    }
    with opened(config, out.directory / "ensembles" / "speed", shards, 1, 0) as ensemble:
        recipe = ensemble.recipe
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(config.repeats + 1):  # the first compiles
            for way, settings in ways.items():
                ensemble.recipe = dataclasses.replace(recipe, **settings)
                began = time.perf_counter()
                ensemble.train(scratch=Scratch())
                seconds[way].append(time.perf_counter() - began)
        ensemble.recipe = recipe
        serve(ensemble)
        alone = []
        for identity in [ids[n] for n in order(id_keys(ids), 0, -3)][: config.repeats + 1]:
            began = time.perf_counter()
            ensemble.ledger.receive(ask(ensemble, [identity]).new)
            serve(ensemble)
            alone.append(time.perf_counter() - began)
        visits = training_visits(ensemble.ledger.counts(shards, 1), recipe.epochs)
    best = {way: min(times[1:]) for way, times in seconds.items()} | {"one shard, as a request": min(alone[1:])}
    separate = best["one program a shard"]
    rows = [
        {"name": f"speed: {way}", "part": "speed", "shards": shards, "seconds": took,
         "times_faster_than_one_by_one": separate / took,
         "examples_per_second": visits / (shards if "request" in way else 1) / took}
        for way, took in best.items()
    ]  # fmt: skip
    fields = ("name", "shards", "seconds", "times_faster_than_one_by_one", "examples_per_second")
    command.print_table(rows, fields, "speed")
    note = (f"The fastest of {config.repeats} repeats after compilation; tokenisation of the records is part of every "
            "time, the request's includes planning, saving and erasing.")  # fmt: skip
    return rows, ("Speed", note, table(rows, fields))


if __name__ == "__main__":
    command.main(run, PRESETS)
