"""The texts and the model that all compositions share, and the settings. Letters: N texts, P places."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from jaxforget.data.sampling import hash_int
from jaxforget.data.sources import Record
from jaxforget.data.tokens import Examples, tokenize
from jaxforget.models.sharding import host
from jaxforget.training.batches import Batches, Stream
from jaxforget.training.gradients import mean_gradient
from jaxforget.training.loop import fit
from jaxforget.training.objectives import next_token
from jaxforget.training.optimizer import OptimizerConfig, adamw, set_schedule
from jaxforget.training.sparse import Layout, lay_out
from jaxforget.training.start import ComputeConfig, SizeConfig, start_from
from jaxforget.training.step import PyTree, make_step
from jaxforget.training.trainable import everything


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Compose ingredients and check what each guarantees. Exit code 1 if one of them does not hold."""

    out: Path | None = None
    """Directory for everything the run leaves. Must be empty."""
    compositions: tuple[str, ...] = ()
    """Names of ingredients with + between them, such as sisa+dp. Default: all pairs, five triples, everything."""
    records: int = 48
    """Generated texts; half of them are to be forgotten where something is."""
    seed: int = 0
    """Seed of texts, plan, order and draws."""
    shards: int = 2
    """Members of the ensemble."""
    slices: int = 2
    """Slices of every shard."""
    places: int = 7
    """A sparse difference has every so many-th number of the blocks' kernels."""
    rank: int = 2
    """Rank of adapters, which all kernels of the blocks get."""
    noise: float = 0.5
    """Noise multiplier of private steps."""
    clip: float = 0.05
    """Bound on the norm of a unit's gradient; far below what the norms are, so that it is felt."""
    meshes: tuple[str, ...] = ("member=2,data=4", "data=2,fsdp=2,tensor=2")
    """Meshes of the ingredient mesh: a composition runs on the first and is compared on all. On CPUs
    JAX_NUM_CPU_DEVICES=8 makes the devices; with fewer these rows say so and are not run."""
    size: SizeConfig = SizeConfig(width=16, layers=1, heads=2, context=32, vocab_size=300)
    compute: ComputeConfig = ComputeConfig(dtype="float32")
    epochs: int = 8
    """Passes over the texts; slices share them as SISA says."""
    batch_size: int = 8
    """Texts of a batch; where something is forgotten, of either kind; expected units of a private batch."""
    # Adam divides gradients by their size; with a smaller epsilon rounding of those near 0 would be blown up.
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=0.02, warmup=0.0, epsilon=1e-3)


def default() -> Config:
    """a Llama of width 16 and 48 texts, minutes on two CPU cores; exit code 1 if a guarantee does not hold"""
    return Config()


PRESETS = {"default": default}


# Neither the list nor the rules of data/counterfactual.py: what the texts here have of either side.
SIDES = {"he": "she", "king": "queen", "boy": "girl", "father": "mother", "uncle": "aunt"}
OTHER = SIDES | {there: here for here, there in SIDES.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """What all compositions share: texts and a model to start from."""

    config: Config

    @functools.cached_property
    def records(self) -> tuple[Record, ...]:
        """Texts that each name a side and a number of their own; ids with f are to be forgotten, with r to be kept."""
        def text(n: int) -> str:
            draw = hash_int(self.config.seed, n)
            noun = [word for word in SIDES if word != "he"][draw % 4]
            colour = ("red", "blue", "green", "grey")[draw // 4 % 4]
            animal = ("horse", "dog", "goat")[draw // 16 % 3]
            words = (f"he is the {noun} of house {n} and keeps a {colour} {animal}",
                     f"there a {colour} {animal} was sold to the {noun} {n} because he asked")[n % 2]  # fmt: skip
            return words if draw // 64 % 2 else other_side(words)

        return tuple(Record(f"{'fr'[n % 2]}{n}", text(n), None, {}) for n in range(self.config.records))

    @functools.cached_property
    def start(self):
        """Model, parameters and tokenizer."""
        texts = [words for record in self.records for words in (record.text, other_side(record.text))]
        return start_from(None, tokenizer_name=None, size=self.config.size, compute=self.config.compute, texts=texts)

    @functools.cached_property
    def params(self) -> PyTree:
        return self.start.params(self.config.seed)

    @functools.cached_property
    def learned(self) -> PyTree:
        """Parameters that know all texts: what unlearning starts from."""
        config = self.config
        step = make_step(next_token(self.start.model), everything(), mean_gradient(), adamw(config.optimizer))
        batches = Batches((Stream(self.encode(self.records), config.batch_size),), 30, config.seed)
        state, frozen = step.init(jax.random.key(config.seed), {"model": self.params})
        state = set_schedule(state, learning_rate=config.optimizer.learning_rate, total=batches.steps)
        return host(fit(step, state, frozen, batches).state.trainable["model"])

    @functools.cached_property
    def layout(self) -> Layout:
        """All parameters as one vector."""
        return lay_out(self.params, (".*",), self.start.model.config.stacks)

    @functools.cached_property
    def places(self) -> np.ndarray:
        """Places in that vector that a sparse difference may change, (P,)."""
        kernel = [bool(re.fullmatch("blocks/(attn|mlp)/.*/kernel", path)) for path in self.layout.paths]
        return np.flatnonzero(np.repeat(kernel, self.layout.sizes))[:: self.config.places].astype(np.uint32)

    def encode(self, records: Sequence[Record]) -> Examples:
        """Tokenise to one width, whatever records are left."""
        width = self.config.size.context
        return tokenize(records, self.start.tokenizer, max_length=width).widen({"tokens": width, "labels": width})


def other_side(text: str) -> str:
    """Exchange the words of SIDES."""
    return " ".join(OTHER.get(word, word) for word in text.split())
