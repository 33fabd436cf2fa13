"""What determines an ensemble's parameters besides its records, and the keys of its stages."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Literal

import jax

from jaxforget.data.sampling import hash_int
from jaxforget.data.text import TextConfig
from jaxforget.models import Model
from jaxforget.report.run import plain
from jaxforget.sisa.plan import epoch_schedule
from jaxforget.training.ensemble import Members
from jaxforget.training.gradients import mean_gradient
from jaxforget.training.lora import LoraConfig, moving_parts
from jaxforget.training.objectives import objective_for
from jaxforget.training.optimizer import TrainConfig, adamw
from jaxforget.training.start import ComputeConfig
from jaxforget.training.step import Step, make_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings that reach a parameter. Stored with the ensemble; nothing else is read at a deletion."""

    task: Literal["causal", "classification", "masked", "seq2seq"]
    labels: tuple[str, ...]  # class names, fixed when the ensemble was planned
    shards: int
    slices: int
    seed: int
    widths: dict[str, int]  # of the columns over tokens: a static shape that no deletion changes
    weighting: Literal["sequence", "token"]
    members: Members
    width: int  # members in one program; shard k has slot k % width, always
    trainable: tuple[str, ...]
    lora: LoraConfig
    compute: ComputeConfig
    text: TextConfig
    train: TrainConfig
    start: str  # digest of the initial parameters, the model's configuration and the tokenizer

    @property
    def epochs(self) -> tuple[int, ...]:
        """Passes of every stage."""
        return epoch_schedule(self.train.epochs, self.slices)

    @property
    def digest(self) -> str:
        """SHA-256 of the settings, hex."""
        return hashlib.sha256(json.dumps(plain(self), sort_keys=True).encode()).hexdigest()

    def stage_seed(self, shard: int, stage: int) -> int:
        """Seed of data order and draws."""
        return hash_int(self.seed, shard, stage)

    def stage_key(self, shard: int, stage: int) -> jax.Array:
        """Key of the step's randomness."""
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), shard), stage)

    def step(self, model: Model, mask_id: int | None) -> Step:
        """Join objective, trainable, gradient and optimizer."""
        return make_step(
            objective_for(self.task, model, mask_id),
            moving_parts(self.trainable, self.lora),
            mean_gradient(self.train.microbatch_of(self.train.batch_size)),
            adamw(self.train),
        )


def stage_keys(recipe: Recipe, shard: int, ids: Sequence[Sequence[str]]) -> list[str | None]:
    """Return the key of every stage of a shard, given the ids in each slice; None while the slices so far are empty.

    A key is the SHA-256 of the recipe, the shard, the stage, and the sorted ids that the stage trains on. The stage is
    part of it: an emptied slice leaves the ids as they were, but its passes over the earlier slices remain.
    """
    head = f"{recipe.digest} {shard}"
    keys: list[str | None] = []
    seen: list[str] = []
    for stage, more in enumerate(ids):
        seen = sorted([*seen, *more])
        body = hashlib.sha256("\n".join(f"{len(one)}:{one}" for one in seen).encode()).hexdigest()
        keys.append(hashlib.sha256(f"{head} {stage} {body}".encode()).hexdigest() if seen else None)
    return keys
