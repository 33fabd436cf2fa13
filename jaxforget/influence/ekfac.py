"""EK-FAC: the Fisher matrix of every dense kernel in the eigenbasis of two small factors. score = g_k^T F^-1 g_q,

    F = (Q_A x Q_S) (Lambda + lambda) (Q_A x Q_S)^T,    Lambda = mean over examples of (Q_A^T h Q_S)^2,

with Q_A the eigenvectors of the mean of a a^T, of what comes into the kernel, Q_S those of b b^T, of the gradient at
what comes out, and h the gradient of an example's mean loss a token. Other parameters (norms, biases, tables, kernels
that are too wide) have the diagonal of F. Sources: arXiv 1806.03884; for influence, arXiv 2308.03296, with lambda 0.1
times the mean of Lambda. Labels are drawn from the model, as there, by `question.drawn`. Without it they are those of
the data: F is then the empirical Fisher, as in fisher.py, without its products between layers.
Shapes: B examples of a microbatch, D and F inputs and outputs of a kernel, M positions of a batch, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxforget import checks
from jaxforget.data.tokens import Examples, concatenate
from jaxforget.errors import UserError
from jaxforget.influence import gradients
from jaxforget.influence.gradients import Point
from jaxforget.influence.question import Answer, Question
from jaxforget.models.layers import Tapped
from jaxforget.models.sharding import host
from jaxforget.training.step import Objective, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class EKFAC:
    """Needs a model that is made of the operations of models/layers.py."""

    damping: float = 0.1
    """lambda, as a multiple of the mean of Lambda over a kernel, each layer by itself."""
    fisher_examples: int = 256
    """Training examples of F, drawn at random; 0: all of them."""
    widest: int = 4096
    """Kernels with more inputs or outputs have the diagonal alone; their factors would be too large."""
    microbatch: int = 8
    """Examples differentiated at a time, with a gradient each on the device."""
    examples: bool = False
    """Also score single examples, by forward-mode derivatives along F^-1 g_q."""

    def answer(self, question: Question) -> Answer:
        checks.positive(damping=self.damping)
        checks.at_least(0, fisher_examples=self.fisher_examples)
        at, (train, _) = gradients.point(question), gradients.sets(question)
        batch = gradients.sample(concatenate(list(train.values())), self.fisher_examples, question.seed)
        leaves, treedef = jax.tree.flatten(at.model)
        objective = question.drawn or question.objective
        kinds = _kinds(objective, at, batch, self.widest)
        spec = Spec(self.microbatch)
        zeros = [_zero_factors(leaf, kind) for leaf, kind in zip(leaves, kinds, strict=True)]
        factors, _ = gradients.sweep(_add_factors(objective, spec), zeros, at, batch, self.microbatch)
        bases = [_eigenvectors(one) for one in factors]
        zeros = [jnp.zeros_like(leaf) for leaf in leaves]
        squares, _ = gradients.sweep(_add_squares(objective), zeros, (at, bases), batch, self.microbatch)
        wanted_Q = gradients.query_gradients(question, at, self.microbatch)
        parts = zip(jax.tree.leaves(wanted_Q), squares, bases, kinds, strict=True)
        direction_Q = treedef.unflatten([self._divide(*part, len(batch)) for part in parts])
        spent = (1 + 3 + 3) * gradients.tokens(batch)
        return gradients.along(question, direction_Q, self.microbatch, self.examples, at=at, spent=spent)

    def _divide(
        self, wanted_Q: np.ndarray, square: jax.Array, basis: tuple[jax.Array, jax.Array] | None, kind: Kind, count: int
    ) -> np.ndarray:
        """Return (F + lambda)^-1 g_q for one leaf; 0 where no example has a gradient."""
        eigenvalue = np.asarray(host(square), np.float64) / count
        damping = self.damping * eigenvalue.mean(axis=tuple(range(kind.lead, eigenvalue.ndim)), keepdims=True)
        inverse = np.where(damping > 0, 1.0 / np.where(damping > 0, eigenvalue + damping, 1.0), 0.0)
        turned_Q = host(_turn(jnp.asarray(wanted_Q), basis)) * inverse[None].astype(wanted_Q.dtype)
        back = basis and tuple(jnp.swapaxes(one, -1, -2) for one in basis)
        return host(_turn(jnp.asarray(turned_Q), back))


# ----------------------------------------------------------------------------------------------- factors
class Kind(NamedTuple):
    """What a leaf is: how many leading axes of layers it has, and whether its F has two factors."""

    lead: int
    factored: bool


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a parameter tells in the backward pass, see layers.Tapped. seen: only which uses it has."""

    rows: int
    seen: Callable[[str, tuple[int, ...]], None] | None = None

    def rule(self, use: str, a: jax.Array, b: jax.Array, shape: tuple[int, ...]) -> PyTree:
        if self.seen is not None:
            self.seen(use, shape)
            return jnp.zeros(shape, jnp.float32)
        # Padding has no gradient, and what comes in there is not to count.
        a = jnp.where(jnp.any(b != 0, axis=-1, keepdims=True), a, 0)
        return _second_moment(a), _second_moment(b)


