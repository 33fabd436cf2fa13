"""Compare influence scores with the truth: `python -m eval.influence --scores OUT_OF_TRAIN_UNTRAC --truth retrain`.

`train.untrac` makes scores, this command judges them. `--truth retrain` trains without each dataset in turn, with the
data, model size and training settings that the run of the scores states, and leaves OUT/truth.npz; `--truth FILE` (or
the --out of an earlier evaluation) reads one. Scoring and judging are two commands because the truth costs a training
a dataset and seed, is made once, and serves every later set of scores.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from jaxforget import command
from jaxforget.errors import UserError
from jaxforget.influence.comparison import ceilings, compare
from jaxforget.influence.scores import Scores, found, heat_map, load, scatter
from jaxforget.influence.study import Study, StudyConfig, read_study, settings_of
from jaxforget.influence.truth import Truth, TruthConfig, load_truth, retrain
from jaxforget.report.page import cell, figure, plots, table, write_page
from jaxforget.report.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Compare influence scores with the truth."""

    out: Path | None = None
    """Directory for everything the run leaves; runs/<command>-<time> when not given. Must be empty."""
    resume: bool = False
    """Continue the run in --out; settings must be the same."""
    scores: tuple[str, ...] = ()
    """Directories of train.untrac, or single files of their scores."""
    truth: str = ""
    """A truth.npz, the --out of an earlier evaluation, or retrain: make it, as the first of --scores was trained."""
    top: int = 3
    """Datasets that recall is counted among: the most helpful ones for a query."""
    retrain: TruthConfig = TruthConfig()


def default() -> Config:
    """compare; three seeds of retraining where asked for"""
    return Config()


def smoke() -> Config:
    """one seed and two random subsets, where retraining is asked for"""
    return Config(retrain=TruthConfig(seeds=1, subsets=2))


PRESETS = {"default": default, "smoke": smoke}
FIELDS = ("name", "pearson", "pearson_low", "pearson_high", "spearman", "lds", "sign", "sign_centred", "top_recall",
          "seconds", "cost_vs_truth")  # fmt: skip


def run(config: Config) -> None:
    """Read scores, read or make the truth, compare."""
    command.at_least(1, top=config.top)
    if not config.scores:
        raise UserError("--scores is missing; give directories of train.untrac, or files of their scores")
    if not config.truth:
        raise UserError("--truth is missing; give a truth.npz, the --out of an earlier evaluation, or retrain")
    out = Run("eval.influence", config, config.out, config.resume)
    everyone = [load(file) for source in config.scores for file in found(source)]
    if config.truth == "retrain":
        settings, study = study_of(config)
        out.begin()
        truth = made(config, out, settings, study)
    else:
        path = Path(config.truth)
        truth = load_truth(path / "truth.npz" if path.is_dir() else path)
        everyone = [matched(scores, truth) for scores in everyone]
        out.begin()
    report(config, out, [matched(scores, truth) for scores in everyone], truth)


def study_of(config: Config) -> tuple[StudyConfig, Study]:
    """Read the sets and the model that the first scores are of."""
    place = Path(config.scores[0])
    directory = place if place.is_dir() else place.parent.parent
    settings = settings_of(directory)
    if settings.model:
        raise UserError(
            f"{config.scores[0]} is of --model {settings.model}, whose training is not known; make scores of a model "
            "that train.untrac trains (with --base, or from scratch), or give --truth FILE"
        )
    return settings, read_study(settings, command.say)


def made(config: Config, out: Run, settings: StudyConfig, study: Study) -> Truth:
    """Retrain unless that was finished before."""
    file = out.directory / "truth.npz"
    if not file.exists():
        with command.progress("retraining") as show:
            retrain(
                study.objective, study.start.params, study.train, study.queries, config.retrain, settings.training,
                out.directory / "truth", seed=settings.seed, show=show,
                log=lambda step, metrics: out.log("retrain", step, metrics),
                resumed=lambda step: out.rewind("retrain", step),
            ).save(file)  # fmt: skip
    return load_truth(file)


