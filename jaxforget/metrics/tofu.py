"""TOFU (arXiv 2401.06121): probability, ROUGE, truth ratio; forget quality and model utility. Shapes: N items.

Losses are nats a token of an answer with its EOS. A truth ratio compares wrong answers i with the paraphrased right
one:

    T1 = mean_i exp(-l_i) / exp(-l_para)    the paper's, in its model utility
    T2 = exp(l_para - mean_i l_i)           its code's forget quality, and everything of OpenUnlearning
    T3 = 1 / (1 + T2)

Large T1 and T2: the model takes wrong answers for as likely. Missing items are NaN and left out of every mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxforget.data.sources import Record
from jaxforget.errors import UserError
from jaxforget.metrics.composite import estimate, harmonic_mean, noted
from jaxforget.metrics.evidence import Evidence, Reader, Request, ask_to_write, mean_losses, require_questions
from jaxforget.metrics.rouge import rouge_l

SETS = ("forget", "retain", "real_authors", "world_facts")
CHOICES = ("real_authors", "world_facts")  # whose probability is that of the right answer among the choices
UTILITY = SETS[1:]


# --------------------------------------------------------------------------------------------------- formulas
def log_truth_ratio(right_N: np.ndarray, wrong_NI: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return log T1 and log T2 of losses. wrong_NI: the losses of each item's wrong answers."""
    log_t1, log_t2 = np.full(len(right_N), np.nan), np.full(len(right_N), np.nan)
    for n, (right, wrong) in enumerate(zip(right_N, wrong_NI, strict=True)):
        if np.isfinite(right) and len(wrong) and np.isfinite(wrong).all():
            best = -wrong.min()
            log_t1[n] = right + best + np.log(np.exp(-wrong - best).mean())
            log_t2[n] = right - wrong.mean()
    return log_t1, log_t2


def truth_share(log_t2_N: np.ndarray) -> np.ndarray:
    """Return T3, without overflow."""
    return 0.5 * (1.0 - np.tanh(0.5 * np.asarray(log_t2_N, np.float64)))


def forget_truth(log_t_N: np.ndarray) -> np.ndarray:
    """Return min(T, 1 / T): 1 where right and wrong answers cannot be told apart."""
    return np.exp(-np.abs(np.asarray(log_t_N, np.float64)))


def utility_truth(log_t_N: np.ndarray) -> np.ndarray:
    """Return max(0, 1 - T)."""
    return -np.expm1(np.minimum(np.asarray(log_t_N, np.float64), 0.0))


def choice_probability(right_N: np.ndarray, wrong_NI: Sequence[np.ndarray]) -> np.ndarray:
    """Return p / (p + sum_i p_i) of losses: the share of the right answer among the choices."""
    with np.errstate(over="ignore"):
        sums = [np.exp(right - wrong).sum() for right, wrong in zip(right_N, wrong_NI, strict=True)]
    return 1.0 / (1.0 + np.asarray(sums, np.float64))


def forget_quality(log_t_N: np.ndarray, retrained_N: np.ndarray) -> dict[str, float]:
    """Test whether truth ratios of a model and of the retrained one are drawn alike: two-sided two-sample KS.

    forget_quality: p. It falls with n at equal D, so D and n stand beside it; n: items of the smaller sample.
    """
    from scipy.stats import ks_2samp

    one, other = (np.asarray(x, np.float64) for x in (log_t_N, retrained_N))
    one, other = one[np.isfinite(one)], other[np.isfinite(other)]
    if not len(one) or not len(other):
        raise UserError("forget quality needs truth ratios of both models; one of them has none")
    found = ks_2samp(one, other)
    return {"forget_quality": float(found.pvalue), "forget_quality_d": float(found.statistic),
            "forget_quality_n": min(len(one), len(other))}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- the metric
def ask(reader: Reader, sets: Mapping[str, list[Record]], options: Any) -> Request:
    """Ask for all answers of the TOFU sets that are given, and for what the model answers itself."""
    request = Request()
    for name in SETS:
        if name not in sets:
            continue
        require_questions(sets[name], name, "tofu")
        if name in CHOICES and not wrong_answers(sets[name]):
            raise UserError(f"--{name.replace('_', '-')} has no field 'perturbed_answer', the choices of metric tofu")
        prompts = [reader.prompt(record.question) for record in sets[name]]
        written = {name: ask_to_write(reader, prompts, options.max_new_tokens, name)}
        request |= Request(written=written) | ask_ratios(reader, name, sets[name])
    return request


def ask_ratios(reader: Reader, name: str, records: list[Record]) -> Request:
    """Ask for the right answer and, where records have them, its paraphrase and the wrong answers."""
    scored = {name: reader.encode(records, name)}
    if paraphrased := with_answers(records, "paraphrased_answer"):
        scored[f"{name} paraphrased"] = reader.encode(paraphrased, f"{name}, paraphrased")
    wrong_NI = wrong_answers(records)
    if wrong_NI and not paraphrased and name not in CHOICES:
        raise UserError(f"--{name} has the field 'perturbed_answer' but no 'paraphrased_answer' to compare it with")
    for i, wrong in enumerate(wrong_NI):
        scored[f"{name} perturbed {i}"] = reader.encode(wrong, f"{name}, perturbed {i}")
    return Request(scored)


