"""A composition: its slots while ingredients fill them, then joined and trained."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from benchmarks.compose.world import World
from jaxforget.data.counterfactual import Augmented
from jaxforget.data.sampling import hash_int
from jaxforget.data.sources import Record
from jaxforget.data.tokens import Examples
from jaxforget.models import sharding
from jaxforget.models.layers import merge
from jaxforget.sisa.plan import epoch_schedule, uniform
from jaxforget.training.batches import Batches, Stream
from jaxforget.training.ensemble import MemberBatches, member, stack
from jaxforget.training.gradients import mean_gradient
from jaxforget.training.loop import fit
from jaxforget.training.objectives import next_token
from jaxforget.training.optimizer import adamw, set_schedule
from jaxforget.training.step import Objective, Parts, PyTree, State, Step, Trainable, make_step, place
from jaxforget.training.trainable import everything

CHUNK = 4  # steps of one program; the same for all runs that are compared


class Draft(NamedTuple):
    """The slots of a composition and what stands around them. An ingredient replaces what is its own."""

    world: World
    parts: Parts
    objective: Objective
    trainables: tuple[Trainable, ...]  # one upon the other; none: everything moves
    gradient: Any
    optimizer: tuple[optax.GradientTransformation, ...]  # one after the other
    augment: Callable[[Sequence[Record]], Augmented]
    streams: Callable[[Examples], tuple[Stream, ...]]
    batches: Callable[[tuple[Stream, ...], Augmented, int, int], Any]  # streams, records, epochs, seed
    prepare: Callable[[State], State] = lambda state: state
    epochs: int = 1
    shards: int = 1
    slices: int = 1
    lift: Callable[[Step], Step] = lambda step: step
    mesh: str | None = None
    moves: tuple[int, ...] = ()  # places of the model that may move, where some may not
    tapped: bool = True  # all that moves is read by operations that taps know


def blank(world: World) -> Draft:
    """Plain training: every text, every parameter, the mean gradient, one model on one device."""
    config = world.config
    return Draft(
        world, {"model": world.params}, next_token(world.start.model), (), mean_gradient(), (adamw(config.optimizer),),
        augment=lambda records: Augmented(list(records), {record.id: record.id for record in records}, 0, 0),
        streams=lambda examples: (Stream(examples, config.batch_size),),
        batches=lambda streams, records, epochs, seed: Batches(streams, epochs, seed), epochs=config.epochs,
    )  # fmt: skip


class Stage(NamedTuple):
    """What a stage of a member left."""

    moving: PyTree  # on the host
    steps: int
    devices: int


Stages = Mapping[tuple[int, int], Stage]  # by shard and slice


@dataclasses.dataclass(frozen=True, eq=False)
class Built:
    """A draft, its slots joined."""

    draft: Draft

    @functools.cached_property
    def trainable(self) -> Trainable:
        return functools.reduce(upon, self.draft.trainables) if self.draft.trainables else everything()

    @functools.cached_property
    def one(self) -> Step:
        """The step of one member."""
        draft = self.draft
        return make_step(draft.objective, self.trainable, draft.gradient, optax.chain(*draft.optimizer))

    @functools.cached_property
    def step(self) -> Step:
        return self.draft.lift(self.one)

    @functools.cached_property
    def frozen(self) -> Parts:
        return self.one.init(jax.random.key(0), self.draft.parts)[1]

    @functools.cached_property
    def where(self) -> dict[str, tuple[int, int]]:
        """Say in which shard and slice every record is."""
        ids = [record.id for record in self.draft.world.records]
        shard_N, slice_N = uniform(ids, self.draft.shards, self.draft.slices, self.draft.world.config.seed)
        return dict(zip(ids, zip(shard_N.tolist(), slice_N.tolist(), strict=True), strict=True))

    def texts(self, records: Sequence[Record], shard: int, stage: int) -> Augmented:
        """Return what a stage of a member is trained on."""
        place = self.where
        return self.draft.augment([r for r in records if place[r.id][0] == shard and place[r.id][1] <= stage])

    def batches(self, records: Sequence[Record], shard: int, stage: int):
        """Return its batches."""
        draft, found = self.draft, self.texts(records, shard, stage)
        epochs = epoch_schedule(draft.epochs, draft.slices)[stage]
        streams = draft.streams(draft.world.encode(found.records))
        return draft.batches(streams, found, epochs, hash_int(draft.world.config.seed, shard, stage))

    def begin(self, shard: int, stage: int) -> State:
        """Return its fresh state."""
        key = jax.random.key(self.draft.world.config.seed)
        key = jax.random.fold_in(jax.random.fold_in(key, shard), stage)
        return self.draft.prepare(self.one.init(key, self.draft.parts)[0])

    def join(self, trees: Sequence[PyTree]) -> PyTree:
        """Put the members' trees side by side as the step takes them."""
        return trees[0] if self.step.own is None else stack(trees)

    def part(self, tree: PyTree) -> list[PyTree]:
        """Undo `join`."""
        return [tree] if self.step.own is None else [member(tree, k) for k in range(self.draft.shards)]

    def models(self, stages: Stages, combined: Callable[[PyTree], PyTree] = merge) -> list[PyTree]:
        """Return every member's model on the host."""
        last = self.draft.slices - 1
        found = [self.one.combine(self.frozen, stages[k, last].moving)["model"] for k in range(self.draft.shards)]
        return [jax.tree.map(np.asarray, combined(model)) for model in found]

    @functools.cached_property
    def gradients(self) -> Callable:
        """Return function(batch of every member, change) -> what its optimizer's last transformation gets at first.

        change: applied to the fresh states.
        """
        draft = self.draft
        record = optax.chain(*draft.optimizer[:-1], optax.trace(decay=0.0))
        one = make_step(draft.objective, self.trainable, draft.gradient, record)
        lifted = draft.lift(one)
        update = jax.jit(lifted.update)

        def function(batches: Sequence[Mapping[str, np.ndarray]], change=lambda state: state) -> list[PyTree]:
            with spread(draft):
                states = [one.init(jax.random.key(k), draft.parts)[0] for k in range(draft.shards)]
                states = [change(draft.prepare(state)) for state in states]
                state, frozen = place(lifted, self.join(states), self.frozen)
                after, _ = update(state, frozen, sharding.place_whole(self.join(batches), lead=lifted.own is not None))
                return self.part(sharding.host(after.opt_state[-1].trace))

        return function


