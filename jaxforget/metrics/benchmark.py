"""The metrics of the unlearning benchmark: METRICS, and how one model is measured by several of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxforget.data.sources import Record
from jaxforget.errors import UserError
from jaxforget.metrics import attacks, memorisation, muse, tofu
from jaxforget.metrics.bias.generation import load_scorer
from jaxforget.metrics.composite import estimate, harmonic_mean, noted, relative_utility
from jaxforget.metrics.evidence import Evidence, Reader, Request, ask_to_write, gather, require_questions
from jaxforget.metrics.language import language_metrics
from jaxforget.metrics.membership import membership_aucs
from jaxforget.models import Params
from jaxforget.report.run import plain


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """How metrics measure."""

    batch_size: int = 32
    """Texts that are scored or continued at once; fewer where logits would fill memory."""
    max_new_tokens: int = 200
    """Longest answer that a model writes for ROUGE (tofu); less where the context is short."""
    drop_last: bool = False
    """Leave the last token of an answer out of EM, ES, Min-K and Min-K++, as OpenUnlearning does."""
    gradnorm: bool = False
    """Also attack by gradient norms: one backward pass a text."""
    prompts: tuple[str, ...] = ("plain",)
    """Wordings of knowledge questions: plain, paraphrased (field paraphrased_question), prefixed."""
    prefixes: Path | None = None
    """What stands before prefixed questions, one a line; a short built-in list when not given."""
    knowledge_template: str | None = None
    """Prompt of knowledge questions, with {question}; --prompt-template when not given. MUSE's ends with a space."""
    fluency: str | None = None
    """Classifier directory or hub name, or words:FILE, that scores what the model writes (metric fluency)."""
    fluency_label: str | None = None
    """The class whose probability is fluency; the classifier's last when not given."""

    def __post_init__(self):
        for field in ("batch_size", "max_new_tokens"):
            if not 1 <= getattr(self, field) < 2**31:
                raise UserError(f"--{field.replace('_', '-')} is {getattr(self, field)}; it must be at least 1")
        if self.knowledge_template is not None and "{question}" not in self.knowledge_template:
            raise UserError(f"--knowledge-template is {self.knowledge_template!r}; it must contain {{question}}")


class Metric(NamedTuple):
    """What a metric needs and what it does.

    needs: sets that must be given. ask(reader, sets, config) -> Request checks them. measure(evidence, reader, sets,
    config) -> items, JSON values; what is saved. summarise(items, items of the retrained model or None) -> fields of
    the row. columns and note: for people. axes: fields of a scatter plot.
    """

    needs: tuple[str, ...]
    ask: Callable[..., Request]
    measure: Callable[..., dict[str, Any]]
    summarise: Callable[..., dict[str, Any]]
    columns: tuple[str, ...]
    note: str
    axes: tuple[str, str] | None = None


# ---------------------------------------------------------------------------------- language and fluency
LANGUAGE = ("forget", "approximate", "retain", "general")


def _ask_language(reader: Reader, sets: Mapping[str, list[Record]], config: MeasureConfig) -> Request:
    return Request(scored={name: reader.encode(sets[name], name) for name in LANGUAGE if name in sets})


def _measure_language(
    evidence: Evidence, reader: Reader, sets: Mapping[str, list[Record]], config: MeasureConfig
) -> dict[str, Any]:
    scores = {name: evidence.scored[name].scores for name in LANGUAGE if name in sets}
    row = {f"{name}_{key}": value for name, one in scores.items() for key, value in language_metrics(one).items()}
    if "approximate" in scores:
        row |= membership_aucs(scores["forget"], scores["approximate"])
    return row


def _ask_fluency(reader: Reader, sets: Mapping[str, list[Record]], config: MeasureConfig) -> Request:
    require_questions(sets["forget"], "forget", "fluency")
    if config.fluency is None:
        raise UserError("metric fluency needs --fluency, a classifier of text")
    _fluency_scorer(config.fluency, config.fluency_label)
    prompts = [reader.prompt(record.question) for record in sets["forget"]]
    return Request(written={"forget": ask_to_write(reader, prompts, config.max_new_tokens, "forget")})


