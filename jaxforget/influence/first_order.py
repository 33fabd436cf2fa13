"""Products of gradients: GradDot, GradCos, GradSign and TracIn.

One step of ascent on a dataset changes the loss of a query by eta <g_k, g_q>, so these are UnTrac's limits for one
small step: of SGD (GradDot) and of Adam (GradSign). Sources: TracIn, arXiv 2002.08484; arXiv 2401.15241, equations 5-6.
g_k, g_q: gradients of the mean loss a token. K datasets, Q queries, N examples of a set, B of a microbatch.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxforget.errors import UserError
from jaxforget.influence import gradients
from jaxforget.influence.question import Answer, Question
from jaxforget.models.sharding import host


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradDot:
    """score = <g_k, g_q>."""

    microbatch: int = 8
    """Examples differentiated at a time."""
    examples: bool = False
    """Also score single examples, by forward-mode derivatives along g_q."""

    def answer(self, question: Question) -> Answer:
        at = gradients.point(question)
        direction_Q = gradients.query_gradients(question, at, self.microbatch)
        return gradients.along(question, direction_Q, self.microbatch, self.examples, at=at)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradCos:
    """score = the cosine of gradients. UnTrac's paper does not say of which: both readings are here."""

    of: Literal["datasets", "examples"] = "datasets"
    """datasets: of g_k and g_q. examples: mean over all pairs of an example of each, every gradient of length 1."""
    microbatch: int = 8
    """Examples differentiated at a time; with of=examples memory holds a gradient for each."""

    def answer(self, question: Question) -> Answer:
        if self.of not in ("datasets", "examples"):
            raise UserError(f"of is {self.of!r}; use datasets or examples")
        at, (train, queries) = gradients.point(question), gradients.sets(question)
        if self.of == "datasets":
            both = [gradients.gradients(question.objective, at, part, self.microbatch) for part in (train, queries)]
            return _answer(question, gradients.dots(*both) / np.outer(*map(gradients.norms, both)))
        # The mean over pairs is the product of the means of unit gradients.
        return _answer(question, gradients.dots(*(self._mean_units(question, at, part) for part in (train, queries))))

    def _mean_units(self, question, at, named):
        means = []
        for examples in named.values():
            zero = jax.tree.map(jnp.zeros_like, at.model)
            total, _ = gradients.sweep(_add_units(question.objective), zero, at, examples, self.microbatch)
            means.append(jax.tree.map(lambda x: host(x) / len(examples), total))  # noqa: B023
        return gradients.stack(means)


@functools.cache
def _add_units(objective):
    def visit(total, at, batch):
        _, grads_B = gradients.per_example(objective, at, batch)
        square_B = sum(jnp.sum(jnp.square(x), axis=range(1, x.ndim)) for x in jax.tree.leaves(grads_B))
        # A gradient of 0 has no direction and counts as 0.
        unit_B = jnp.where((batch["weight"] > 0) & (square_B > 0), jax.lax.rsqrt(square_B), 0.0)
        add = jax.tree.map(lambda x: jnp.tensordot(unit_B, x, axes=1, precision="highest"), grads_B)
        return jax.tree.map(jnp.add, total, add), ()

    return visit


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradSign:
    """score = <sign g_k, g_q>: UnTrac with one step of Adam, divided by the learning rate."""

    sign_of: Literal["dataset", "query"] = "dataset"
    """query: <g_k, sign g_q>, which is UnTrac-Inv with one step of Adam."""
    microbatch: int = 8
    """Examples differentiated at a time."""

    def answer(self, question: Question) -> Answer:
        if self.sign_of not in ("dataset", "query"):
            raise UserError(f"sign_of is {self.sign_of!r}; use dataset or query")
        at, named = gradients.point(question), gradients.sets(question)
        both = [gradients.gradients(question.objective, at, part, self.microbatch) for part in named]
        place = ("dataset", "query").index(self.sign_of)
        both[place] = jax.tree.map(np.sign, both[place])
        return _answer(question, gradients.dots(*both))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TracIn:
    """score = sum over checkpoints t of eta_t <g_k, g_q> at theta_t."""

    microbatch: int = 8
    """Examples differentiated at a time."""
    examples: bool = False
    """Also score single examples, by forward-mode derivatives along g_q."""

    def answer(self, question: Question) -> Answer:
        if not question.checkpoints:
            raise UserError("TracIn needs checkpoints of the training; give at least one, with its learning rate")
        found = []
        for learning_rate, model in question.checkpoints:
            at = gradients.point(question, model)
            direction_Q = gradients.query_gradients(question, at, self.microbatch)
            direction_Q = jax.tree.map(lambda x, rate=learning_rate: rate * x, direction_Q)
            found.append(gradients.along(question, direction_Q, self.microbatch, self.examples, at=at))
        by_name = [one.examples for one in found if one.examples is not None]
        examples = {name: np.sum([one[name] for one in by_name], axis=0) for name in question.train if by_name}
        spent = sum(one.forward_tokens for one in found)
        return Answer(np.sum([one.scores_KQ for one in found], axis=0), examples or None, forward_tokens=spent)


def _answer(question: Question, scores_KQ: np.ndarray) -> Answer:
    cost = 3.0 * gradients.tokens(*question.train.values(), *question.queries.values())
    return Answer(scores_KQ, forward_tokens=cost)
