"""How well members and their vote do on a set.

Shapes: K members, N examples, B batch, T tokens, C classes (of a language model: the vocabulary).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxforget.data.tokens import Examples
from jaxforget.metrics.classification import class_logp, classification_metrics
from jaxforget.metrics.language import TokenScores, in_batches, language_metrics, masked_once, token_scores
from jaxforget.models import Model
from jaxforget.sisa.aggregation import AGGREGATIONS, aggregate, choose
from jaxforget.sisa.ensemble import Ensemble
from jaxforget.training.objectives import token_logp


def score(ensemble: Ensemble, name: str, examples: Examples, weights: str = "equal") -> list[dict[str, Any]]:
    """Return a row for every member, for their mean, and for every aggregation. weights: "equal" or "size"."""
    shards = sorted(ensemble.final_keys())
    params = [ensemble.params(shard) for shard in shards]
    weight_K, model, task = ensemble.weights(weights), ensemble.model, ensemble.recipe.task
    votes: dict[str, dict[str, Any]] = {}
    if task == "classification":
        label_N = examples.columns["label"]
        logp_KNC = np.stack([class_logp(model, p, examples) for p in params])
        each = [classification_metrics(logp_NC, label_N) for logp_NC in logp_KNC]
        for rule in AGGREGATIONS:
            with np.errstate(divide="ignore"):  # a class without a vote
                logp_NC = np.log(np.asarray(aggregate(rule, logp_KNC, weight_K)))
            votes[rule] = classification_metrics(logp_NC, label_N)
    else:
        if task == "masked":
            examples = masked_once(examples, ensemble.tokenizer.mask_token_id, model.vocab_size)
        each = [language_metrics(token_scores(model, p, examples)) for p in params]
        votes = {
            rule: language_metrics(ensemble_token_scores(model, params, examples, rule, weight_K))
            for rule in AGGREGATIONS
        }
    # A share of votes is no probability of the truth.
    votes["majority"] |= dict.fromkeys(set(votes["majority"]) & {"nll", "perplexity", "token_perplexity"})
    mean = {field: float(np.mean([row[field] for row in each])) for field in each[0]}
    rows = {f"member {shard}": row for shard, row in zip(shards, each, strict=True)} | {"mean of members": mean}
    rows |= {f"ensemble, {rule}": row for rule, row in votes.items()}
    return [{"name": f"{row}: {name}", "set": name, **metrics} for row, metrics in rows.items()]


@functools.cache
def _term(model: Model, rule: str) -> Callable[..., Any]:
    """Compile: add one member's part to the sum over members."""

    @jax.jit
    def term(params, batch, sum_BTC, weight):
        logp_BTC = jax.nn.log_softmax(model.batch_logits(params, batch).astype(jnp.float32))
        return sum_BTC + weight * choose(rule).each(logp_BTC)

    return term


def ensemble_token_scores(
    model: Model, params: Sequence, examples: Examples, rule: str, weight_K: np.ndarray
) -> TokenScores:
    """Score every label of every example under the ensemble; one member's (B, T, C) is in memory at a time."""
    term, finish = _term(model, rule), choose(rule).finish

    def scores(params, batch):
        total = 0.0
        for one, weight in zip(params, weight_K, strict=True):
            total = term(one, batch, total, float(weight))
        probability_BTC = finish(total / float(weight_K.sum()))
        logp_BT, _ = token_logp(jnp.log(probability_BTC), batch["labels"])
        return logp_BT, jnp.argmax(probability_BTC, axis=-1) == batch["labels"]

    batch = max(1, min(32, 2**26 // (examples.columns["labels"].shape[1] * model.vocab_size)))
    logp_NT, correct_NT = in_batches(scores, list(params), examples, batch)
    return TokenScores(logp_NT, correct_NT, examples.scored)