def spread(draft: Draft):
    """Set the mesh, if there is one."""
    return jax.set_mesh(sharding.make_mesh(draft.mesh)) if draft.mesh else contextlib.nullcontext()


def train(built: Built, records: Sequence[Record], have: Stages | None = None) -> Stages:
    """Train the stages that are not there yet, each from what the one before it left and with a fresh optimizer."""
    draft, stages = built.draft, dict(have or {})
    with spread(draft):
        for stage in range(draft.slices):
            rows: list[Any] = [
                None if (k, stage) in stages else built.batches(records, k, stage) for k in range(draft.shards)
            ]
            if not any(rows):
                continue
            states = []
            for k, row in enumerate(rows):
                state = built.begin(k, stage)
                if stage:
                    state = state._replace(trainable=stages[k, stage - 1].moving)
                states.append(set_schedule(state, learning_rate=draft.world.config.optimizer.learning_rate,
                                           total=row.steps if row else 1))  # fmt: skip
            batches = rows[0] if built.step.own is None else MemberBatches(tuple(rows))
            state = fit(built.step, built.join(states), built.frozen, batches, chunk=CHUNK).state
            devices = len(jax.tree.leaves(state.trainable)[0].sharding.device_set)
            left = built.part(sharding.host((state.trainable, state.step)))
            for k, (row, (moving, steps)) in enumerate(zip(rows, left, strict=True)):
                if row:
                    stages[k, stage] = Stage(moving, int(steps), devices)
    return stages


def upon(inner: Trainable, outer: Trainable) -> Trainable:
    """Let two trainables move beside each other: the outer one changes the model that the inner one gives."""

    def init(key, parts: Parts):
        first, frozen = inner.init(key, parts)
        second, own = outer.init(key, parts)
        return {"inner": first, "outer": second}, {**own, **frozen}

    def combine(frozen: Parts, moving: PyTree, key=None) -> Parts:
        return outer.combine(inner.combine(frozen, moving["inner"], key), moving["outer"], key)

    return Trainable(init, combine)
