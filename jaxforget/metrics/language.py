"""Loss, perplexity and accuracy of a language model on examples. Shapes: N examples, B batch, T tokens."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxforget.data.tokens import IGNORED, Examples
from jaxforget.training.objectives import token_logp


class TokenScores(NamedTuple):
    """Per-token results on the host; only positions with `scored_NT` count."""

    logp_NT: np.ndarray  # nats
    correct_NT: np.ndarray  # teacher-forced argmax equals the label
    scored_NT: np.ndarray


@functools.cache
def _scorer(model):
    @jax.jit
    def score(params, tokens_BT, labels_BT):
        logits_BTV = model.logits(params, tokens_BT)
        logp_BT, _ = token_logp(logits_BTV, labels_BT)
        return logp_BT, jnp.argmax(logits_BTV, axis=-1) == labels_BT

    return score


def token_scores(model, params, examples: Examples, batch: int = 32) -> TokenScores:
    """Score every label of every example under the model."""
    tokens_NT, labels_NT = examples.columns["tokens"], examples.columns["labels"]
    params = jax.tree.map(jnp.asarray, params)
    score, results = _scorer(model), []
    for start in range(0, len(examples), batch):
        rows = np.arange(start, start + batch).clip(max=len(examples) - 1)  # one shape; the tail repeats a row
        results.append(score(params, tokens_NT[rows], labels_NT[rows]))
    logp, correct = (np.concatenate([np.asarray(r[i]) for r in results])[: len(examples)] for i in (0, 1))
    return TokenScores(logp, correct, labels_NT != IGNORED)


def language_metrics(scores: TokenScores) -> dict[str, float]:
    """Summarise token scores.

    nll: total loss over total scored tokens, nats. token_perplexity: exp(nll). perplexity: exp of the mean over
    sequences of each one's mean loss, the form of Yao et al. (arXiv 2402.15159, released run_eval.py). accuracy:
    percent, mean over sequences of teacher-forced argmax accuracy, same source. The two perplexities differ unless
    lengths coincide.
    """
    count_N = scores.scored_NT.sum(axis=1)
    loss_N = -np.where(scores.scored_NT, scores.logp_NT, 0.0).sum(axis=1, dtype=np.float64)
    right_N = (scores.correct_NT & scores.scored_NT).sum(axis=1)
    nll = loss_N.sum() / count_N.sum()
    return {
        "nll": float(nll),
        "perplexity": float(np.exp((loss_N / count_N).mean())),
        "token_perplexity": float(np.exp(nll)),
        "accuracy": float(100.0 * (right_N / count_N).mean()),
    }