def _second_moment(x_MD):
    dtype = jnp.promote_types(x_MD.dtype, jnp.float32)
    return jnp.einsum("md,me->de", x_MD, x_MD, preferred_element_type=dtype, precision="highest")


def _kinds(objective: Objective, at: Point, examples: Examples, widest: int) -> list[Kind]:
    """Trace one row to see the uses of every leaf. Raises UserError where a leaf is met by something else."""
    leaves, treedef = jax.tree.flatten(at.model)
    uses: list[list] = [[] for _ in leaves]
    batch = jax.tree.map(lambda x: x[0], next(gradients.chunks(examples, 1, 1))[0])

    def run(leaves):
        def losses(taps):
            specs = [Spec(1, lambda *use, one=one: one.append(use)) for one in uses]
            model = treedef.unflatten(map(Tapped, leaves, taps, specs))
            return jnp.sum(objective({**at.rest, "model": model}, batch, at.key))

        return jax.grad(losses)([jnp.zeros(leaf.shape, jnp.float32) for leaf in leaves])

    try:
        jax.eval_shape(run, leaves)
    except (TypeError, AttributeError, ValueError) as error:
        raise UserError("EK-FAC: something besides the operations of models/layers.py reads a parameter "
                        f"({str(error).splitlines()[0]})") from error  # fmt: skip
    kinds = []
    for leaf, seen in zip(leaves, uses, strict=True):
        lead = leaf.ndim - len(seen[0][1]) if seen else 0
        product = bool(seen) and all(use == "product" for use, _ in seen)
        kinds.append(Kind(lead, product and max(leaf.shape[lead:]) <= widest))
    return kinds


def _zero_factors(leaf: jax.Array, kind: Kind) -> tuple[jax.Array, jax.Array] | None:
    if not kind.factored:
        return None
    lead, (D, F) = leaf.shape[: kind.lead], leaf.shape[kind.lead :]
    return jnp.zeros((*lead, D, D), leaf.dtype), jnp.zeros((*lead, F, F), leaf.dtype)


@functools.cache
def _add_factors(objective: Objective, spec: Spec) -> gradients.Visit:
    def visit(factors, at, batch):
        leaves, treedef = jax.tree.flatten(at.model)

        def total(taps):
            tapped = [leaf if tap is None else Tapped(leaf, tap, spec) for leaf, tap in zip(leaves, taps, strict=True)]
            losses_B = objective({**at.rest, "model": treedef.unflatten(tapped)}, batch, at.key)
            return jnp.sum(jnp.where(batch["weight"] > 0, losses_B, 0.0))

        found = jax.grad(total)(jax.tree.map(jnp.zeros_like, factors))
        return jax.tree.map(jnp.add, factors, found), ()

    return visit


def _eigenvectors(factors):
    """Return Q_A and Q_S, or None for a leaf without factors."""
    if factors is None:
        return None
    return tuple(jnp.asarray(np.linalg.eigh(np.asarray(host(one), np.float64))[1], one.dtype) for one in factors)


@functools.cache
def _add_squares(objective):
    def visit(total, args, batch):
        at, bases = args
        _, grads_B = gradients.per_example(objective, at, batch)
        real_B = batch["weight"] > 0

        def square(x_B, basis):
            real = real_B.reshape(-1, *(1,) * (x_B.ndim - 1))
            return jnp.sum(jnp.where(real, jnp.square(_turn(x_B, basis)), 0.0), axis=0)

        leaves_B = jax.tree.leaves(grads_B)
        return [old + square(x, basis) for old, x, basis in zip(total, leaves_B, bases, strict=True)], ()

    return visit


def _turn(x_B, basis):
    """Return Q_A^T x Q_S for a stack of gradients of a leaf; x itself where it has no basis."""
    if basis is None:
        return x_B
    a, b = basis
    return jnp.matmul(jnp.matmul(jnp.swapaxes(a, -1, -2)[None], x_B, precision="highest"), b[None], precision="highest")
