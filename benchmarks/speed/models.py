"""Random models of every family, and the batches of a turn. Shapes: N rows, S steps of a turn, B rows of a batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed.config import Config
from jaxforget.data.sampling import id_keys
from jaxforget.data.tokens import IGNORED, Examples
from jaxforget.models.model import build, family_of
from jaxforget.training.batches import Batches, Stream
from jaxforget.training.gradients import mean_gradient
from jaxforget.training.objectives import objective_for
from jaxforget.training.optimizer import adamw
from jaxforget.training.start import SizeConfig, scratch_config
from jaxforget.training.step import Step, make_step
from jaxforget.training.trainable import everything

_SPECIAL = SimpleNamespace(pad_token_id=0, bos_token_id=1, eos_token_id=2)
_MASK_ID = 3


class Subject(NamedTuple):
    """A model with what it is trained for, its parameters on the device."""

    model: Any
    task: str
    params: Any


def model_of(config: Config, family: str, size: SizeConfig) -> tuple[Any, str]:
    """Return a model of this family and shape, with the head that it is pre-trained with, and that task."""
    raw = scratch_config(size, family, size.vocab_size, _SPECIAL)
    known = family_of(family).ARCHITECTURES[family]
    task = next(head for head in ("causal", "masked", "seq2seq") if head in known)
    shape = family_of(family).Config.from_hf(raw | {"architectures": [known[task]]})
    return config.compute.apply(build(shape)), task


def subject(config: Config, family: str, size: SizeConfig) -> Subject:
    """Draw the parameters of such a model."""
    model, task = model_of(config, family, size)
    return Subject(model, task, model.init(jax.random.key(0)))


def examples(task: str, size: SizeConfig, rows: int, name: str = "") -> Examples:
    """Draw rows of random tokens, all as long as the context."""
    ids = tuple(f"{name}{i}" for i in range(rows))
    rng = np.random.default_rng(len(name))
    token_NT = rng.integers(0, size.vocab_size, (rows, size.context)).astype(np.int32)
    columns = {"tokens": token_NT, "length": np.full(rows, size.context, np.int32), "key": id_keys(ids)}
    if task == "causal":
        columns["labels"] = np.pad(token_NT[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
    elif task == "masked":
        columns["labels"] = token_NT
    else:
        columns["labels"] = rng.integers(0, size.vocab_size, token_NT.shape).astype(np.int32)
        columns["decoder_tokens"] = np.pad(columns["labels"][:, :-1], ((0, 0), (1, 0)))
    return Examples(ids, columns)


def batches(config: Config, streams: tuple[Stream, ...]) -> dict[str, jax.Array]:
    """Put the batches of a turn on the device, (S, B, ...)."""
    return jax.tree.map(jnp.asarray, Batches(streams, 1, 0).take(0, config.steps, config.steps))


def plain_batches(config: Config, task: str, size: SizeConfig, name: str = "") -> dict[str, jax.Array]:
    """Put the batches of a turn of one stream on the device, (S, B, ...)."""
    rows = config.train.batch_size
    return batches(config, (Stream(examples(task, size, rows * config.steps, name), rows),))


def plain_step(config: Config, model, task: str) -> Step:
    """Compose the training step as train.lm does."""
    objective = objective_for(task, model, _MASK_ID)
    gradient = mean_gradient(config.train.microbatch_of(config.train.batch_size))
    return make_step(objective, everything(), gradient, adamw(config.train))
