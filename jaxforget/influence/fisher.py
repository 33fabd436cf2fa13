"""Damped empirical Fisher: score = g_k^T (F + lambda)^-1 g_q, with F the mean of h h^T over training examples.

h: the gradient of an example's mean loss a token, with the labels of the data. With H (N, P) the N of them, by Woodbury

    (F + lambda)^-1 = (1 - H^T (N lambda + H H^T)^-1 H) / lambda,

so that only an N x N matrix is ever inverted, in float64. g_k, g_q: gradients of the mean loss a token of a dataset and
of a query. K datasets, Q queries, N examples of F, B of a microbatch, P parameters.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np

from jaxforget import checks
from jaxforget.data.tokens import concatenate
from jaxforget.errors import UserError
from jaxforget.influence import gradients
from jaxforget.influence.question import Answer, Question


@dataclasses.dataclass(frozen=True, kw_only=True)
class DampedFisher:
    """score = g_k^T (F + lambda)^-1 g_q."""

    damping: float = 0.1
    """lambda, as a multiple of the mean of the eigenvalues of F that can differ from 0: trace(F) / min(N, P)."""
    fisher_examples: int = 256
    """N: training examples of F, drawn at random; 0: all of them."""
    gigabytes: float = 8.0
    """Bound on the N gradients, which the host holds at 4 bytes a number."""
    microbatch: int = 8
    """Examples differentiated at a time, with a gradient each on the device."""
    examples: bool = False
    """Also score single examples, by forward-mode derivatives along (F + lambda)^-1 g_q."""

    def answer(self, question: Question) -> Answer:
        checks.positive(damping=self.damping)
        checks.at_least(0, fisher_examples=self.fisher_examples)
        at, (train, _) = gradients.point(question), gradients.sets(question)
        batch = gradients.sample(concatenate(list(train.values())), self.fisher_examples, question.seed)
        sizes = [leaf.size for leaf in jax.tree.leaves(at.model)]
        needed = 4e-9 * len(batch) * sum(sizes)
        if needed > self.gigabytes:
            raise UserError(f"the gradients of {len(batch)} examples take {needed:.1f} GB, more than gigabytes="
                            f"{self.gigabytes:g}; take fewer fisher_examples")  # fmt: skip
        _, rows_N = gradients.sweep(_gradients(question.objective), (), at, batch, self.microbatch, chunk=1)
        gram_NN = gradients.dots(rows_N, rows_N)
        damping = float(self.damping * np.trace(gram_NN) / len(batch) / min(len(batch), sum(sizes)))
        wanted_Q = gradients.query_gradients(question, at, self.microbatch)
        meets_NQ = gradients.dots(rows_N, wanted_Q)
        weight_QN = np.linalg.solve(gram_NN + len(batch) * damping * np.eye(len(batch)), meets_NQ).T

        def divide(wanted, rows):
            return (wanted - np.tensordot(weight_QN.astype(rows.dtype), rows, axes=1)) / damping

        direction_Q = jax.tree.map(divide, wanted_Q, rows_N)
        spent = 3.0 * gradients.tokens(batch)
        return gradients.along(question, direction_Q, self.microbatch, self.examples, at=at, spent=spent)


@functools.cache
def _gradients(objective):
    def visit(carry, at, batch):
        return carry, gradients.per_example(objective, at, batch)[1]

    return visit