def _measure_fluency(
    evidence: Evidence, reader: Reader, sets: Mapping[str, list[Record]], config: MeasureConfig
) -> dict[str, Any]:
    return {"fluency": _fluency_scorer(config.fluency, config.fluency_label)(evidence.written["forget"])}


@functools.cache
def _fluency_scorer(name: str, label: str | None) -> Callable[[Sequence[str]], np.ndarray]:
    try:
        return load_scorer(name, label)
    except UserError as error:
        raise UserError(str(error).replace("--scorer", "--fluency")) from None


# ------------------------------------------------------------------------------------------------ the table
METRICS: dict[str, Metric] = {
    "language": Metric(
        ("forget",), _ask_language, _measure_language, lambda items, retrained: dict(items),
        ("forget_nll", "approximate_nll", "retain_nll", "general_nll", "gap_to_retrained", "mink40_auc",
         "forget_accuracy", "retain_accuracy", "steps", "seconds", "train_tokens", "tokens_per_second",
         "flops_vs_retraining"),
        "Losses in nats a token, accuracies in percent. The goal of a method is the row `retrained`, not a high forget "
        "loss. mink40 AUC is 1 for memorised, 0.5 for indistinguishable from never seen, lower for over-unlearned.",
        ("forget_nll", "retain_nll"),
    ),
    "tofu": Metric(
        ("forget",), tofu.ask, tofu.measure, tofu.summarise,
        ("forget_quality_d", "forget_quality", "forget_quality_n", "tofu_model_utility_t1", "tofu_model_utility_t2",
         *(f"tofu_{name}_{kind}" for name in tofu.SETS
           for kind in ("probability", "rouge", "truth_ratio_t1", "truth_ratio_t2"))),
        "Forget quality is the p of a two-sided KS test of the truth ratios T2 against the retrained model's, with its "
        "distance D and its items n; p falls with n at equal D. Utility is the harmonic mean of probability, ROUGE-L "
        "recall and truth ratio of the other sets. T1 is the paper's truth ratio, T2 that of OpenUnlearning; numbers "
        "under one do not compare with the other. Forget truth ratio: 1 where right and wrong cannot be told apart.",
        ("forget_quality_d", "tofu_model_utility_t2"),
    ),
    "memorisation": Metric(
        ("forget",), memorisation.ask, memorisation.measure, memorisation.summarise,
        ("memorisation", "em", "es", "paraprob", "truth"),
        "EM: tokens of the answer that the argmax gets right. ES: share of the answer that is completed without error "
        "to its end. ParaProb: probability of the paraphrase. truth: T3, the share of right against wrong answers. "
        "Memorisation is the harmonic mean of 1 - them: 1 for nothing by heart.",
    ),
    "membership": Metric(
        ("forget", "approximate"), attacks.ask, attacks.measure, attacks.summarise,
        ("privleak", "privacy", *(f"auc_{name}" for name in (*attacks.ATTACKS, *attacks.EXTRA)),
         *(f"smia_{name}" for name in attacks.ATTACKS)),
        "AUC: P(a never-trained text scores higher than a forget text): 1 memorised, below that of the retrained model "
        "over-unlearned. PrivLeak on Min-40 %, in percent: 0 is retraining, -100 memorised. sMIA: closeness to the AUC "
        "of the retrained model; Privacy is the harmonic mean of four of them.",
    ),
    "verbatim": Metric(
        ("verbatim",), muse.ask_verbatim, muse.measure_verbatim, muse.summarise_verbatim, ("verbmem",),
        "VerbMem: 100 times the mean ROUGE-L F1 of greedy continuations with the text.",
    ),
    "knowledge": Metric(
        (), muse.ask_knowledge, muse.measure_knowledge, muse.summarise_knowledge,
        tuple(f"knowmem_{side}{kind}" for side in muse.SIDES
              for kind in ("", "_paraphrased", "_prefixed", "_prefixed_best")) + ("utility_change",),
        "KnowMem: 100 times the mean ROUGE-L F1 of answers. Paraphrased: asked in other words. Prefixed: the mean over "
        "prefixes that ask for what should be forgotten; best: that of each question's best prefix.",
        ("knowmem_forget", "knowmem_retain"),
    ),
    "fluency": Metric(
        ("forget",), _ask_fluency, _measure_fluency, lambda items, retrained: estimate("fluency", items["fluency"]),
        ("fluency",), "Mean score of the answers to forget questions under the classifier --fluency.",
    ),
}  # fmt: skip
GROUPS = {"muse": ("verbatim", "knowledge", "membership"), "overall": ("tofu", "memorisation", "membership")}
OVERALL = ("overall", "memorisation", "privacy", "utility_rel", "utility")
OVERALL_NOTE = (
    "Overall is the harmonic mean of Memorisation, Privacy and Utility relative to the original model's. Utility is "
    "model utility under T2, joined with fluency where that was measured."
)