def measure(evidence: Evidence, reader: Reader, sets: Mapping[str, list[Record]], options: Any) -> dict[str, Any]:
    """Return per-item numbers: probability, rouge, and log T1 and T2 where records have wrong answers."""
    items: dict[str, Any] = {}
    for name in (name for name in SETS if name in sets):
        right_N = mean_losses(evidence.scored[name], sets[name])
        ratios = ratios_of(evidence, name, sets[name])
        items[f"{name}_probability"] = np.exp(-right_N)
        if name in CHOICES:
            items[f"{name}_probability"] = choice_probability(right_N, wrong_losses(evidence, name, sets[name]))
        written = evidence.written[name]
        items[f"{name}_rouge"] = rouge_l([r.text for r in sets[name]], written, stem=True)["recall"]
        items |= {f"{name}_written": written} | {f"{name}_{key}": value for key, value in ratios.items()}
    return items


def ratios_of(evidence: Evidence, name: str, records: list[Record]) -> dict[str, np.ndarray]:
    """Return log_t1 and log_t2 of every item, or nothing where records have no wrong answers."""
    wrong_NI = wrong_losses(evidence, name, records)
    if not any(map(len, wrong_NI)):
        return {}
    right = evidence.scored.get(f"{name} paraphrased", evidence.scored[name])
    log_t1, log_t2 = log_truth_ratio(mean_losses(right, records), wrong_NI)
    return {"log_t1": log_t1, "log_t2": log_t2}


def summarise(items: Mapping[str, Any], retrained: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return means, aggregates, model utility and, beside a retrained model, forget quality."""
    row: dict[str, Any] = {}
    for name in SETS:
        if f"{name}_probability" not in items:
            continue
        for kind in ("probability", "rouge"):
            row |= estimate(f"{name}_{kind}", items[f"{name}_{kind}"])
        truth = forget_truth if name == "forget" else utility_truth
        for kind in ("t1", "t2"):
            if f"{name}_log_{kind}" in items:
                row |= estimate(f"{name}_truth_ratio_{kind}", truth(items[f"{name}_log_{kind}"]))
        left_out = int(np.isnan(np.asarray(items[f"{name}_probability"], np.float64)).sum())
        row |= {f"{name}_items_left_out": left_out} if left_out else {}
    for kind in ("t1", "t2"):
        parts = [f"{name}_{part}" for name in UTILITY for part in ("probability", "rouge", f"truth_ratio_{kind}")]
        row[f"model_utility_{kind}"] = harmonic_mean(row.get(part) for part in parts)
    row = {f"tofu_{key}": value for key, value in row.items()}
    if retrained and "forget_log_t2" in items and "forget_log_t2" in retrained:
        row |= noted(lambda: forget_quality(items["forget_log_t2"], retrained["forget_log_t2"]), "forget_quality")
    return row


# ----------------------------------------------------------------------------------------------------- records
def with_answers(records: Sequence[Record], field: str) -> list[Record]:
    """Return the records with the answer of another field, or none where no record has it."""
    if not any(field in record.fields for record in records):
        return []
    for record in records:
        if not isinstance(record.fields.get(field), str):
            raise UserError(f"record {record.id!r}: field {field!r} must be a string in all records or in none")
    return [dataclasses.replace(record, text=record.fields[field]) for record in records]


def wrong_answers(records: Sequence[Record]) -> list[list[Record]]:
    """Return the records with their first wrong answer, then those with a second one, and so on."""
    answers = [wrong_texts(record) for record in records]
    for record, several in zip(records, answers, strict=True):
        if not isinstance(several, list) or not all(isinstance(answer, str) for answer in several):
            raise UserError(f"record {record.id!r}: field 'perturbed_answer' must be a list of strings")
    return [
        [dataclasses.replace(record, text=several[i]) for record, several in zip(records, answers) if len(several) > i]
        for i in range(max(map(len, answers), default=0))
    ]


def wrong_texts(record: Record) -> list[str]:
    """Return what TOFU has in `perturbed_answer`, and the generated corpus in `perturbed_answers`."""
    return record.fields.get("perturbed_answer", record.fields.get("perturbed_answers", []))


def wrong_losses(evidence: Evidence, name: str, records: Sequence[Record]) -> list[np.ndarray]:
    """Return the losses of every item's wrong answers; NaN for one without a token to score."""
    wrong = wrong_answers(records)
    several = [mean_losses(evidence.scored[f"{name} perturbed {i}"], records) for i in range(len(wrong))]
    return [
        np.asarray([loss_N[n] for loss_N in several[: len(wrong_texts(record))]])
        for n, record in enumerate(records)
    ]
