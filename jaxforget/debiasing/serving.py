"""Requests that choose their modules: one batch, every row its own set of modules, one compiled program.

Rows are sorted by set into buckets of a few rows; a loop with as many turns as there are full buckets picks the merged
weights of each. Whatever the mix, nothing is compiled again, no row is dropped, and at most one bucket a set is partly
padding. Measured against other ways in benchmarks/modular_debiasing.py. Shapes: B rows, S slots of merged weights, G
buckets, R rows of a bucket, C classes.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxforget.debiasing.composition import merged, warnings
from jaxforget.debiasing.modules import Module, check_base
from jaxforget.errors import UserError
from jaxforget.models import Model
from jaxforget.models.adapters import digest
from jaxforget.models.model import Params
from jaxforget.models.sharding import host


class Modular:
    """A model and its modules, with the merged weights of the sets used last on the device; a class, to keep them.

    how: composition of several modules. slots: merged sets kept, and most sets of a batch; the base has one besides.
    rows: of a bucket. tell: gets what may go wrong when modules are on together, once a set.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        modules: Mapping[str, Module],
        *,
        how: str = "sum",
        slots: int = 8,
        rows: int = 16,
        tell: Callable[[str], None] = lambda message: None,
    ):
        """Raises UserError for a module of another base."""
        sha256 = digest(params)
        for name, module in modules.items():
            check_base(module, sha256, name)
        self.model, self.modules, self.how, self.rows, self.tell = model, dict(modules), how, rows, tell
        self._host = host(params)
        self.base = jax.tree.map(jnp.asarray, params)
        self._slots: OrderedDict[tuple[str, ...], int] = OrderedDict()  # the one used last stands last
        self._count = slots
        self._stack = jax.tree.map(lambda x: jnp.stack([x] * (slots + 1)), self.base)  # slot 0: the base

    def names(self, names: Collection[str]) -> tuple[str, ...]:
        """Return a set of names in order, with those that they require, such as the task's own module.

        Raises UserError for one that is not known: never the base in its place.
        """
        names = {names} if isinstance(names, str) else set(names)
        for name in names & set(self.modules):
            names = names.union(self.modules[name].about.get("requires", ()))
        if unknown := sorted(names - set(self.modules)):
            raise UserError(f"unknown module {unknown[0]!r}; loaded are {', '.join(sorted(self.modules)) or 'none'}")
        return tuple(sorted(names))

    def params(self, names: Collection[str] = ()) -> Params:
        """Return the weights with these modules on; with none the base itself, bit for bit."""
        names = self.names(names)
        if not names:
            return self.base
        slot = self._slot(names, ())
        return jax.tree.map(lambda x: x[slot], self._stack)

    def logits(self, batch: Mapping[str, Any], names: Collection[str] = ()) -> jax.Array:
        """Return class logits (B, C) of a batch whose rows have the same modules on."""
        names = self.names(names)
        slot = self._slot(names, ()) if names else 0  # first: merging replaces the stack
        return _one(self.model)(self._stack, slot, dict(batch))

    def mixed(self, batch: Mapping[str, Any], names_B: Sequence[Collection[str]]) -> jax.Array:
        """Return class logits (B, C); row b has the modules names_B[b] on. Raises UserError for too many sets."""
        rows = len(next(iter(batch.values())))
        if len(names_B) != rows:
            raise UserError(f"the batch has {rows} rows and {len(names_B)} sets of modules")
        sets_B = [self.names(names) for names in names_B]
        wanted = dict.fromkeys(names for names in sets_B if names)
        if len(wanted) > self._count:
            raise UserError(f"the batch has {len(wanted)} sets of modules and the server {self._count} slots")
        slot_of = {(): 0} | {names: self._slot(names, wanted) for names in wanted}
        slot_B = np.asarray([slot_of[names] for names in sets_B], np.int32)
        slot_G, row_GR, used, place_B = buckets(slot_B, self.rows, self._count + 1)
        return _mixed(self.model)(self._stack, dict(batch), slot_G, row_GR, used, place_B)

    def _slot(self, names: tuple[str, ...], kept: Collection[tuple[str, ...]]) -> int:
        """Return the slot of a set, merging it in place of the set unused for longest that is not among `kept`."""
        if names not in self._slots:
            chosen = {name: self.modules[name] for name in names}
            for message in warnings(chosen):
                self.tell(message)
            if len(self._slots) < self._count:
                slot = len(self._slots) + 1
            else:
                slot = self._slots.pop(next(old for old in self._slots if old not in kept))
            self._stack = _write(self._stack, merged(self._host, chosen, self.how), slot)
            self._slots[names] = slot
        self._slots.move_to_end(names)
        return self._slots[names]


def buckets(slot_B: np.ndarray, rows: int, slots: int) -> tuple[np.ndarray, np.ndarray, np.int32, np.ndarray]:
    """Sort rows into buckets of one slot each: (slot_G, row_GR, used, place_B).

    G is enough for any mix. Of the first `used` buckets, bucket g holds the rows row_GR[g]; padding repeats row 0.
    place_B: where row b's result stands among the G * R.
    """
    B = len(slot_B)
    G = B // rows + min(slots, B)
    slot_G, row_GR, place_B = np.zeros(G, np.int32), np.zeros((G, rows), np.int32), np.zeros(B, np.int32)
    used = 0
    for slot in np.unique(slot_B):
        mine = np.flatnonzero(slot_B == slot)
        for start in range(0, len(mine), rows):
            part = mine[start : start + rows]
            slot_G[used], row_GR[used, : len(part)] = slot, part
            place_B[part] = used * rows + np.arange(len(part))
            used += 1
    return slot_G, row_GR, np.int32(used), place_B


@functools.cache
def _one(model):
    return jax.jit(lambda stack_S, slot, batch: model.batch_logits(jax.tree.map(lambda x: x[slot], stack_S), batch))


@functools.cache
def _mixed(model):
    @jax.jit
    def run(stack_S, batch, slot_G, row_GR, used, place_B):
        def bucket(g):
            params = jax.tree.map(lambda x: x[slot_G[g]], stack_S)
            return model.batch_logits(params, {name: column[row_GR[g]] for name, column in batch.items()})

        shape = jax.eval_shape(bucket, 0)
        empty = jnp.zeros((len(slot_G), *shape.shape), shape.dtype)
        found = jax.lax.fori_loop(0, used, lambda g, all_: all_.at[g].set(bucket(g)), empty)
        return found.reshape(-1, *shape.shape[1:])[place_B]

    return run


@functools.partial(jax.jit, donate_argnums=0)
def _write(stack_S, params, slot):
    return jax.tree.map(lambda all_, one: all_.at[slot].set(one), stack_S, params)