def matched(scores: Scores, truth: Truth) -> Scores:
    """Put scores in the truth's order of datasets and queries. Raises UserError for names that differ."""
    for kind in ("datasets", "queries"):
        mine, theirs = getattr(scores, kind), getattr(truth, kind)
        if set(mine) != set(theirs):
            raise UserError(f"{scores.method} scores the {kind} {', '.join(mine)}; the truth is of {', '.join(theirs)}")
    order = [scores.datasets.index(name) for name in truth.datasets], [scores.queries.index(n) for n in truth.queries]
    answer = dataclasses.replace(scores.answer, scores_KQ=scores.answer.scores_KQ[np.ix_(*order)])
    return scores._replace(answer=answer, datasets=truth.datasets, queries=truth.queries)


def report(config: Config, out: Run, everyone: list[Scores], truth: Truth) -> None:
    """Write results.json and the page, print the table."""
    limits = ceilings(truth)
    rows = [compare(scores, truth, config.top) for scores in everyone] + limits
    document = out.finish(rows, truth=truth.about, datasets=truth.datasets, queries=truth.queries)
    truth_KQ = truth.influence_OKQ.mean(axis=0)
    size = {"width": max(3.0, 1.6 + 0.5 * len(truth.queries)), "height": max(2.6, 1.2 + 0.22 * len(truth.datasets))}
    maps = [figure(heat_map(truth_KQ, truth.datasets, truth.queries, "truth"), **size)]
    maps += [figure(heat_map(s.answer.scores_KQ, s.datasets, s.queries, s.method), **size) for s in everyone]
    dots = [figure(scatter(s.answer.scores_KQ, truth_KQ, truth.queries, s.method), width=3.4, height=3.0)
            for s in everyone]  # fmt: skip
    K, seeds = len(truth.datasets), len(truth.influence_OKQ)
    sections = [
        ("Agreement", "Means over queries of correlations over datasets; in brackets: 95 % bootstrap over datasets. "
         "lds: Spearman over random subsets of datasets. sign: percent of equal signs, raw and with queries centred. "
         "The noise ceiling bounds the expected Pearson correlation of a perfect method with this truth; it is reached "
         "where queries are equally noisy.",
         table(rows, FIELDS, lambda row: row in limits)),
        ("Scores against the truth", "One dot a dataset, one colour a query, each standardised; on the line the score "
         "is the truth.", plots(*dots)),
        ("Influence", "Every column is divided by its largest absolute value. Red: the dataset helps the query; blue: "
         "it harms.", plots(*maps)),
    ]  # fmt: skip
    lead = ("Do cheap scores tell what retraining without a dataset would do? "
            f"{K} datasets, {len(truth.queries)} queries, {seeds} seed{'s' * (seeds > 1)} of retraining "
            f"({truth.about.get('protocol', 'protocol not stated')}). ")  # fmt: skip
    if K < 32:
        lead += f"With {K} datasets intervals are wide: r = 0.5 of one query is told from 0 with 16 or more. "
    found = [f"`{row['name']}`: Pearson correlation with the truth {cell(row['pearson'])} "
             f"[{cell(row['pearson_low'])}, {cell(row['pearson_high'])}], Spearman {cell(row['spearman'])}."
             for row in rows if row not in limits]  # fmt: skip
    found.append(f"A perfect method is expected to reach {cell(limits[0]['pearson'])} at most (the noise ceiling)."
                 if limits[0]["pearson"] is not None and np.isfinite(limits[0]["pearson"])
                 else "With one seed of retraining there is no noise ceiling.")  # fmt: skip
    write_page(out.directory / "report.html", "Influence against retraining", lead, sections, document["config"], found)
    command.print_table(rows, FIELDS, f"eval.influence · {out.directory}")


if __name__ == "__main__":
    command.main(run, PRESETS)
