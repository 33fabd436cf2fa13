"""Gradients of whole sets and derivatives of single examples: what every method short of training is made of.

The loss of a set is sum_n w_n l_n / sum_n w_n, with w_n the scored tokens of example n and l_n its mean loss a token.
Gradients of sets stay on the host, so their number is bounded by its memory; the device holds one, or the directions
of a few queries. Products of gradients are summed in float64. The microbatch changes memory and speed, not results.
Shapes: K datasets, Q queries, N examples of a set, C microbatches of a chunk, B examples of one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxforget import checks
from jaxforget.data.sampling import hash64, order
from jaxforget.data.tokens import IGNORED, Examples, same_widths
from jaxforget.errors import UserError
from jaxforget.influence.question import Answer, Question
from jaxforget.models.sharding import host
from jaxforget.training.step import Batch, Objective, Parts, PyTree, scan_first

CHUNK = 16  # microbatches a program call takes
BLOCK = 1 << 22  # numbers of gradients whose products are summed at a time
QUERIES = 8  # directions on the device at a time


class Point(NamedTuple):
    """Where gradients are taken."""

    model: PyTree
    rest: Parts  # the other parts
    key: jax.Array


def point(question: Question, model: PyTree = None) -> Point:
    """Put the parameters, or those of a checkpoint, on the device."""
    parts = jax.tree.map(jnp.asarray, dict(question.parts) if model is None else {**question.parts, "model": model})
    return Point(parts.pop("model"), parts, jax.random.key(question.seed))


def sets(question: Question) -> tuple[dict[str, Examples], dict[str, Examples]]:
    """Return training datasets and queries, each kind of one width. Raises UserError for an empty one."""
    for kind, named in (("training dataset", question.train), ("query", question.queries)):
        for name, examples in named.items():
            if not len(examples) or not weights(examples).sum():
                raise UserError(f"{kind} {name!r} has no scored tokens; give it at least one record that has")
        if not named:
            raise UserError(f"there is no {kind}; give at least one")
    wide = [dict(zip(named, same_widths(list(named.values())), strict=True))
            for named in (question.train, question.queries)]  # fmt: skip
    return wide[0], wide[1]


def weights(examples: Examples) -> np.ndarray:
    """Return w_N: scored tokens, or 1 where examples have no labels but a class."""
    labels = examples.columns.get("labels")
    return np.ones(len(examples)) if labels is None else (labels != IGNORED).sum(axis=1).astype(np.float64)


def tokens(*sets: Examples) -> float:
    """Count the real tokens of sets."""
    return float(sum(int(one.lengths.sum()) for one in sets))


def sample(examples: Examples, count: int, seed: int, epoch: int = 0) -> Examples:
    """Draw `count` examples without replacement, or take all for 0: a function of seed, epoch and ids."""
    if not 0 < count < len(examples):
        return examples
    return examples.take(order(examples.columns["key"], seed, epoch)[:count])


# ---------------------------------------------------------------------------------------- passes over a set
Visit = Callable[[Any, Any, Batch], tuple[Any, Any]]  # carry, args, batch -> carry, what was seen (B, ...)


def sweep(
    visit: Visit, carry: PyTree, args: PyTree, examples: Examples, microbatch: int, chunk: int = CHUNK
) -> tuple[PyTree, PyTree]:
    """Carry something through all microbatches of a set. Returns (carry, what was seen, on the host with a leading N).

    The carry is donated. Rows of padding have weight 0 and repeat a real one. visit must be the same function at every
    call, or its program is compiled again.
    """
    checks.at_least(1, microbatch=microbatch)
    seen: list[PyTree] = []
    for batches_C, count in chunks(examples, microbatch, chunk):
        carry, one = _program(visit)(carry, args, batches_C, count)
        if seen:  # one behind, so that the device always has work
            seen[-1] = host(seen[-1])
        seen.append(one)

    def join(*parts):
        return np.concatenate([host(p).reshape(-1, *p.shape[2:]) for p in parts])[: len(examples)]

    return carry, jax.tree.map(join, *seen)


@functools.cache
def _program(visit: Visit) -> Callable[..., tuple[PyTree, PyTree]]:
    @functools.partial(jax.jit, donate_argnums=0)
    def run(carry, args, batches_C, count):
        return scan_first(lambda carry, batch: visit(carry, args, batch), carry, batches_C, count)

    return run


def chunks(examples: Examples, microbatch: int, chunk: int) -> Iterator[tuple[Batch, np.int32]]:
    """Cut a set into chunks of one shape, with the number of microbatches that have a real row."""
    key_N = examples.columns["key"]
    columns = examples.columns | {
        "key": key_N.astype(np.uint32),
        "draw": (hash64(key_N) >> np.uint64(32)).astype(np.uint32),  # the same at every visit
        "weight": weights(examples).astype(np.float32),
        "factor": np.ones(len(examples), np.float32),
        "stream": np.zeros(len(examples), np.int32),
    }
    for start in range(0, len(examples), chunk * microbatch):
        row = np.arange(start, start + chunk * microbatch)
        part = {name: column[row.clip(max=len(examples) - 1)] for name, column in columns.items()}
        part["weight"] = np.where(row < len(examples), part["weight"], 0)
        real = min(len(row), len(examples) - start)
        batches_C = {name: column.reshape(chunk, microbatch, *column.shape[1:]) for name, column in part.items()}
        yield batches_C, np.int32(-(-real // microbatch))


# ------------------------------------------------------------------------------------------- whole gradients
def weighted_loss(objective: Objective, model: PyTree, at: Point, batch: Batch) -> jax.Array:
    """Return sum_b w_b l_b of one microbatch, at least float32."""
    losses_B = objective({**at.rest, "model": model}, batch, at.key)
    losses_B = losses_B.astype(jnp.promote_types(losses_B.dtype, jnp.float32))
    return jnp.sum(jnp.where(batch["weight"] > 0, batch["weight"] * losses_B, 0.0))


@functools.cache
def _add_gradient(objective: Objective) -> Visit:
    def visit(total: PyTree, at: Point, batch: Batch) -> tuple[PyTree, tuple[()]]:
        gradient = jax.grad(lambda model: weighted_loss(objective, model, at, batch))(at.model)
        return jax.tree.map(jnp.add, total, gradient), ()

    return visit


def gradient(objective: Objective, at: Point, examples: Examples, microbatch: int) -> PyTree:
    """Return the gradient of the loss of a set, on the host."""
    zero = jax.tree.map(jnp.zeros_like, at.model)
    total, _ = sweep(_add_gradient(objective), zero, at, examples, microbatch)
    scale = 1.0 / float(weights(examples).sum())  # not NumPy's, which would make gradients float64
    return jax.tree.map(lambda x: host(x) * scale, total)


def gradients(objective: Objective, at: Point, named: Mapping[str, Examples], microbatch: int) -> PyTree:
    """Return the gradients of the losses of several sets, on the host: every leaf has a leading K."""
    return stack([gradient(objective, at, examples, microbatch) for examples in named.values()])


def stack(trees: Sequence[PyTree]) -> PyTree:
    """Join gradients on the host: every leaf gains a leading K."""
    return jax.tree.map(lambda *leaf: np.stack(leaf), *trees)


def dots(left_K: PyTree, right_Q: PyTree) -> np.ndarray:
    """Return the products of all gradients of two stacks, float64 (K, Q)."""
    total_KQ = np.zeros((len(jax.tree.leaves(left_K)[0]), len(jax.tree.leaves(right_Q)[0])))
    for left, right in zip(jax.tree.leaves(left_K), jax.tree.leaves(right_Q), strict=True):
        left, right = left.reshape(len(left), -1), right.reshape(len(right), -1)
        step = max(1, BLOCK // max(len(left), len(right)))
        for start in range(0, left.shape[1], step):
            a, b = (part[:, start : start + step].astype(np.float64) for part in (left, right))
            total_KQ = total_KQ + a @ b.T
    return total_KQ


def norms(tree_K: PyTree) -> np.ndarray:
    """Return the lengths of gradients, float64 (K,). Raises UserError for one that is 0 or not finite."""
    norm_K = np.sqrt(np.diagonal(dots(tree_K, tree_K)))
    if not np.all(np.isfinite(norm_K) & (norm_K > 0)):
        raise UserError("a set has a gradient of length 0 or one that is not finite: no direction can be told from it")
    return norm_K


# --------------------------------------------------------------------------------------- single examples
def some(tree_Q: PyTree, start: int, like: PyTree) -> PyTree:
    """Put the next few gradients of a stack on the device, in the dtype of the parameters."""
    return jax.tree.map(lambda x, leaf: jnp.asarray(x[start : start + QUERIES], leaf.dtype), tree_Q, like)


def each(function: Callable[[PyTree], PyTree], tree_Q: PyTree) -> PyTree:
    """Apply a function to every gradient of a stack: one after the other on a CPU, side by side elsewhere."""
    return jax.lax.map(function, tree_Q) if jax.default_backend() == "cpu" else jax.vmap(function)(tree_Q)


@functools.cache
def _derivatives(objective: Objective) -> Visit:
    def visit(carry: PyTree, args: PyTree, batch: Batch) -> tuple[PyTree, tuple[()]]:
        at, direction_Q = args
        # Forward mode: no gradient of an example is ever formed.
        _, along = jax.linearize(lambda model: objective({**at.rest, "model": model}, batch, at.key), at.model)
        return carry, each(along, direction_Q).T

    return visit


def derivatives(
    objective: Objective, at: Point, examples: Examples, direction_Q: PyTree, microbatch: int
) -> np.ndarray:
    """Return the derivative of every example's own loss along every direction, float64 (N, Q)."""
    found = []
    for start in range(0, len(jax.tree.leaves(direction_Q)[0]), QUERIES):
        args = at, some(direction_Q, start, at.model)
        found.append(sweep(_derivatives(objective), (), args, examples, microbatch)[1])
    return np.concatenate(found, axis=1).astype(np.float64)


