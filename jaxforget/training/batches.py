"""Batches as a pure function of the step: which examples, in which order, with which weight.

One or several streams share a batch. The first sets the length of an epoch; the others go round as often as needed.
Shapes: S steps, B rows of a batch, T tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple, Protocol

import numpy as np

from jaxforget import checks
from jaxforget.data.sampling import hash64, order
from jaxforget.data.tokens import IGNORED, Examples, same_widths
from jaxforget.errors import UserError

Weighting = Literal["sequence", "token"]


class AnyBatches(Protocol):
    """What a run of one model takes its batches from. The usual ones are `Batches`; privacy/ draws others."""

    @property
    def steps(self) -> int: ...

    @property
    def tokens(self) -> int: ...

    def tokens_until(self, steps: int) -> int: ...

    def count(self, start: int, stop: int) -> int: ...

    def take(self, start: int, stop: int, size: int) -> dict[str, np.ndarray]: ...


def stack_steps(steps: list[dict[str, np.ndarray]], size: int) -> dict[str, np.ndarray]:
    """Stack the batches of steps, each column (size, ...), the last one repeated."""
    steps = steps + [steps[-1]] * (size - len(steps))
    return {name: np.stack([batch[name] for batch in steps]) for name in steps[0]}


class Stream(NamedTuple):
    """Examples that fill `rows` rows of every batch.

    factor: coefficient of the stream's mean loss in the loss of the batch; negative ascends. weighting: of this stream
    alone; None is that of the batches.
    """

    examples: Examples
    rows: int
    factor: float = 1.0
    weighting: Weighting | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """`take(start, stop, size)` gives the batches of those steps, stacked and padded to `size` steps.

    Columns besides the examples' own: `weight_B` (0 = padding), `factor_B`, `stream_B` (index of the stream), `draw_B`
    (a number for randomness: a function of the seed, the example's id and the epoch).
    The loss of a batch, sum_b weight_b factor_b l_b / sum_b weight_b, equals sum over streams of
    stream.factor * (mean of l over the stream's rows), whatever the row counts.
    weighting: "sequence" makes that a mean over sequences; "token" over scored tokens (l being a mean over tokens).
    """

    streams: tuple[Stream, ...]
    epochs: int
    seed: int
    weighting: Weighting = "sequence"
    _newest: dict[int, tuple[int, np.ndarray]] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        wide = same_widths([stream.examples for stream in self.streams])
        streams = tuple(stream._replace(examples=part) for stream, part in zip(self.streams, wide, strict=True))
        object.__setattr__(self, "streams", streams)  # frozen for everybody else
        for stream in self.streams:
            if not len(stream.examples):
                raise UserError("a training set is empty after tokenisation; give it records with scored tokens")
        checks.at_least(1, epochs=self.epochs)
        if any(stream.rows < 1 for stream in self.streams):
            raise UserError("batch size is below 1; it must be at least 1")

    @property
    def steps_per_epoch(self) -> int:
        first = self.streams[0]
        return -(-len(first.examples) // first.rows)

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    @property
    def tokens(self) -> int:
        """Real (not padding) tokens of the whole run, counted once per visit."""
        return self.tokens_until(self.steps)

    @property
    def mean_length(self) -> float:
        """Mean real tokens of an example, over all streams."""
        return float(np.concatenate([stream.examples.lengths for stream in self.streams]).mean())

    def tokens_until(self, steps: int, stream: int | None = None) -> int:
        """Real tokens that the first `steps` batches hold, of all streams or of one."""
        total = 0
        for index, part in enumerate(self.streams):
            if stream not in (None, index):
                continue
            length_N = part.examples.columns["length"]
            whole, rest = divmod(self._rows_until(index, steps), len(length_N))
            total += whole * int(length_N.sum())
            if rest:
                total += int(length_N[self._order(index, whole)[:rest]].sum())
        return total

    def _rows_until(self, index: int, steps: int) -> int:
        stream = self.streams[index]
        if index:
            return steps * stream.rows
        epochs, rest = divmod(steps, self.steps_per_epoch)
        return epochs * len(stream.examples) + min(rest * stream.rows, len(stream.examples))

    def _order(self, index: int, epoch: int) -> np.ndarray:
        """Return the order of one pass over a stream, keeping the newest."""
        if self._newest.get(index, (None,))[0] != epoch:
            self._newest[index] = (epoch, order(self.streams[index].examples.columns["key"], self.seed, epoch))
        return self._newest[index][1]

    def _rows(self, index: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the examples of one stream in one step, and their epochs; fewer at the end of the first's epoch."""
        stream = self.streams[index]
        if index == 0:
            epoch, place = divmod(step, self.steps_per_epoch)
            chosen = self._order(0, epoch)[place * stream.rows : (place + 1) * stream.rows]
            return chosen, np.full(len(chosen), epoch)
        visit_R = np.arange(step * stream.rows, (step + 1) * stream.rows)
        turn_R, place_R = np.divmod(visit_R, len(stream.examples))
        return np.array([self._order(index, int(t))[p] for t, p in zip(turn_R, place_R, strict=True)]), turn_R

    def count(self, start: int, stop: int) -> int:
        """Say how many of the steps start..stop-1 are to be run: all of them. Members may have fewer."""
        return stop - start

    def take(self, start: int, stop: int, size: int) -> dict[str, np.ndarray]:
        """Stack steps start..stop-1; steps beyond, up to `size`, repeat the last one and are not to be run."""
        return stack_steps([self._batch(step) for step in range(start, stop)], size)

    def _batch(self, step: int) -> dict[str, np.ndarray]:
        parts = []
        for index, stream in enumerate(self.streams):
            chosen, epoch_R = self._rows(index, step)
            # Padding repeats a real row with weight 0: its loss is finite, so it cannot poison the sum.
            extra = (0, stream.rows - len(chosen))
            padded, epoch_B = np.pad(chosen, extra, constant_values=chosen[0]), np.pad(epoch_R, extra)
            part = {name: column[padded] for name, column in stream.examples.columns.items()}
            real_B = np.arange(stream.rows) < len(chosen)
            by_token = (stream.weighting or self.weighting) == "token"
            share_B = (part["labels"] != IGNORED).sum(axis=1) if by_token else 1
            part["weight"] = (real_B * share_B).astype(np.float32)
            # 32 bits of each: what devices hold, and enough.
            part["draw"] = (hash64(self.seed, epoch_B, part["key"], 1) >> np.uint64(32)).astype(np.uint32)
            part["key"] = part["key"].astype(np.uint32)
            part["stream"] = np.full(stream.rows, index, np.int32)
            parts.append(part)
        total = sum(part["weight"].sum() for part in parts)
        for part, stream in zip(parts, self.streams, strict=True):
            factor = stream.factor * total / part["weight"].sum()
            part["factor"] = np.full(stream.rows, factor, np.float32)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
