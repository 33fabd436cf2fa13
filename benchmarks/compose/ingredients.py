"""What can be composed: each ingredient replaces what is its own in a draft."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from benchmarks.compose.draft import Draft
from benchmarks.compose.world import Config
from jaxforget.data.counterfactual import Augmented, CounterfactualConfig, augment, load_swaps
from jaxforget.data.tokens import Examples, concatenate
from jaxforget.privacy.accounting import PrivacyConfig, mechanism
from jaxforget.privacy.clipping import Clipping
from jaxforget.privacy.noise import gaussian_noise, private_gradient, set_privacy
from jaxforget.privacy.sampling import PoissonBatches, population, with_units
from jaxforget.training.batches import Stream
from jaxforget.training.ensemble import members
from jaxforget.training.lora import LoraConfig, lora
from jaxforget.training.sparse import sparse_difference
from jaxforget.training.step import Objective
from jaxforget.unlearning import Setting
from jaxforget.unlearning.npo import NPO

MICRO = 4  # units of a private micro-batch
DELTA = 1e-3
METHOD = NPO(retain_loss="kl")  # two streams, and what the starting model says of either


def cda(draft: Draft) -> Draft:
    """Every record has its counterfactual beside it."""
    config = CounterfactualConfig(sides="two")
    swaps = load_swaps(config)
    return draft._replace(augment=lambda records: augment(records, config, draft.world.config.seed, swaps))


def unlearning(draft: Draft) -> Draft:
    """A model that knows the texts is pushed below itself on those to be forgotten, and held where it was on others."""
    world, rows = draft.world, draft.world.config.batch_size

    def recipe(examples: Examples):
        forget_N = np.asarray([identity.startswith("f") for identity in examples.ids])
        sets = {"forget": examples.take(forget_N), "retain": examples.take(~forget_N)}
        return METHOD.recipe(Setting(world.start.model, world.learned, sets, rows, world.config.seed))

    whole = recipe(world.encode(world.records))
    return draft._replace(
        objective=whole.objective, parts={"model": world.learned, **whole.parts},
        streams=lambda examples: recipe(examples).streams,
    )  # fmt: skip


def sparse(draft: Draft) -> Draft:
    """Values at fixed places move, and nothing else."""
    world = draft.world
    difference = sparse_difference(world.layout, world.places)
    return draft._replace(trainables=(*draft.trainables, difference), tapped=False,
                          moves=(*draft.moves, *world.places.tolist()))  # fmt: skip


def adapters(draft: Draft) -> Draft:
    """Low-rank adapters move, and nothing else."""
    return draft._replace(trainables=(*draft.trainables, lora(lora_config(draft.world.config))))


def lora_config(config: Config) -> LoraConfig:
    return LoraConfig(rank=config.rank, alpha=2.0 * config.rank, targets=("(attn|mlp)/.*",))


def dp(draft: Draft) -> Draft:
    """Poisson batches of units, clipped gradients, noise. A record's stream and factor become columns of its own."""
    config = draft.world.config
    units, privacy = config.batch_size, privacy_of(config)

    def batches(streams, records: Augmented, epochs: int, seed: int) -> PoissonBatches:
        examples = with_units(concatenate([labelled(stream, index) for index, stream in enumerate(streams)]),
                              set(records.unit_of), records.unit_of)  # fmt: skip
        count = population(examples)
        how = mechanism(privacy, population=count, batch=units, steps=epochs * -(-count // units), unit="record")
        # As many rows as all records would need, so that a deletion changes no shape, hence no rounding.
        return PoissonBatches(examples, how, seed, MICRO, at_least=len(draft.world.records))

    how = Clipping("bookkeep" if draft.tapped else "vmap", rows=rows_of_unit(draft))
    return draft._replace(
        objective=by_label(draft.objective), batches=batches, optimizer=(gaussian_noise(), *draft.optimizer),
        gradient=private_gradient(how, float(units), MICRO),
        prepare=lambda state: set_privacy(draft.prepare(state), bound=config.clip, multiplier=config.noise),
    )  # fmt: skip


def privacy_of(config: Config) -> PrivacyConfig:
    return PrivacyConfig(noise=config.noise, clip=config.clip, delta=DELTA)


def rows_of_unit(draft: Draft) -> int:
    """Return how many records a record becomes."""
    return len(draft.augment(draft.world.records[:1]).records)


def labelled(stream: Stream, index: int) -> Examples:
    """Keep stream and factor as columns, under names that no batch has."""
    count = len(stream.examples)
    told = {"kind": np.full(count, index, np.int32), "share": np.full(count, stream.factor, np.float32)}
    return dataclasses.replace(stream.examples, columns=stream.examples.columns | told)


@functools.cache
def by_label(objective: Objective) -> Objective:
    """Let an objective read the stream and factor that a record has, not those of its batch."""
    return lambda parts, batch, key: objective(
        parts, {**batch, "stream": batch["kind"], "factor": batch["share"]}, key
    )


def sisa(draft: Draft) -> Draft:
    """Shards train as members, slice after slice."""
    return draft._replace(shards=draft.world.config.shards, slices=draft.world.config.slices, lift=members)


def mesh(draft: Draft) -> Draft:
    """Members, rows and parameters are spread over devices."""
    return draft._replace(mesh=draft.world.config.meshes[0])