def choose(names: Sequence[str]) -> dict[str, Metric]:
    """Look up metrics and groups of them by name. Raises UserError listing the valid names."""
    chosen: dict[str, Metric] = {}
    for name in names:
        if name not in METRICS and name not in GROUPS:
            valid = (*METRICS, *GROUPS)
            raise UserError(f"unknown metric {name!r}; valid metrics are {', '.join(valid)}")
        chosen |= {part: METRICS[part] for part in GROUPS.get(name, (name,))}
    return chosen


def require(metrics: Mapping[str, Metric], sets: Mapping[str, Any]) -> None:
    """Raise UserError unless every metric has the sets it needs."""
    for name, metric in metrics.items():
        for needed in metric.needs:
            if needed not in sets:
                raise UserError(f"metric {name} needs --{needed.replace('_', '-')}")
    if "knowledge" in metrics and not muse.questions(sets, "forget"):
        raise UserError("metric knowledge needs --forget-questions, or --forget with questions and answers")


def request(
    metrics: Mapping[str, Metric], reader: Reader, sets: Mapping[str, list[Record]], config: MeasureConfig
) -> Request:
    """Join what metrics ask of a model. Raises UserError for what cannot be measured."""
    joined = Request()
    for metric in metrics.values():
        joined |= metric.ask(reader, sets, config)
    return joined


def measure(
    metrics: Mapping[str, Metric],
    asked: Request,
    reader: Reader,
    params: Params,
    sets: Mapping[str, list[Record]],
    config: MeasureConfig,
) -> dict[str, dict[str, Any]]:
    """Measure a model by what was asked: the items of every metric, JSON values with None for what is missing."""
    evidence = gather(reader, params, asked, config.batch_size)
    return {name: _listed(metric.measure(evidence, reader, sets, config)) for name, metric in metrics.items()}


def summarise(items: Mapping[str, dict[str, Any]], retrained: Mapping[str, dict[str, Any]] | None) -> dict[str, Any]:
    """Return the row of a model from its items and, where there is one, those of the retrained model."""
    row: dict[str, Any] = {}
    for name, one in items.items():
        found = METRICS[name].summarise(one, retrained and retrained[name])
        row |= found | _joined_notes(row, found)
    if "tofu_model_utility_t2" in row:
        utility = row["tofu_model_utility_t2"]
        row["utility"] = harmonic_mean((utility, row["fluency"])) if "fluency" in row else utility
    return row


def overall(row: Mapping[str, Any], original: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return utility_rel and overall, given the row of the model before unlearning; nothing where parts are missing."""
    parts: list[Any] = [row.get(name) for name in ("memorisation", "privacy", "utility")]
    if original is None or original.get("utility") is None or None in parts:
        return {}
    found = noted(lambda: {"utility_rel": relative_utility(parts[2], original["utility"])}, "utility_rel")
    return found | _joined_notes(row, found) | {"overall": harmonic_mean((*parts[:2], found["utility_rel"]))}


def _joined_notes(*parts: Mapping[str, Any]) -> dict[str, str]:
    notes = [part["note"] for part in parts if part.get("note")]
    return {"note": "; ".join(notes)} if notes else {}


def _listed(items: Mapping[str, Any]) -> dict[str, Any]:
    return plain({name: x.tolist() if isinstance(x, np.ndarray) else x for name, x in items.items()})
