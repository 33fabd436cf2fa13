"""Members: one step over a leading K axis. Shards, seeds, leave-one-out runs and learning rates are all members.

Shapes: K members, S steps of a chunk.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxforget.models import sharding
from jaxforget.training.batches import AnyBatches
from jaxforget.training.step import Parts, PyTree, Step

Members = Literal["auto", "map", "vmap"]


def stack(trees: Sequence[PyTree]) -> PyTree:
    """Join K pytrees of one structure: every leaf gains a leading K. What is on the host stays there."""
    return jax.tree.map(lambda *leaves: (np if isinstance(leaves[0], np.ndarray) else jnp).stack(leaves), *trees)


def join_parts(parts_K: Sequence[Parts]) -> tuple[tuple[str, ...], Parts]:
    """Join the parts that K members start from: one that is the same object for all is held once, others are stacked.

    Returns the names of those, `own` of `members`, and what its `init` takes.
    """
    first = parts_K[0]
    own = tuple(name for name, part in first.items() if any(parts[name] is not part for parts in parts_K))
    shared = {name: part for name, part in first.items() if name not in own}
    # A part under two names, such as a model that is its own reference, is one copy on the device.
    device = {key: sharding.place(part) for key, part in {id(one): one for one in shared.values()}.items()}
    stacked = {name: stack([parts[name] for parts in parts_K]) for name in own}
    return own, {name: device[id(part)] for name, part in shared.items()} | stacked


def member(tree_K: PyTree, k: int) -> PyTree:
    """Take one member out."""
    return jax.tree.map(lambda leaf: leaf[k], tree_K)


@functools.cache
def members(step: Step, how: Members = "auto", own: tuple[str, ...] = ()) -> Step:
    """Lift a step to K members: every leaf of state, batch and metrics gains a leading K; `frozen` is shared.

    own: parts that every member has for itself, such as the model it starts from; frozen or not, they have a leading K.
    map runs members one after the other inside one program and rounds exactly as separate runs do. vmap batches
    them, which fills an accelerator but may round differently. auto is map on a CPU and vmap elsewhere. `run` takes a
    count for every member; one with a count of 0 keeps its state, and under map costs nothing.
    """
    how = ("map" if jax.default_backend() == "cpu" else "vmap") if how == "auto" else how

    def split(frozen):
        mine = {name: part for name, part in frozen.items() if name in own}  # a part that moves is not among them
        return {name: part for name, part in frozen.items() if name not in own}, mine

    def init(key_K, parts):
        """Start K members; only their keys and what is their own differ."""
        shared, mine_K = split(parts)
        started = [step.init(key, {**shared, **member(mine_K, k)}) for k, key in enumerate(key_K)]
        states, frozen = zip(*started, strict=True)
        return stack(states), {**frozen[0], **stack([split(one)[1] for one in frozen])}

    def each(function, frozen, *args_K):
        shared, mine_K = split(frozen)

        def together(mine_K, shared):
            mine_K, args_K = mine_K
            if how == "vmap":
                return jax.vmap(lambda mine, args: function({**shared, **mine}, *args))(mine_K, args_K)
            return jax.lax.map(lambda one: function({**shared, **one[0]}, *one[1]), (mine_K, args_K))

        return sharding.apart(together, (mine_K, args_K), shared)

    def update(state_K, frozen, batch_K):
        return each(lambda frozen, state, batch: step.update(state, frozen, batch), frozen, state_K, batch_K)

    def run(state_K, frozen, batches_KS, count_K):
        # A member's whole chunk before the next member: under map its parameters stay in the cache.
        return each(lambda frozen, state, *rest: step.run(state, frozen, *rest), frozen, state_K, batches_KS, count_K)

    def combine(frozen, trainable_K, key=None):
        shared, mine_K = split(frozen)
        return jax.vmap(lambda mine, moving: step.combine({**shared, **mine}, moving, key))(mine_K, trainable_K)

    return Step(init, update, run, combine, own)


@dataclasses.dataclass(frozen=True, eq=False)
class MemberBatches:
    """The batches of K members side by side. None stands for a member that does not train; its rows are zeros.

    Members may have different numbers of steps. A member's batches are those it would have alone.
    """

    members: tuple[AnyBatches | None, ...]

    @property
    def active(self) -> list[AnyBatches]:
        """Give the members that train."""
        return [batches for batches in self.members if batches is not None]

    @property
    def steps(self) -> int:
        """Give the steps of the longest member."""
        return max(batches.steps for batches in self.active)

    @property
    def tokens(self) -> int:
        """Real tokens of the whole run, of all members."""
        return sum(batches.tokens for batches in self.active)

    def tokens_until(self, steps: int) -> int:
        """Real tokens that the first `steps` batches of every member hold."""
        return sum(batches.tokens_until(min(steps, batches.steps)) for batches in self.active)

    def count(self, start: int, stop: int) -> np.ndarray:
        """Say how many of the steps start..stop-1 each member has, int32 (K,)."""
        have_K = [0 if batches is None else batches.steps for batches in self.members]
        return np.clip(np.asarray(have_K, np.int32) - start, 0, stop - start).astype(np.int32)

    def take(self, start: int, stop: int, size: int) -> dict[str, np.ndarray]:
        """Stack the members' batches of those steps, (K, size, ...)."""
        parts = [
            batches.take(start, min(stop, batches.steps), size) if batches and batches.steps > start else None
            for batches in self.members
        ]
        like = next(part for part in parts if part is not None)
        blank = {name: np.zeros_like(column) for name, column in like.items()}
        return {name: np.stack([(part or blank)[name] for part in parts]) for name in like}
