"""Run a benchmark on one or two models: every number to report, with the units it is a statistic of.

Two models, the one in question and its baseline, are measured on the same items: those both can score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxforget.data.stereotypes import Pair, Prompt, Triple
from jaxforget.data.tokens import Examples
from jaxforget.errors import UserError
from jaxforget.metrics.bias.generation import Scorer, continuations
from jaxforget.metrics.bias.measures import (
    IDEAL,
    STEREOSET,
    decided_share,
    estimate,
    preference,
    ratio,
    share,
    term_counts,
    term_scores,
)
from jaxforget.metrics.bias.scoring import Scores, causal_scores, masked_scores, start_id
from jaxforget.metrics.language import token_scores

# How a head scores the sentences of a pair. mean and sum: of log p over tokens, the first is StereoSet's score.
PAIR_MEASURES = {"causal": ("mean", "sum"), "masked": ("masked_nangia", "masked_changed")}
INTERSENTENCE = "intersentence, next given context"  # no published figures: those use a trained next-sentence head


class Subject(NamedTuple):
    """A model to measure. always_start: let the start token stand before whole sentences, see `causal_scores`."""

    name: str
    model: Any
    params: Any
    tokenizer: Any
    always_start: bool = False


class Measure(NamedTuple):
    """A number to report: `statistic` of the means of groups of units, which `samples` holds for every model."""

    benchmark: str
    part: str | None  # of the items; None for all
    measure: str
    statistic: Callable
    samples: list[list[np.ndarray]]
    about: dict[str, Any]

    def row(self, resamples: int, seed: int) -> dict[str, Any]:
        """Compute the number and its interval, beside those of the baseline where there is one."""
        numbers = estimate(self.statistic, *self.samples, resamples=resamples, seed=seed)
        row = {"name": " ".join(filter(None, (self.benchmark, self.part, self.measure))), "benchmark": self.benchmark,
               "part": self.part, "measure": self.measure, **self.about, **numbers}  # fmt: skip
        return row if np.isfinite(list(numbers.values())).all() else row | {"note": "no number in some resamples"}


def stereoset(subjects: Sequence[Subject], triples: Sequence[Triple]) -> list[Measure]:
    """Measure SS, LMS and ICAT: by kind, by kind and domain, and of both kinds with their items pooled by term."""
    sentences = [(triple.context if triple.kind == "intersentence" else "", text)
                 for triple in triples for text in (triple.stereotype, triple.anti, triple.unrelated)]  # fmt: skip
    scores, fits_N = [], np.ones(len(triples), bool)
    for subject in subjects:
        found = _causal(subject, sentences)
        scores.append(found.mean_S.reshape(-1, 3))
        fits_N &= (found.count_S.reshape(-1, 3) > 0).all(axis=1)
    _require(fits_N, "StereoSet")
    kind_N, domain_N, term_N = (np.asarray([getattr(t, name) for t in triples]) for name in ("kind", "domain", "term"))

    def of(benchmark: str, part: str | None, chosen_N: np.ndarray) -> list[Measure]:
        kept_N = chosen_N & fits_N
        if not kept_N.any():
            return []
        samples = [[np.where(np.isnan(score[kept_N]).any(), np.nan,
                             term_scores(term_counts(term_N[kept_N], *score[kept_N].T)))] for score in scores]
        about = {"items": int(kept_N.sum()), "left_out": int((chosen_N & ~fits_N).sum()),
                 "terms": len(samples[0][0])}  # fmt: skip
        return [
            Measure(f"StereoSet {benchmark}", part, name, statistic, samples, about | {"ideal": IDEAL[name]})
            for name, statistic in STEREOSET.items()
        ]

    measures = []
    for kind in sorted(set(kind_N), key=["intrasentence", "intersentence"].index):
        title = INTERSENTENCE if kind == "intersentence" else kind
        measures += of(title, None, kind_N == kind)
        for domain in sorted(set(domain_N)):
            measures += of(title, str(domain), (kind_N == kind) & (domain_N == domain))
    return measures + (of("both kinds", None, np.ones(len(triples), bool)) if len(set(kind_N)) > 1 else [])


def pairs(
    subjects: Sequence[Subject], items: Sequence[Pair], benchmark: str, names: Sequence[str] | None = None
) -> list[Measure]:
    """Measure how often the stereotypical sentence scores higher: over all pairs, by group and by direction.

    A tie counts as not higher, except in the rates by direction (stereo, antistereo), which leave ties out, as the
    script of CrowS-Pairs does. names: which of PAIR_MEASURES; all when not given.
    """
    group_N, anti_N = np.asarray([pair.group for pair in items]), np.asarray([pair.antistereo for pair in items])
    parts: dict[str | None, tuple[np.ndarray, Callable]] = {None: (np.ones(len(items), bool), share)}
    if len(set(group_N)) > 1:
        parts |= {str(group): (group_N == group, share) for group in sorted(set(group_N))}
    if anti_N.any():
        parts |= {"stereo": (~anti_N, decided_share), "antistereo": (anti_N, decided_share)}
    scored = [_pair_scores(subject, items) for subject in subjects]
    measures = []
    for name in names or PAIR_MEASURES[subjects[0].model.config.head]:
        fits_N = np.logical_and.reduce([scores[name][2] for scores in scored])
        _require(fits_N, f"{benchmark} {name}")
        wins = [preference(*scores[name][:2]) for scores in scored]
        for part, (chosen_N, statistic) in parts.items():
            kept_N = chosen_N & fits_N
            if kept_N.any():
                about = {"items": int(kept_N.sum()), "left_out": int((chosen_N & ~fits_N).sum()),
                         "ties": int((wins[0][kept_N, 1] == 0).sum()), "ideal": 50.0}  # fmt: skip
                samples = [[win[kept_N]] for win in wins]
                measures.append(Measure(benchmark, part, name, statistic, samples, about))
    return measures


def group_loss(subjects: Sequence[Subject], examples: Sequence[Examples], groups: dict[str, str]) -> list[Measure]:
    """Measure nats a token by group, and the gap where there are two. groups: id -> group; examples of each model.

    The gap's interval takes the groups' texts for unrelated; where they are pairs it is wider than it need be.
    """
    common = set.intersection(*(set(part.ids) for part in examples))
    units: list[dict[str, np.ndarray]] = []
    for subject, part in zip(subjects, examples, strict=True):
        part = part.take([n for n, identity in enumerate(part.ids) if identity in common])
        scores = token_scores(subject.model, subject.params, part)
        loss_N = -np.where(scores.scored_NT, scores.logp_NT, 0).sum(axis=1, dtype=np.float64)
        values_N2, group_N = np.stack([loss_N, scores.scored_NT.sum(axis=1)], axis=1), [groups[id] for id in part.ids]
        units.append({name: values_N2[np.asarray(group_N) == name] for name in dict.fromkeys(group_N)})
    names = list(units[0])
    by_group = [Measure("Loss", name, "nats a token", ratio, [[one[name]] for one in units],
                        {"items": len(units[0][name])}) for name in names]  # fmt: skip
    if len(names) != 2:
        return by_group
    gap = Measure("Loss", None, f"gap {names[0]} - {names[1]}", lambda one, other: ratio(one) - ratio(other),
                  [[one[name] for name in names] for one in units], {"items": len(common), "ideal": 0.0})  # fmt: skip
    return [*by_group, gap]


def generation(
    subjects: Sequence[Subject], prompts: Sequence[Prompt], scorer: Scorer, **settings: Any
) -> tuple[list[Measure], list[dict[str, Any]]]:
    """Measure the mean score of what models write after the prompts of two groups, its gap and its ratio.

    settings: of `continuations`. A unit is a prompt: the mean over its samples. Also returns every continuation.
    """
    names = list(dict.fromkeys(prompt.group for prompt in prompts))
    group_N = np.asarray([prompt.group for prompt in prompts])
    samples, written = [], []
    for subject in subjects:
        texts = continuations(subject.model, subject.params, subject.tokenizer, [p.text for p in prompts], **settings)
        scores_NS = np.asarray(scorer([text for several in texts for text in several])).reshape(len(prompts), -1)
        samples.append([scores_NS[group_N == name].mean(axis=1, keepdims=True) for name in names])
        written += [
            {"model": subject.name, "prompt": prompt.text, "group": prompt.group, "text": text, "score": float(score)}
            for prompt, several, scores in zip(prompts, texts, scores_NS, strict=True)
            for text, score in zip(several, scores, strict=True)
        ]
    measures = [
        Measure("Generation", name, "mean score", lambda mean: mean[..., 0], [[one[n]] for one in samples],
                {"items": len(samples[0][n])})
        for n, name in enumerate(names)
    ]  # fmt: skip
    both = {"items": len(prompts)}
    return [
        *measures,
        Measure("Generation", None, f"gap {names[0]} - {names[1]}", lambda one, other: one[..., 0] - other[..., 0],
                samples, both | {"ideal": 0.0}),
        Measure("Generation", None, f"ratio {names[0]} / {names[1]}",
                lambda one, other: ratio(np.concatenate([one, other], axis=-1)), samples, both | {"ideal": 1.0}),
    ], written  # fmt: skip


def _causal(subject: Subject, sentences: Sequence[tuple[str, str]]) -> Scores:
    start = start_id(subject.tokenizer, subject.name)
    return causal_scores(subject.model, subject.params, subject.tokenizer, sentences, start=start,
                         always=subject.always_start)  # fmt: skip


def _pair_scores(subject: Subject, items: Sequence[Pair]) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return for every measure of the head the scores of `more` and of `less`, and whether both could be scored."""
    N = len(items)
    if subject.model.config.head == "causal":
        found = _causal(subject, [("", pair.more) for pair in items] + [("", pair.less) for pair in items])
        fits_N = (found.count_S[:N] > 0) & (found.count_S[N:] > 0)
        return {name: (score[:N], score[N:], fits_N) for name, score in (("mean", found.mean_S), ("sum", found.sum_S))}
    # The official scripts compare the stereotyping sentence with the other, which decides what difflib finds.
    ordered = [(pair.less, pair.more) if pair.antistereo else (pair.more, pair.less) for pair in items]
    swapped_N, result = np.asarray([pair.antistereo for pair in items]), {}
    for name in PAIR_MEASURES["masked"]:
        changed = name == "masked_changed"
        found = masked_scores(subject.model, subject.params, subject.tokenizer, ordered, changed=changed)
        score = np.round(found.mean_S if changed else found.sum_S, 3)
        more_N, less_N = np.where(swapped_N, score[N:], score[:N]), np.where(swapped_N, score[:N], score[N:])
        result[name] = more_N, less_N, found.count_S[:N] > 0
    return result


def _require(fits_N: np.ndarray, name: str) -> None:
    if not fits_N.any():
        raise UserError(f"{name}: no item fits into the model's context, or none has a token to score")
