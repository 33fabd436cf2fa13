"""What an unlearning method is: a frozen config whose `recipe` says what fills the slots of the training step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from jaxforget.data.tokens import Examples
from jaxforget.training.batches import Stream
from jaxforget.training.step import Objective


class Setting(NamedTuple):
    """What a method may look at: the starting model, the tokenised sets by name, and the shape of the run."""

    model: Any
    params: Any  # of the starting model
    sets: Mapping[str, Examples]  # forget, and what the method needs of retain, general, approximate
    rows: int  # forget rows of a batch
    seed: int
    special_ids: tuple[int, ...] = ()  # token ids with a role: bos, eos, pad, unk
    pad_id: int | None = None  # a token id that never occurs in text


class Recipe(NamedTuple):
    """The slots of one unlearning run.

    streams: what fills each batch, the forget set first. objective: per-example losses. reference: whether the
    objective reads `parts["reference"]`, the starting model. For counting FLOPs: prepare_forwards, passes over the
    forget set spent before the first step; reference_streams, indices of the streams that a reference forward sees.
    """

    streams: tuple[Stream, ...]
    objective: Objective
    reference: bool = False
    prepare_forwards: int = 0
    reference_streams: tuple[int, ...] = ()


class Method(Protocol):
    """A frozen config. `needs` names the sets it reads besides `forget`."""

    @property
    def needs(self) -> tuple[str, ...]: ...

    def recipe(self, setting: Setting) -> Recipe: ...
