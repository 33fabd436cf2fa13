"""TRAK: a kernel regression on randomly projected gradients (arXiv 2303.14186, equation 17).

    score of z for q = (1 - p_z) phi_z^T (Phi^T Phi + lambda)^-1 phi_q,    phi = R^T grad log(p / (1 - p))

Phi: phi of all training examples. p: exp of minus an example's loss, so of texts the geometric mean of the
probabilities of its tokens. A dataset's score and phi_q are means over examples, weighted by scored tokens.
R has independent signs, drawn leaf by leaf and block by block, and is never there as a whole.
N examples, B of a microbatch, P parameters, J dimensions of the projection, M models of an ensemble.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxforget import checks
from jaxforget.errors import UserError
from jaxforget.influence import gradients
from jaxforget.influence.question import Answer, Question
from jaxforget.training.step import Objective, PyTree

PROJECTION = 0x54524B  # what the key of R is folded with
ROWS = 1 << 14  # of R that exist at a time
WHOLE = 1 << 14  # most parameters that are not projected
CERTAIN = 1e-6  # the least 1 - p


@dataclasses.dataclass(frozen=True, kw_only=True)
class TRAK:
    """Scores of single examples come with those of datasets, which are their means over scored tokens."""

    dimension: int = 512
    """J, a multiple of 32; 0: gradients as they are, for tiny models."""
    damping: float = 0.1
    """lambda, as a multiple of the mean eigenvalue of Phi^T Phi; 0 needs more examples than dimensions."""
    ensemble: bool = False
    """Average over the checkpoints of the question instead of taking its parameters; kernel and 1 - p apart."""
    microbatch: int = 8
    """Examples differentiated at a time, with a gradient each on the device."""

    def answer(self, question: Question) -> Answer:
        self._check(question)
        train, queries = gradients.sets(question)
        models = [model for _, model in question.checkpoints] if self.ensemble else [None]
        kernel_M, doubt_M = [], []
        for m, model in enumerate(models):
            at = gradients.point(question, model)
            if not self.dimension and (size := sum(x.size for x in jax.tree.leaves(at.model))) > WHOLE:
                raise UserError(f"dimension is 0 and the model has {size} parameters; {WHOLE} is the most without a "
                                "projection")  # fmt: skip
            args = at, jax.random.fold_in(jax.random.fold_in(at.key, PROJECTION), m)
            visit = _features(question.objective, self.dimension)
            phi, doubt = {}, {}
            for name, examples in [*((("train", n), e) for n, e in train.items()), *queries.items()]:
                _, (found, doubt[name]) = gradients.sweep(visit, (), args, examples, self.microbatch)
                phi[name] = found.astype(np.float64)
            inner_JJ = sum(phi["train", name].T @ phi["train", name] for name in train)
            damping = self.damping * np.trace(inner_JJ) / len(inner_JJ)
            means_QJ = np.stack([np.average(phi[name], axis=0, weights=gradients.weights(queries[name]))
                                 for name in queries])  # fmt: skip
            solved_JQ = np.linalg.solve(inner_JJ + damping * np.eye(len(inner_JJ)), means_QJ.T)
            kernel_M.append({name: phi["train", name] @ solved_JQ for name in train})
            doubt_M.append({name: doubt["train", name].astype(np.float64) for name in train})
        parts = {}
        for name in train:
            doubt_N, kernel_NQ = (np.mean([one[name] for one in each], axis=0) for each in (doubt_M, kernel_M))
            parts[name] = doubt_N[:, None] * kernel_NQ
        scores_KQ = np.stack([np.average(part, axis=0, weights=gradients.weights(train[name]))
                              for name, part in parts.items()])  # fmt: skip
        cost = 3.0 * len(models) * gradients.tokens(*train.values(), *queries.values())
        return Answer(scores_KQ, parts, forward_tokens=cost)

    def _check(self, question: Question) -> None:
        if self.dimension < 0 or self.dimension % 32:
            raise UserError(f"dimension is {self.dimension}; it must be a multiple of 32, or 0")
        checks.at_least(0, damping=self.damping)
        if self.ensemble and not question.checkpoints:
            raise UserError("an ensemble of TRAK needs checkpoints; give some or leave ensemble out")


@functools.cache
def _features(objective: Objective, dimension: int) -> gradients.Visit:
    def visit(carry, args, batch):
        at, key = args
        loss_B, grads_B = gradients.per_example(objective, at, batch)
        doubt_B = jnp.maximum(-jnp.expm1(-loss_B), CERTAIN)
        # d log(p / (1 - p)) = -dl / (1 - p)
        return carry, (-project(grads_B, key, dimension) / doubt_B[:, None], doubt_B)

    return visit


def project(grads_B: PyTree, key: jax.Array, dimension: int) -> jax.Array:
    """Return gradients times R, (B, J); R has entries +-1 / sqrt(J), functions of the key and the shapes alone."""
    flat = [leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(grads_B)]
    if not dimension:
        return jnp.concatenate(flat, axis=1)
    total_BJ = jnp.zeros((), flat[0].dtype)
    for i, leaf_BP in enumerate(flat):
        rows = min(ROWS, leaf_BP.shape[1])
        blocks = -(-leaf_BP.shape[1] // rows)
        leaf_BP = jnp.pad(leaf_BP, ((0, 0), (0, blocks * rows - leaf_BP.shape[1])))

        def add(block, total_BJ, i=i, leaf_BP=leaf_BP, rows=rows):
            part_BR = jax.lax.dynamic_slice_in_dim(leaf_BP, block * rows, rows, axis=1)
            signs_RJ = _signs(jax.random.fold_in(jax.random.fold_in(key, i), block), rows, dimension)
            return total_BJ + jnp.matmul(part_BR, signs_RJ.astype(leaf_BP.dtype), precision="highest")

        zero_BJ = jnp.zeros((len(leaf_BP), dimension), leaf_BP.dtype)
        total_BJ = total_BJ + jax.lax.fori_loop(0, blocks, add, zero_BJ)
    return total_BJ / np.sqrt(dimension).astype(total_BJ.dtype)


def _signs(key: jax.Array, rows: int, dimension: int) -> jax.Array:
    """Draw +-1, (rows, dimension), int8: one random bit each."""
    words = jax.random.bits(key, (rows, dimension // 32, 1), jnp.uint32)
    bits = (words >> jnp.arange(32, dtype=jnp.uint32)[None, None]) & 1
    return 2 * bits.astype(jnp.int8).reshape(rows, dimension) - 1
