"""Loss, accuracy and F1 of a classifier on examples. Shapes: N examples, C classes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxforget.data.tokens import Examples
from jaxforget.metrics.language import in_batches
from jaxforget.models import Model, Params


@functools.cache
def _scorer(model):
    return jax.jit(lambda params, batch: jax.nn.log_softmax(model.batch_logits(params, batch).astype(jnp.float32)))


def class_logp(model: Model, params: Params, examples: Examples, batch: int = 32) -> np.ndarray:
    """Return log p of every class for every example in nats, float32 (N, C)."""
    return in_batches(_scorer(model), params, examples, batch)


def classification_metrics(logp_NC: np.ndarray, label_N: np.ndarray) -> dict[str, float]:
    """Summarise: nll (nats an example); accuracy, macro_f1 and majority (accuracy of the commonest class) in percent.

    macro_f1: mean over the classes that occur, in the labels or the predictions, of 2 TP / (2 TP + FP + FN).
    """
    C = logp_NC.shape[1]
    predicted_N = logp_NC.argmax(axis=1)
    confusion = np.zeros((C, C), np.int64)
    np.add.at(confusion, (label_N, predicted_N), 1)
    hits_C, sums_C = np.diag(confusion), confusion.sum(axis=0) + confusion.sum(axis=1)
    f1 = 2.0 * hits_C[sums_C > 0] / sums_C[sums_C > 0]
    return {
        "nll": float(-logp_NC[np.arange(len(label_N)), label_N].mean(dtype=np.float64)),
        "accuracy": float(100.0 * (predicted_N == label_N).mean()),
        "macro_f1": float(100.0 * f1.mean()),
        "majority": float(100.0 * np.bincount(label_N).max() / len(label_N)),
    }
