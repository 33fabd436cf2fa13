"""Measure and repair the equalized odds of an ensemble: `python -m eval.fairness --ensemble DIR --groups FIELD …`.

Post-processing is fitted on --fit and reported on --fit and --test. Records that were deleted from the ensemble are
left out of --fit: the predictor would remember them. After a deletion, run it again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from jaxforget import checks, command
from jaxforget.data.sampling import id_keys
from jaxforget.data.sources import Record
from jaxforget.data.text import read
from jaxforget.errors import UserError
from jaxforget.fairness.groups import groups_of
from jaxforget.fairness.predictor import METHODS, save
from jaxforget.fairness.study import Votes, compare
from jaxforget.metrics.classification import class_logp
from jaxforget.report.page import cell, figure, plots, table, write_page
from jaxforget.report.run import Run
from jaxforget.sisa.ensemble import Ensemble


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Measure and repair the equalized odds of an ensemble of two-class classifiers."""

    ensemble: Path | None = None
    """Directory that train.sisa made."""
    fit: str | None = None
    """Labelled set that post-processing is fitted on; none of it may be training text."""
    test: str | None = None
    """Labelled set that counts."""
    groups: str | None = None
    """Column with the group of a record, or COLUMN=value,value for a column with a list: named or not named."""
    positive: str | None = None
    """The class that counts as 1; the last one when not given."""
    methods: Annotated[tuple[str, ...], tyro.conf.arg(metavar="{none,each,majority,count,vector}...")] = tuple(METHODS)
    """Post-processing methods; none is the plain majority vote."""
    epsilon: tuple[float, ...] = (0.0, 0.02, 0.05)
    """Gaps that are allowed on the fit set."""
    objective: Literal["error", "aif360", "pleiss"] = "error"
    """What is minimised under equalized odds: the error rate, or the objective of a package of that name."""
    smoothing: float = 0.0
    """Pull the cells of the method vector towards those of the method count: 0 not at all, 1 entirely."""
    pool: bool = False
    """Pool a group that lacks a class in the fit set with the others, instead of refusing it."""
    resamples: int = 1000
    """Bootstrap resamples of the test set."""
    seed: int = 0
    """Seed of the resamples and of random decisions."""
    out: Path | None = None
    """Directory for everything the run leaves; runs/<command>-<time> when not given. Must be empty."""


def default() -> Config:
    """all methods, exact and within two gaps"""
    return Config()


PRESETS = {"default": default}
FIELDS = (
    "name", "fit_accuracy", "fit_eo_max", "test_accuracy", "test_accuracy_noise", "test_eo_max", "test_eo_max_low",
    "test_eo_max_high", "test_eo_max_change", "test_eo_max_change_low", "test_eo_max_change_high", "test_eo_avg",
    "test_demographic_parity", "test_sampled_eo_max",
)  # fmt: skip
TERMINAL = (*FIELDS[:6], *FIELDS[8:11])


