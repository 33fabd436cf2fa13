"""Loss, perplexity and accuracy of a language model on examples. Shapes: N examples, B batch, T tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxforget.data.sampling import hash64
from jaxforget.data.tokens import Examples
from jaxforget.models import Model, Params
from jaxforget.models.sharding import ROWS, host, place, place_rows, size
from jaxforget.training.objectives import mask_tokens, token_logp


class TokenScores(NamedTuple):
    """Per-token results on the host; only positions with `scored_NT` count."""

    logp_NT: np.ndarray  # nats
    correct_NT: np.ndarray  # teacher-forced argmax equals the label
    scored_NT: np.ndarray


@functools.cache
def _scorer(model):
    @jax.jit
    def score(params, batch):
        logits_BTV = model.batch_logits(params, batch)
        logp_BT, _ = token_logp(logits_BTV, batch["labels"])
        return logp_BT, jnp.argmax(logits_BTV, axis=-1) == batch["labels"]

    return score


def in_batches(function: Callable[..., Any], params: Any, examples: Examples, batch: int) -> Any:
    """Apply a compiled `function(params, batch)` to all examples and join its arrays on the host."""
    params, results = place(params), []
    batch += -batch % size(*ROWS)
    columns = {name: column for name, column in examples.columns.items() if name != "key"}  # 64 bits, for the host
    for start in range(0, len(examples), batch):
        rows = np.arange(start, start + batch).clip(max=len(examples) - 1)  # one shape; the tail repeats a row
        results.append(function(params, place_rows({name: column[rows] for name, column in columns.items()})))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(examples)], *map(host, results))


def token_scores(model: Model, params: Params, examples: Examples, batch: int = 32) -> TokenScores:
    """Score every label of every example under the model."""
    logp_NT, correct_NT = in_batches(_scorer(model), params, examples, batch)
    return TokenScores(logp_NT, correct_NT, examples.scored)


def masked_once(examples: Examples, mask_id: int, vocab_size: int) -> Examples:
    """Hide tokens as `masked_token` does, the same ones every time: a function of each example's id."""
    draw_N = (hash64(examples.columns["key"]) >> np.uint64(32)).astype(np.uint32)
    tokens_NT, labels_NT = mask_tokens(
        examples.columns["tokens"], examples.columns["labels"], draw_N, mask_id, vocab_size
    )
    hidden = {"tokens": np.asarray(tokens_NT), "labels": np.asarray(labels_NT)}
    return dataclasses.replace(examples, columns=examples.columns | hidden)


def token_loss(scores: TokenScores) -> float:
    """Return total loss over total scored tokens, nats."""
    loss = -np.where(scores.scored_NT, scores.logp_NT, 0.0).sum(dtype=np.float64)
    return float(loss / scores.scored_NT.sum())


def language_metrics(scores: TokenScores) -> dict[str, float]:
    """Summarise token scores.

    nll: see `token_loss`. token_perplexity: exp(nll). perplexity: exp of the mean over
    sequences of each one's mean loss, the form of Yao et al. (arXiv 2402.15159, released run_eval.py). accuracy:
    percent, mean over sequences of teacher-forced argmax accuracy, same source. The two perplexities differ unless
    lengths coincide.
    """
    count_N = scores.scored_NT.sum(axis=1)
    loss_N = -np.where(scores.scored_NT, scores.logp_NT, 0.0).sum(axis=1, dtype=np.float64)
    right_N = (scores.correct_NT & scores.scored_NT).sum(axis=1)
    nll = token_loss(scores)
    return {
        "nll": nll,
        "perplexity": float(np.exp((loss_N / count_N).mean())),
        "token_perplexity": float(np.exp(nll)),
        "accuracy": float(100.0 * (right_N / count_N).mean()),
    }
