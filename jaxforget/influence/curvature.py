"""Influence functions: score = g_k^T H^-1 g_q, with H the Hessian of the mean training loss a token.

One Newton step of ascent on a dataset. H is only met in products with vectors, the derivative of a gradient along them.
LiSSA sums a Neumann series; Arnoldi inverts H on the eigenvectors that matter. Sources: arXiv 1703.04730 (influence
functions, LiSSA); arXiv 2112.03052 (Arnoldi); both as google-research/jax-influence has them. arXiv 2401.15241 states
10 iterations of LiSSA and 25 iterations with 25 eigenvectors of Arnoldi, 256 examples each, and not scale or damping.
K datasets, Q queries, I iterations, E eigenvectors, P parameters; g_k, g_q: gradients of the mean loss a token.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxforget import checks
from jaxforget.data.tokens import Examples, concatenate
from jaxforget.influence import gradients
from jaxforget.influence.gradients import Point
from jaxforget.influence.question import Answer, Question
from jaxforget.models.sharding import host
from jaxforget.training.step import Objective, PyTree

START = 0x41524E  # what the key of Arnoldi's vectors is folded with
POWER = 10  # iterations of Arnoldi that find the largest eigenvalue
NOISE = 64  # eigenvalues and remainders below this many units of rounding, against the largest, are 0



def hessian_product(objective: Objective, at: Point, examples: Examples, vector_Q: PyTree, microbatch: int) -> PyTree:
    """Return H v for a stack of vectors, on the device; H of the mean loss a token over the examples."""
    zero_Q = jax.tree.map(jnp.zeros_like, vector_Q)
    total_Q, _ = gradients.sweep(_add_product(objective), zero_Q, (at, vector_Q), examples, microbatch)
    scale = 1.0 / float(gradients.weights(examples).sum())
    return jax.tree.map(lambda x: x * scale, total_Q)


@functools.cache
def _add_product(objective):
    def visit(total_Q, args, batch):
        at, vector_Q = args
        gradient = jax.grad(lambda model: gradients.weighted_loss(objective, model, at, batch))

        def product(vector):  # linearising once for all vectors takes more memory, and on a CPU no less time
            return jax.jvp(gradient, (at.model,), (vector,))[1]

        return jax.tree.map(jnp.add, total_Q, gradients.each(product, vector_Q)), ()

    return visit


@dataclasses.dataclass(frozen=True, kw_only=True)
class LiSSA:
    """u <- g_q + (1 - damping) u - H u / scale, again and again; score = <g_k, u> / scale.

    The limit is (H + damping * scale)^-1 g_q. There is one if all eigenvalues of H / scale + damping are between 0
    and 2; the notes say where the recursion did not get there.
    """

    iterations: int = 10
    """Steps of the recursion; 10 leave out most of what H does to directions of small curvature."""
    damping: float = 1e-3
    """Added to every eigenvalue, times the scale."""
    scale: float = 0.0
    """Above half of the largest eigenvalue of H, or the recursion diverges; 0: that eigenvalue, found by Arnoldi."""
    hessian_examples: int = 256
    """Training examples of H, drawn anew at every iteration; 0: all of them."""
    normalise: bool = False
    """Divide the gradients of datasets by their lengths, as arXiv 2401.15241 does."""
    microbatch: int = 8
    """Examples differentiated at a time."""
    examples: bool = False
    """Also score single examples, by forward-mode derivatives along u."""

    def answer(self, question: Question) -> Answer:
        checks.at_least(1, iterations=self.iterations)
        checks.at_least(0, damping=self.damping, scale=self.scale, hessian_examples=self.hessian_examples)
        at, (train, _) = gradients.point(question), gradients.sets(question)
        together = concatenate(list(train.values()))
        size = gradients.tokens(together) * min(1.0, (self.hessian_examples or len(together)) / len(together))
        scale, spent = self.scale, 9.0 * self.iterations * size * len(question.queries)
        if not scale:
            batch = gradients.sample(together, self.hessian_examples, question.seed)
            _, hessenberg = krylov(question.objective, at, batch, POWER, self.microbatch)
            scale, spent = float(np.abs(_eigen(hessenberg)[0]).max()), spent + 9.0 * POWER * size
        wanted = gradients.query_gradients(question, at, self.microbatch)
        found, changes = [], []
        for start in range(0, len(question.queries), gradients.QUERIES):
            v_Q = gradients.some(wanted, start, at.model)
            u_Q, change_IQ = jax.tree.map(jnp.copy, v_Q), []
            for i in range(self.iterations):
                batch = gradients.sample(together, self.hessian_examples, question.seed, i)
                product_Q = hessian_product(question.objective, at, batch, u_Q, self.microbatch)
                u_Q, change_Q = _recur(u_Q, v_Q, product_Q, self.damping, scale)
                change_IQ.append(change_Q)
            found.append(jax.tree.map(lambda x: host(x) / scale, u_Q))
            changes.append(np.stack(change_IQ))
        direction_Q = jax.tree.map(lambda *part: np.concatenate(part), *found)
        all_IQ = np.concatenate(changes, axis=1).astype(np.float64)
        notes = _unsettled(all_IQ, list(question.queries))
        curves = {"change": all_IQ, "scale": np.array([scale])}
        return _answer(self, question, at, direction_Q, spent=spent, curves=curves, notes=notes)


@functools.partial(jax.jit, donate_argnums=0)
def _recur(u_Q, v_Q, product_Q, damping, scale):
    """Return the next u and the length of its change relative to that of v, (Q,)."""
    new_Q = jax.tree.map(lambda u, v, p: v + (1 - damping) * u - p / scale, u_Q, v_Q, product_Q)
    change_Q = _lengths(jax.tree.map(jnp.subtract, new_Q, u_Q))
    return new_Q, change_Q / _lengths(v_Q)


def _lengths(tree_Q):
    return jnp.sqrt(sum(jnp.sum(jnp.square(x), axis=range(1, x.ndim)) for x in jax.tree.leaves(tree_Q)))


def _unsettled(change_IQ: np.ndarray, names: list[str]) -> tuple[str, ...]:
    with np.errstate(invalid="ignore"):
        grew_Q = ~(change_IQ[-1] <= change_IQ[0])  # also where not finite
        moves_Q = ~grew_Q & (change_IQ[-1] > 0.1)
    notes = []
    if grew_Q.any():
        which = ", ".join(name for name, grew in zip(names, grew_Q, strict=True) if grew)
        notes.append(f"LiSSA diverged for {which}: an eigenvalue of H / scale + damping is not between 0 and 2; these "
                     "scores mean nothing; raise damping, or scale")  # fmt: skip
    if moves_Q.any():
        notes.append(f"LiSSA has not converged: the last of {len(change_IQ)} updates is up to "
                     f"{change_IQ[-1, moves_Q].max():.2g} as long as the gradient; take more iterations")  # fmt: skip
    return tuple(notes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arnoldi:
    """score = sum over eigenvectors e of H of <g_k, e> <e, g_q> / (lambda_e + damping).

    The eigenvectors of a Krylov space: I vectors as large as the parameters are on the device.
    """

    iterations: int = 25
    """Dimension of the Krylov space: products with H."""
    eigenvectors: int = 25
    """Largest by magnitude that are kept."""
    damping: float = 0.0
    """Added to every eigenvalue."""
    hessian_examples: int = 256
    """Training examples of H, the same at every iteration, or H would not be symmetric; 0: all of them."""
    normalise: bool = False
    """Divide the gradients of datasets by their lengths, as arXiv 2401.15241 does."""
    microbatch: int = 8
    """Examples differentiated at a time."""
    examples: bool = False
    """Also score single examples, by forward-mode derivatives along H^-1 g_q."""

    def answer(self, question: Question) -> Answer:
        checks.at_least(1, iterations=self.iterations, eigenvectors=self.eigenvectors)
        checks.at_least(0, damping=self.damping, hessian_examples=self.hessian_examples)
        at, (train, _) = gradients.point(question), gradients.sets(question)
        batch = gradients.sample(concatenate(list(train.values())), self.hessian_examples, question.seed)
        basis_IP, hessenberg = krylov(question.objective, at, batch, self.iterations, self.microbatch)
        value_I, vector_II = _eigen(hessenberg)
        rounding = NOISE * np.finfo(hessenberg.dtype).eps * np.abs(value_I).max()
        kept = [i for i in np.argsort(-np.abs(value_I))[: self.eigenvectors] if abs(value_I[i]) > rounding]
        value_E, vector_IE = value_I[kept], vector_II[:, kept]
        inverse_II = vector_IE / (value_E + self.damping) @ vector_IE.T
        wanted_Q, unravel = gradients.query_gradients(question, at, self.microbatch), ravel_pytree(at.model)[1]
        found = []
        for q in range(len(question.queries)):
            wanted_P = jnp.concatenate([leaf[q].reshape(-1) for leaf in jax.tree.leaves(wanted_Q)])
            weight_I = inverse_II @ np.asarray(host(_inside(basis_IP, wanted_P)), np.float64)
            found.append(host(unravel(_combined(basis_IP, weight_I.astype(basis_IP.dtype)))))
        negative = int((value_E < 0).sum())
        notes = () if not negative else (
            f"{negative} of {len(value_E)} eigenvalues are negative: the parameters are no minimum of the loss of "
            f"these {len(batch)} examples",
        )  # fmt: skip
        spent = 9.0 * self.iterations * gradients.tokens(batch)
        curves = {"eigenvalues": value_E}
        return _answer(self, question, at, gradients.stack(found), spent=spent, curves=curves, notes=notes)


def krylov(
    objective: Objective, at: Point, examples: Examples, iterations: int, microbatch: int
) -> tuple[jax.Array, jax.Array]:
    """Return an orthonormal basis (I, P) of the space of products with H, and H in it with its next row (I + 1, I)."""
    flat_P, unravel = ravel_pytree(at.model)
    key = jax.random.fold_in(at.key, START)
    first_P = jax.random.normal(key, flat_P.shape, flat_P.dtype)
    basis_IP = jnp.zeros((iterations, flat_P.size), flat_P.dtype).at[0].set(first_P / jnp.linalg.norm(first_P))
    hessenberg = jnp.zeros((iterations + 1, iterations), flat_P.dtype)
    for i in range(iterations):
        vector_1 = jax.tree.map(lambda x: x[None], unravel(basis_IP[i]))
        product_1 = hessian_product(objective, at, examples, vector_1, microbatch)
        basis_IP, hessenberg = _extend(basis_IP, hessenberg, product_1, key, i)
    return basis_IP, hessenberg


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _extend(basis_IP, hessenberg, product_1, key, i):
    """Add the part of H b_i that is orthogonal to all b so far. What is added beyond the last row is dropped."""
    product_P = ravel_pytree(jax.tree.map(lambda x: x[0], product_1))[0]
    unit_P, column_I, length = _orthogonal(basis_IP, product_P)
    # Where nothing is left H maps the space to itself, and says nothing of the rest: go on there from a new vector.
    # If that leaves nothing either, the b are a whole basis, and all further vectors are 0.

    def new():
        drawn_P = jax.random.normal(jax.random.fold_in(key, i), unit_P.shape, unit_P.dtype)
        return _orthogonal(basis_IP, drawn_P)[0]

    unit_P = jax.lax.cond(length > 0, lambda: unit_P, new)
    column = jnp.append(column_I, 0.0).at[i + 1].set(length)
    return basis_IP.at[i + 1].set(unit_P, mode="drop"), hessenberg.at[:, i].set(column)


def _orthogonal(basis_IP, vector_P):
    """Return the direction of what a vector has outside of a basis, its coordinates inside, and the length outside.

    Direction and length are 0 where only rounding is left.
    """
    before, column_I = jnp.linalg.norm(vector_P), 0.0
    for _ in range(2):  # once leaves rounding behind, twice is enough
        part_I = _inside(basis_IP, vector_P)
        vector_P = vector_P - _combined(basis_IP, part_I)
        column_I = column_I + part_I
    length = jnp.linalg.norm(vector_P)
    length = jnp.where(length > NOISE * jnp.finfo(length.dtype).eps * before, length, 0.0)
    return jnp.where(length > 0, vector_P / jnp.where(length > 0, length, 1.0), 0.0), column_I, length


def _inside(basis_IP, vector_P):
    return jnp.matmul(basis_IP, vector_P, precision="highest")


def _combined(basis_IP, weight_I):
    return jnp.matmul(weight_I, basis_IP, precision="highest")


def _eigen(hessenberg: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    small = np.asarray(hessenberg, np.float64)[:-1]
    return np.linalg.eigh((small + small.T) / 2)


def _answer(config: Any, question: Question, at: Point, direction_Q: PyTree, **rest: Any) -> Answer:
    found = gradients.along(question, direction_Q, config.microbatch, config.examples, at=at, **rest)
    if not config.normalise:
        return found
    named, _ = gradients.sets(question)
    norm_K = gradients.norms(gradients.gradients(question.objective, at, named, config.microbatch))
    parts = {name: part / norm for (name, part), norm in zip((found.examples or {}).items(), norm_K, strict=False)}
    cost = found.forward_tokens + 3.0 * gradients.tokens(*named.values())
    return dataclasses.replace(
        found, scores_KQ=found.scores_KQ / norm_K[:, None], examples=parts or None, forward_tokens=cost
    )