def run(config: Config) -> None:
    """Vote, fit, compare."""
    home, spec = checks.given("--ensemble", config.ensemble), checks.given("--groups", config.groups)
    sources = {"fit": checks.given("--fit", config.fit), "test": checks.given("--test", config.test)}
    unknown = [name for name in config.methods if name not in METHODS]
    if unknown:
        raise UserError(f"unknown method {', '.join(unknown)}; valid names are {', '.join(METHODS)}")
    for epsilon in config.epsilon:
        checks.between(0, 1, named="--", epsilon=epsilon)
    command.at_least(1, resamples=config.resamples)
    out = Run("eval.fairness", config, config.out, False)
    with Ensemble(home) as ensemble:
        recipe = ensemble.recipe
        if recipe.task != "classification" or len(recipe.labels) != 2:
            raise UserError(f"{config.ensemble} is no ensemble of two-class classifiers: its task is {recipe.task}"
                            + (f" with the classes {', '.join(recipe.labels)}" if recipe.labels else ""))  # fmt: skip
        positive = config.positive or recipe.labels[1]
        if positive not in recipe.labels:
            raise UserError(f"--positive is {positive!r}; the classes are {', '.join(recipe.labels)}")
        missing = len(ensemble.missing(ensemble.needed()))
        if missing:
            raise UserError(f"{config.ensemble}: {missing} stages are not trained; finish with train.forget --resume")
        records = {name: read(source, recipe.text) for name, source in sources.items()}
        deleted = ensemble.ledger.deleted_by(record.id for record in records["fit"])
        kept = [record for record in records["fit"] if record.id not in deleted]
        left_out = len(records["fit"]) - len(kept)
        records["fit"] = kept
        if not kept:
            raise UserError(f"{config.fit}: every record has been deleted from the ensemble")
        if left_out:
            command.say(f"{config.fit}: {left_out} records have been deleted from the ensemble and are left out")
        ids = [record.id for some in records.values() for record in some]
        if trained := len(ensemble.ledger.where(ids)):
            command.say(f"{trained} records of --fit and --test are training text; what is fitted on them flatters")
        groups = {}
        groups["fit"], names = groups_of(records["fit"], spec, where=sources["fit"])
        groups["test"], _ = groups_of(records["test"], spec, names, where=sources["test"])
        out.begin()
        votes = {name: vote(ensemble, records[name], groups[name], positive, name) for name in ("fit", "test")}
        state = hashlib.sha256(json.dumps(ensemble.final_keys()).encode()).hexdigest()
    members = votes["fit"].votes_NK.shape[1]
    if members % 2 == 0:
        command.say(f"{members} members can tie; a tie counts as {_other(recipe.labels, positive)!r}")
    found = compare(votes["fit"], votes["test"], names, methods=config.methods, epsilons=config.epsilon,
                    resamples=config.resamples, seed=config.seed, objective=config.objective,
                    smoothing=config.smoothing, pool=config.pool)  # fmt: skip
    rows = []
    for row, predictor in found:
        file = row["name"].replace(" ε=", "-") + ".json"
        (out.directory / "predictors").mkdir(exist_ok=True)
        save(predictor, out.directory / "predictors" / file)
        rows.append({**row, "predictor": f"predictors/{file}"})
    fitted_on = hashlib.sha256("\n".join(sorted(record.id for record in kept)).encode()).hexdigest()
    about = {"members": members, "groups": list(names), "positive": positive, "left_out": left_out,
             "ensemble_state": state, "fitted_on_sha256": fitted_on}  # fmt: skip
    document = out.finish(rows, **about)

    def draw(axes):
        for colour, method in enumerate(config.methods):
            mine = [row for row in rows if row["name"].split()[0] == method]
            x = [row["test_eo_max"] for row in mine]
            spans = np.asarray([[row["test_eo_max"] - row["test_eo_max_low"],
                                 row["test_eo_max_high"] - row["test_eo_max"]] for row in mine]).T  # fmt: skip
            axes.errorbar(x, [row["test_accuracy"] for row in mine], xerr=np.maximum(spans, 0),
                          yerr=[row["test_accuracy_noise"] for row in mine], fmt="o-", color=f"C{colour}", lw=1.2,
                          elinewidth=0.6, ms=4, capsize=2, label=method)  # fmt: skip
        axes.set(xlabel="equalized-odds gap (max), test", ylabel="accuracy (%), test", xlim=(0, None))
        axes.legend()

    def rates(axes):
        plain = next((row for row in rows if row["name"] == "none"), rows[0])
        for kind, marker in (("fpr", "o"), ("tpr", "s")):
            for row, shade in ((plain, "C0"), (rows[-1], "C3")):
                axes.plot(range(len(names)), row[f"test_{kind}_by_group"], marker + "-", color=shade,
                          label=f"{kind.upper()}, {row['name']}")  # fmt: skip
        axes.set(xticks=range(len(names)), xticklabels=names, xlabel="group", ylabel="rate on the test set",
                 ylim=(-0.02, 1.02))  # fmt: skip
        axes.legend()

    least = min(rows, key=lambda row: row["test_eo_max"])
    lower = [row["name"] for row in rows if row["test_eo_max_change_high"] < 0]
    said = [f"{what}: `{row['name']}`, with a gap of {cell(row['test_eo_max'])} [{cell(row['test_eo_max_low'])}, "
            f"{cell(row['test_eo_max_high'])}] on the test set and {cell(row['test_accuracy'])} % accuracy."
            for what, row in (("First method", rows[0]), ("Smallest gap", least))]
    said.append("Lower than the plain vote's by more than resampling explains: "
                f"{', '.join(f'`{name}`' for name in lower) or 'none'}.")  # fmt: skip
    write_page(
        out.directory / "report.html", "Equalized odds of an ensemble",
        "Does the vote err as often for one group as for the other, and what does equalizing it cost? "
        f"{members} members; groups {', '.join(names)}; {len(kept):,} records to fit, {len(records['test']):,} to "
        f"test, {left_out} left out because they were deleted. {document['device']}.",
        [("Methods", "eo max, the equalized-odds gap: the larger difference of true or false positive rates between "
          "groups. On the fit set it flatters; the test columns count. In brackets the 95 % bootstrap "
          "interval over test records. Change is the difference from the plain vote (`none`); its interval is paired, "
          "and a change counts where it excludes 0.",
          table(rows, [field for field in FIELDS if field != "test_accuracy_noise"])),  # it is half of the brackets
         ("Accuracy against the gap", "Up and left is good. Points of a method are its epsilons, the gaps allowed on "
          "the fit set; bars are 95 % intervals over test records. Then false and true positive rates (FPR, TPR) of "
          "the groups under the plain vote and the last method, without intervals.",
          plots(figure(draw), figure(rates)))],
        document["config"], said,
    )  # fmt: skip
    command.print_table(rows, TERMINAL, f"eval.fairness · {out.directory}")


def _other(labels: tuple[str, ...], positive: str) -> str:
    return next(label for label in labels if label != positive)


def vote(ensemble: Ensemble, records: list[Record], group_N, positive: str, where: str) -> Votes:
    """Let every member label the records."""
    examples = ensemble.encode(records, where=where, tell=command.say)
    column = ensemble.recipe.labels.index(positive)
    votes = [
        class_logp(ensemble.model, ensemble.params(shard), examples).argmax(axis=1) == column
        for shard in sorted(ensemble.final_keys())
    ]
    label_N = (examples.columns["label"] == column).astype(np.int32)
    return Votes(np.stack(votes, axis=1).astype(np.int32), label_N, group_N, id_keys([r.id for r in records]))


if __name__ == "__main__":
    command.main(run, PRESETS)
