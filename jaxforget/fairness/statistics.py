"""What a derived predictor may look at: one code for all votes of an example, a cell of a table.

Shapes: N examples, K members, A groups, Y classes (2: label 0 and label 1), T cells of a statistic, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxforget.errors import UserError

MOST_MEMBERS = 16  # of "vector", whose cells double with every member


class Statistic(NamedTuple):
    """A table's index. Votes are 0 or 1, of any integer type; codes are int32, from 0 to cells - 1."""

    cells: Callable[[int], int]  # K -> T
    code: Callable[[jax.Array], jax.Array]  # votes_NK -> code_N, inside jit too
    decision: Callable[[int], np.ndarray]  # K -> decision_T, 0 or 1: what the plain majority vote makes of a cell
    names: Callable[[int], list[str]]  # K -> what a file calls the cells


def _count(votes_NK: jax.Array) -> jax.Array:
    return jnp.sum(jnp.asarray(votes_NK), axis=-1, dtype=jnp.int32)


def _majority(votes_NK: jax.Array) -> jax.Array:
    return (2 * _count(votes_NK) > votes_NK.shape[-1]).astype(jnp.int32)  # a tie is no majority: 0


def _vector(votes_NK: jax.Array) -> jax.Array:
    code_N = jnp.zeros(votes_NK.shape[:-1], jnp.int32)
    for k in range(votes_NK.shape[-1]):
        code_N = 2 * code_N + jnp.asarray(votes_NK)[..., k].astype(jnp.int32)
    return code_N


def _vector_cells(members: int) -> int:
    if members > MOST_MEMBERS:
        raise UserError(f"statistic vector has 2^{members} cells for {members} members; it takes at most "
                        f"{MOST_MEMBERS} members, use count")  # fmt: skip
    return 2**members


def votes_of_vector(members: int) -> np.ndarray:
    """Return the votes that each code of "vector" stands for, int32 (T, K): the first member is the highest bit."""
    return (np.arange(_vector_cells(members))[:, None] >> np.arange(members)[None, ::-1]) & 1


STATISTICS: dict[str, Statistic] = {
    "majority": Statistic(
        cells=lambda members: 2,
        code=_majority,
        decision=lambda members: np.arange(2),
        names=lambda members: ["0", "1"],
    ),
    "count": Statistic(
        cells=lambda members: members + 1,
        code=_count,
        decision=lambda members: (2 * np.arange(members + 1) > members).astype(int),
        names=lambda members: [str(count) for count in range(members + 1)],
    ),
    "vector": Statistic(
        cells=_vector_cells,
        code=_vector,
        decision=lambda members: (2 * votes_of_vector(members).sum(axis=1) > members).astype(int),
        names=lambda members: [format(code, f"0{members}b") for code in range(_vector_cells(members))],
    ),
}


def choose(name: str) -> Statistic:
    """Look up a statistic. Raises UserError listing the valid names."""
    if name not in STATISTICS:
        raise UserError(f"unknown statistic {name!r}; valid names are {', '.join(STATISTICS)}")
    return STATISTICS[name]


def default_statistic(members: int) -> str:
    """Return "vector" up to 3 members and "count" above: with more, vector fits the noise of its many small cells."""
    return "vector" if members <= 3 else "count"


def cell_counts(
    code_N: jax.Array,
    label_N: jax.Array,
    group_N: jax.Array,
    cells: int,
    groups: int,
    weight_N: jax.Array | None = None,
) -> jax.Array:
    """Count examples by group, label and code, count_AYT, in the default float type. Inside jit and vmap too.

    label_N: 0 or 1. group_N: 0 to groups - 1. Values out of range are not noticed here. weight_N: what an example
    counts for (default 1): how often a resample has it, or 0 to leave it out.
    """
    index_N = (jnp.asarray(group_N) * 2 + jnp.asarray(label_N)) * cells + jnp.asarray(code_N)
    count = jnp.zeros(groups * 2 * cells).at[index_N].add(1.0 if weight_N is None else jnp.asarray(weight_N))
    return count.reshape(groups, 2, cells)


def pooled(count_AYT: np.ndarray) -> np.ndarray:
    """Give groups that lack a class the distribution of all groups together, at their own size (at least 1)."""
    size_A11 = count_AYT.sum(axis=(1, 2), keepdims=True)
    all_1YT = count_AYT.sum(axis=0, keepdims=True) / size_A11.sum()
    lacking_A11 = (count_AYT.sum(axis=2, keepdims=True) == 0).any(axis=1, keepdims=True)
    return np.where(lacking_A11, np.maximum(size_A11, 1) * all_1YT, count_AYT)


def smoothed(count_AYT: np.ndarray, count_T: np.ndarray, smoothing: float) -> np.ndarray:
    """Replace a share `smoothing` of the labels of a cell by those of all cells of its group with the same count_T.

    count_T: the votes for 1 that a cell of "vector" stands for. Cells and classes keep their sizes. At 1 cells of one
    count have one likelihood ratio, so that nothing but the count is left to decide by.
    """
    count_AYC = np.stack([count_AYT[..., count_T == c].sum(axis=-1) for c in range(int(count_T.max()) + 1)], axis=-1)
    total_AT, total_AC = count_AYT.sum(axis=1), count_AYC.sum(axis=1)
    share_AT = total_AT / (total_AC + (total_AC == 0))[:, count_T]  # of the examples of the count; 0 if there are none
    return (1 - smoothing) * count_AYT + smoothing * count_AYC[..., count_T] * share_AT[:, None]


def resample_counts(count_AYT: np.ndarray, resamples: int, seed: int = 0) -> np.ndarray:
    """Draw bootstrap resamples of the counted examples, count_RAYT, float64.

    Stratified: every group and class keeps its number of examples, which must be whole; so no resample lacks one.
    The examples of a group and class differ by their code alone, so resampling them is one multinomial draw.
    """
    count_AYT = np.asarray(count_AYT, np.float64)
    size_AY = count_AYT.sum(axis=-1)
    share_AYT = count_AYT / np.maximum(size_AY, 1)[..., None]
    share_AYT[..., -1] += size_AY == 0  # a multinomial of nothing still needs shares
    rng = np.random.default_rng(seed)
    return rng.multinomial(size_AY.astype(np.int64), share_AYT, (resamples, *size_AY.shape)).astype(np.float64)