def per_example(objective: Objective, at: Point, batch: Batch) -> tuple[jax.Array, PyTree]:
    """Return loss and gradient of every example of a microbatch: B times the memory of the parameters."""

    def one(model, row):
        return objective({**at.rest, "model": model}, jax.tree.map(lambda x: x[None], row), at.key)[0]

    return jax.vmap(jax.value_and_grad(one), in_axes=(None, 0))(at.model, batch)


# ------------------------------------------------------------------------------------------------- answers
def along(
    question: Question,
    direction_Q: PyTree,
    microbatch: int,
    examples: bool,
    *,
    at: Point,
    spent: float = 0.0,
    **rest: Any,
) -> Answer:
    """Score every dataset by the derivative of its loss along a direction for each query, made of the query's gradient.

    examples: also give the derivative (N, Q) of each example's own loss; the score is their mean over scored tokens.
    spent: forward tokens besides those of the gradients of queries and of this. rest: further fields of the answer.
    """
    train, queries = sets(question)
    spent += 3.0 * tokens(*queries.values())
    if not examples:
        scores_KQ = dots(gradients(question.objective, at, train, microbatch), direction_Q)
        return Answer(scores_KQ, forward_tokens=spent + 3.0 * tokens(*train.values()), **rest)
    found = {name: derivatives(question.objective, at, one, direction_Q, microbatch) for name, one in train.items()}
    scores_KQ = np.stack([np.average(found[name], axis=0, weights=weights(one)) for name, one in train.items()])
    spent += (1.0 + 2.0 * len(queries)) * tokens(*train.values())
    return Answer(scores_KQ, found, forward_tokens=spent, **rest)


def query_gradients(question: Question, at: Point, microbatch: int) -> PyTree:
    """Return g_q, the gradient of the loss of every query."""
    return gradients(question.objective, at, sets(question)[1], microbatch)
