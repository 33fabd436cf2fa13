"""What clipping and noise do to the gradients of groups of units, such as texts about men and about women.

For a group of U units with gradients g_u, bound C and c_u = min(1, C / |g_u|), each row of `subgroups` holds

    loss, unit_norm, clip_factor, clipped   means over units of l_u, |g_u|, c_u and [|g_u| > C]
    group_norm, clipped_norm                |sum g_u| / U and |sum c_u g_u| / U
    norm_to_other, clipped_to_other         the same, divided by those of all other groups together
    cosine                                  between sum g_u and sum c_u g_u
    share, clipped_share                    <G_g, G> / <G, G>, G_g = sum g_u (or sum c_u g_u) and G that of all groups
    snr                                     B |sum c_u g_u| / U / (sigma C sqrt(P)), a batch of B units of this group

P counts the parameters; snr is None without noise. Shapes: S batches, U units.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxforget.data.tokens import Examples
from jaxforget.privacy.clipping import Clipping, clipped_sum
from jaxforget.training.batches import Batches, Stream
from jaxforget.training.step import Batch, Losses, PyTree

NO_BOUND = 1e9  # cuts nothing


@functools.partial(jax.jit, static_argnums=(0, 4))
def _sums(
    losses: Losses, trainable: PyTree, batches_S: Batch, bound: jax.Array, how: Clipping
) -> tuple[PyTree, tuple[jax.Array, ...]]:
    """Sum clipped gradients over all batches; also returns norms, losses and which units are real, (S, U)."""

    def add(total, batch):
        found = clipped_sum(losses, trainable, batch, jax.random.key(0), bound, how)
        norm_U = jnp.sqrt(jnp.sum(jnp.square(found.norm_GU), axis=0))
        return jax.tree.map(jnp.add, total, found.total), (norm_U, found.loss_U, found.real_U)

    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trainable)
    return jax.lax.scan(add, zero, batches_S)


def subgroups(
    losses: Losses,
    trainable: PyTree,
    groups: dict[str, Examples],
    *,
    bound: float,
    noise_std: float,
    units: int,
    how: Clipping,
    microbatch: int,
) -> list[dict[str, Any]]:
    """Measure every group at one point of training; see above. Each example is a unit of its own.

    losses(trainable, batch, key) -> losses_B. noise_std: of the noise on a sum of clipped gradients, sigma C. units: of
    a batch in expectation, B. microbatch: units differentiated at a time.
    """
    found = {}
    for name, examples in groups.items():
        batches = Batches((Stream(examples, microbatch),), 1, 0)
        batches_S = batches.take(0, batches.steps, batches.steps)
        whole, (norm_SU, loss_SU, real_SU) = _sums(losses, trainable, batches_S, jnp.float32(NO_BOUND), how)
        cut, _ = _sums(losses, trainable, batches_S, jnp.float32(bound), how)
        real_SU = np.asarray(real_SU)
        norm_U, loss_U = (np.asarray(x, np.float64)[real_SU] for x in (norm_SU, loss_SU))
        found[name] = whole, cut, norm_U, loss_U
    size = math.sqrt(sum(leaf.size for leaf in jax.tree.leaves(trainable)))
    add = lambda trees: jax.tree.map(lambda *leaves: sum(leaves), *trees)  # noqa: E731
    norm = lambda tree: float(optax.tree.norm(tree))  # noqa: E731
    dot = lambda one, other: float(optax.tree.vdot(one, other))  # noqa: E731
    totals = [add([of[k] for of in found.values()]) for k in (0, 1)]
    rows = []
    for name, (whole, cut, norm_U, loss_U) in found.items():
        count, sums = len(norm_U), (norm(whole), norm(cut))
        others = [of for other, of in found.items() if other != name]
        per_unit = [norm(add([of[k] for of in others])) / sum(len(of[2]) for of in others) for k in (0, 1)]
        rows.append({
            "group": name, "units": count, "loss": loss_U.mean(), "unit_norm": norm_U.mean(),
            "clip_factor": np.minimum(1.0, bound / np.maximum(norm_U, 1e-30)).mean(),
            "clipped": (norm_U > bound).mean(), "group_norm": sums[0] / count, "clipped_norm": sums[1] / count,
            "norm_to_other": sums[0] / count / per_unit[0], "clipped_to_other": sums[1] / count / per_unit[1],
            "cosine": dot(whole, cut) / (sums[0] * sums[1]),
            "share": dot(whole, totals[0]) / dot(totals[0], totals[0]),
            "clipped_share": dot(cut, totals[1]) / dot(totals[1], totals[1]),
            "snr": units * sums[1] / count / (noise_std * size) if noise_std else None,
        })  # fmt: skip
    return rows
