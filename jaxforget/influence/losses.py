"""The loss of a set under many models: token sums, added in float64 on the host.

Shapes: K models, N examples, B batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxforget.data.sampling import hash64
from jaxforget.data.tokens import IGNORED, Examples
from jaxforget.models.sharding import host
from jaxforget.training.ensemble import Members
from jaxforget.training.step import Objective, PyTree


class SetLosses(NamedTuple):
    """What a set costs: the mean over the scored tokens of each example, and how many those are."""

    losses_KN: np.ndarray  # float64, nats; after ascent (S, M, N)
    tokens_N: np.ndarray

    @property
    def mean_K(self) -> np.ndarray:
        """Mean over the scored tokens of the set."""
        return self.losses_KN @ self.tokens_N / self.tokens_N.sum()


@functools.cache
def _program(objective: Objective, how: Members) -> Callable[..., jax.Array]:
    how = ("map" if jax.default_backend() == "cpu" else "vmap") if how == "auto" else how

    @jax.jit
    def losses_KB(model_K, batch):
        def one(model):
            return objective({"model": model}, batch, jax.random.key(0))

        return jax.vmap(one)(model_K) if how == "vmap" else jax.lax.map(one, model_K)

    return losses_KB


def set_losses(
    objective: Objective, model_K: PyTree, examples: Examples, *, rows: int = 32, how: Members = "auto"
) -> SetLosses:
    """Evaluate K models on a set, `rows` examples at a time.

    A row's loss does not see the others, so that `rows` changes rounding alone.
    """
    program, model_K = _program(objective, how), jax.tree.map(jnp.asarray, model_K)
    N = len(examples)
    rows = min(rows, N)
    columns = {
        **examples.columns,
        "key": examples.columns["key"].astype(np.uint32),
        "draw": (hash64(examples.columns["key"]) >> np.uint64(32)).astype(np.uint32),
        "factor": np.ones(N, np.float32), "weight": np.ones(N, np.float32), "stream": np.zeros(N, np.int32),
    }  # fmt: skip
    pending = []
    for start in range(0, N, rows):
        chosen = np.arange(start, start + rows).clip(max=N - 1)  # one shape; the tail repeats a row
        pending.append(program(model_K, {name: column[chosen] for name, column in columns.items()}))
    losses_KN = np.concatenate([np.asarray(part, np.float64) for part in host(pending)], axis=1)[:, :N]
    return SetLosses(losses_KN, (examples.columns["labels"] != IGNORED).sum(axis=1))
