"""What an unlearning method is: a frozen config whose `recipe` says what fills the slots of the training step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import optax

from jaxforget.data.sources import Record
from jaxforget.data.tokens import Examples
from jaxforget.errors import UserError
from jaxforget.models.layers import merge
from jaxforget.training.batches import Stream
from jaxforget.training.step import Batch, Objective, Parts, PyTree, Trainable

Loss = Callable[[Parts, Batch, jax.Array], jax.Array]  # of the model's logits: parts, batch, logits_BTV -> losses_B


def _no_encoder(records: Sequence[Record]) -> Examples:
    raise UserError("a method that answers the forget questions otherwise needs `encode` in its setting")


class Setting(NamedTuple):
    """What a method may look at: the starting model, the tokenised sets by name, and the shape of the run.

    For methods that answer the forget questions otherwise: records, those of the forget set; tokenizer; encode, which
    tokenises records as the sets were. cache: a directory for what the starting model says; None keeps nothing.
    microbatch: forget rows differentiated at a time where a method trains before the run; None is all.
    """

    model: Any
    params: Any  # of the starting model; None while settings are checked
    sets: Mapping[str, Examples]  # forget, and what the method needs of retain, general, approximate
    rows: int  # forget rows of a batch
    seed: int
    special_ids: tuple[int, ...] = ()  # token ids with a role: bos, eos, pad, unk
    pad_id: int | None = None  # a token id that never occurs in text
    records: Sequence[Record] = ()
    tokenizer: Any = None
    encode: Callable[[Sequence[Record]], Examples] = _no_encoder
    cache: Path | None = None
    microbatch: int | None = None


class Recipe(NamedTuple):
    """The slots of one unlearning run.

    streams: what fills each batch, the forget set first. objective: per-example losses. parts: what the objective reads
    besides the model, such as `reference`; frozen, except those in `optimizers`, which move by an optimizer of their
    own. finish(parts) -> params: the model to evaluate and to save, of the parts at any step; None is `model` itself.
    For counting FLOPs: prepare_forwards, passes over the forget set spent before the first step; reference_streams,
    indices of the streams that a reference forward sees.
    """

    streams: tuple[Stream, ...]
    objective: Objective
    parts: Mapping[str, PyTree] = {}
    optimizers: Mapping[str, optax.GradientTransformation] = {}
    finish: Callable[[Parts], PyTree] | None = None
    prepare_forwards: int = 0
    reference_streams: tuple[int, ...] = ()


class Method(Protocol):
    """A frozen config. `needs` names the sets it reads besides `forget`.

    A method that asks more of a setting also has `check(setting)`, which raises UserError before anything is trained.
    """

    @property
    def needs(self) -> tuple[str, ...]: ...

    def recipe(self, setting: Setting) -> Recipe: ...


def check_setting(method: Method, name: str, setting: Setting) -> None:
    """Raise UserError for a setting that the method cannot work with."""
    for needed in method.needs:
        if needed not in setting.sets:
            raise UserError(f"method {name} needs --{needed}")
    if hasattr(method, "check"):
        try:
            method.check(setting)
        except UserError as error:
            raise UserError(f"method {name}: {error}") from None


@functools.cache
def moves(
    moving: Trainable, others: tuple[str, ...] = (), finish: Callable[[Parts], PyTree] | None = None
) -> Trainable:
    """Let the parts `others` move beside what a trainable moves, and evaluate and save what `finish` makes."""

    def init(key: jax.Array, parts: Parts) -> tuple[PyTree, Parts]:
        given = {name: part for name, part in parts.items() if name not in others}
        own, frozen = moving.init(key, given)
        return {"own": own, "others": {name: parts[name] for name in others}}, frozen

    def combine(frozen: Parts, trainable: PyTree, key: jax.Array | None = None) -> Parts:
        parts = {**moving.combine(frozen, trainable["own"], key), **trainable["others"]}
        if finish is None or key is not None:  # in a step
            return parts
        return {**parts, "model": finish({**parts, "model": merge(parts["model"])})}

    return Trainable(init, combine)


@functools.cache
def optimized(
    optimizer: optax.GradientTransformation, others: tuple[tuple[str, optax.GradientTransformation], ...]
) -> optax.GradientTransformation:
    """Give every part in `others`, (name, optimizer), its own optimizer. For what `moves` makes."""

    def label(path, _):
        return path[1].key if path[0].key == "others" else ""

    labels = functools.partial(jax.tree_util.tree_map_with_path, label)
    return optax.partition({"": optimizer, **dict(others)}, labels)
