"""Batches of privacy units, drawn as the mechanism that is accounted for says.

Whether a unit takes part in a step is a function of (seed, unit, step) alone for the Poisson sampler: adding or
removing a unit changes no other draw. SplitMix64 is not a cryptographic source, and who knows the seed knows the draws:
the guarantee needs the seed, like the noise key, to stay with whoever trains.
Letters: N units, U units of a physical batch, k rows of a unit, B = U k rows, S steps, T steps of the run.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from jaxforget import checks
from jaxforget.data.sampling import hash64, id_keys, order
from jaxforget.data.tokens import Examples
from jaxforget.errors import UserError
from jaxforget.privacy.accounting import Mechanism
from jaxforget.training.batches import stack_steps

# What a hash is for: an example's randomness, a unit's participation, its part of the data.
DRAW, CHOICE, PART = 0x44524157, 0x43484F49, 0x50415254


def unit_keys(examples: Examples) -> np.ndarray:
    """Name the unit of every example, uint64 (rows,): column `unit`, else the example itself."""
    return examples.columns.get("unit", examples.columns["key"])


def with_units(examples: Examples, ids: set[str], unit_of: dict[str, str]) -> Examples:
    """Say which record every example belongs to: its chunks and its counterfactual are one unit of privacy."""
    own = (identity for identity in examples.ids if identity in ids and unit_of.get(identity, identity) == identity)
    if clash := next((identity for identity in own if identity.rpartition("#")[0] in ids), None):
        raise UserError(f"record id {clash!r} could be a chunk of another record; give records other ids, as their "
                        "chunks would be protected apart")  # fmt: skip
    whole = [identity if identity in ids else identity.rpartition("#")[0] for identity in examples.ids]  # not a chunk
    unit_N = id_keys([unit_of.get(identity, identity) for identity in whole])
    return dataclasses.replace(examples, columns={**examples.columns, "unit": unit_N})


def population(examples: Examples) -> int:
    """Count the units, N."""
    return len(np.unique(unit_keys(examples)))


@dataclasses.dataclass(frozen=True, eq=False)
class PoissonBatches:
    """Batches of one set of examples by the sampler of `mechanism`, with the interface of training.batches.Batches.

    A batch has a fixed number of rows: the largest draw of the whole run, or `at_least` units, which gives runs side by
    side one shape, rounded up to whole micro-batches of `microbatch` units. The rows of a unit stand together, real
    units first. Columns as Batches gives; `weight_B` is 1 for a real row and 0 for padding, which repeats a real row,
    inside a unit or as a unit of its own. A step may draw nothing: then all weights are 0. Draws, and so the number of
    rows, are not private (the guarantee is about models).
    """

    examples: Examples
    mechanism: Mechanism
    seed: int
    microbatch: int = 1
    at_least: int = 1

    def __post_init__(self):
        if not len(self.examples):
            raise UserError("a training set is empty after tokenisation; give it records with scored tokens")
        checks.at_least(1, microbatch=self.microbatch)

    @functools.cached_property
    def _units(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the units' keys (N,), sorted; their examples (N, k), padded with the first; what is real (N, k)."""
        unit_R = unit_keys(self.examples)
        row_R = np.lexsort((self.examples.columns["key"], unit_R))
        key_N, first_N, size_N = np.unique(unit_R[row_R], return_index=True, return_counts=True)
        place_k = np.arange(size_N.max())
        real_Nk = place_k[None] < size_N[:, None]
        return key_N, row_R[first_N[:, None] + np.where(real_Nk, place_k[None], 0)], real_Nk

    @functools.cached_property
    def draws(self) -> list[np.ndarray]:
        """List the units of every step, as indices of the sorted unit keys; kept, T B numbers in all."""
        how, key_N = self.mechanism, self._units[0]
        if how.sampler == "shuffle":
            orders = [order(key_N, self.seed, epoch) for epoch in range(how.epochs)]
            places = [divmod(step, how.steps_per_epoch) for step in range(how.steps)]
            return [orders[epoch][place * how.batch : (place + 1) * how.batch] for epoch, place in places]
        mixed_N = hash64(self.seed, CHOICE, key_N)
        if how.sampler == "cyclic":
            part_N = hash64(self.seed, PART, key_N) % np.uint64(how.bands)
            return [self._draw(hash64(mixed_N, step), part_N == step % how.bands) for step in range(how.steps)]
        return [self._draw(hash64(mixed_N, step)) for step in range(how.steps)]

    def _draw(self, hash_N: np.ndarray, among_N: np.ndarray | bool = True) -> np.ndarray:
        """Choose units by uniform numbers of 53 bits, which are independent as far as the hash mixes."""
        how, uniform_N = self.mechanism, (hash_N >> np.uint64(11)) * 2.0**-53
        if how.sampler == "fixed":
            size = min(how.batch, len(uniform_N))
            chosen = np.argpartition(uniform_N, size - 1)[:size]
        else:
            chosen = np.flatnonzero(among_N & (uniform_N < how.q * how.bands))
        chosen = chosen[np.argsort(uniform_N[chosen], kind="stable")]  # a random order, so that a cap cuts at random
        return chosen[: how.cap]

    @functools.cached_property
    def _tokens(self) -> np.ndarray:
        """Count real tokens before every step, (T + 1,)."""
        _, row_Nk, real_Nk = self._units
        length_N = (self.examples.lengths[row_Nk] * real_Nk).sum(axis=1, dtype=np.int64)
        return np.cumsum([0, *(length_N[chosen].sum() for chosen in self.draws)])

    @property
    def members(self) -> int:
        """Rows of a unit, k."""
        return self._units[1].shape[1]

    @functools.cached_property
    def units(self) -> int:
        """Units of a physical batch, U."""
        most = max(len(chosen) for chosen in self.draws)
        return -(-max(most, self.at_least) // self.microbatch) * self.microbatch

    @property
    def steps(self) -> int:
        return self.mechanism.steps

    @property
    def steps_per_epoch(self) -> int:
        return self.mechanism.steps_per_epoch

    @property
    def tokens(self) -> int:
        """Real tokens of the whole run, counted once per visit."""
        return self.tokens_until(self.steps)

    @property
    def mean_length(self) -> float:
        """Mean real tokens of an example."""
        return float(self.examples.lengths.mean())

    def tokens_until(self, steps: int) -> int:
        """Real tokens that the first `steps` batches hold."""
        return int(self._tokens[steps])

    def count(self, start: int, stop: int) -> int:
        """Say how many of the steps start..stop-1 are to be run: all of them."""
        return stop - start

    def take(self, start: int, stop: int, size: int) -> dict[str, np.ndarray]:
        """Stack steps start..stop-1; steps beyond, up to `size`, repeat the last one and are not to be run."""
        return stack_steps([self._batch(step) for step in range(start, stop)], size)

    def _batch(self, step: int) -> dict[str, np.ndarray]:
        chosen, (_, row_Nk, real_Nk) = self.draws[step], self._units
        filled_U = np.pad(chosen, (0, self.units - len(chosen)), constant_values=chosen[0] if len(chosen) else 0)
        row_B = row_Nk[filled_U].ravel()
        batch = {name: column[row_B] for name, column in self.examples.columns.items() if name != "unit"}
        real_Uk = real_Nk[filled_U] & (np.arange(self.units) < len(chosen))[:, None]
        batch["weight"] = real_Uk.ravel().astype(np.float32)
        batch["draw"] = (hash64(self.seed, step, batch["key"], DRAW) >> np.uint64(32)).astype(np.uint32)
        batch["key"] = batch["key"].astype(np.uint32)
        batch.setdefault("stream", np.zeros(len(row_B), np.int32))  # an objective may tell streams apart by columns
        batch.setdefault("factor", np.ones(len(row_B), np.float32))
        return batch
