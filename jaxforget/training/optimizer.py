"""AdamW with a warm-up schedule whose settings live in the state.

Peak rate and length are arrays of the optimizer state, not constants of the program. One compiled step so serves
every learning rate and run length, and `vmap` over states is a sweep.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxforget import checks
from jaxforget.errors import UserError
from jaxforget.models.sharding import ROWS, check_rows, size
from jaxforget.training.step import PyTree, State


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay after warm-up: cosine or linear to 0, or none."""
    warmup: float = 0.03
    """Fraction of all steps spent rising linearly from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay on matrices (norms and biases are never decayed)."""
    b1: float = 0.9
    """Adam: decay of the first moment."""
    b2: float = 0.999
    """Adam: decay of the second moment."""
    epsilon: float = 1e-8
    """Adam: added to the root of the second moment."""
    max_grad_norm: float = 1.0
    """Clip the global norm of the gradient; 0 does not clip."""

    def __post_init__(self):
        checks.at_least(0, learning_rate=self.learning_rate, weight_decay=self.weight_decay,
                        max_grad_norm=self.max_grad_norm)  # fmt: skip
        checks.between(0, 1, warmup=self.warmup)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(OptimizerConfig):
    """How long and in what portions to train, and the optimizer."""

    epochs: int = 10
    """Passes over the first training set."""
    batch_size: int = 16
    """Examples of the first training set in a batch."""
    microbatch: int | None = None
    """Examples differentiated at a time; 0 is the whole batch. Not given: 4 for each device on a CPU, where that is
    fastest, else 0."""

    def __post_init__(self):
        super().__post_init__()
        checks.at_least(1, epochs=self.epochs, batch_size=self.batch_size)
        checks.at_least(0, microbatch=self.microbatch)

    def microbatch_of(self, *rows: int) -> int | None:
        """Resolve the micro-batch for streams of these row counts; each micro-batch then holds one stream.

        Raises UserError where it does not divide them, or the devices of a mesh do not divide it.
        """
        if self.microbatch:
            if any(row % self.microbatch for row in rows):
                raise UserError(f"--microbatch {self.microbatch} does not divide the batch rows {list(rows)}")
            check_rows(self.microbatch)
            return self.microbatch
        if self.microbatch is None and jax.default_backend() == "cpu":
            for row in rows:
                check_rows(row)
            return math.gcd(4 * size(*ROWS), *rows)
        check_rows(sum(rows))
        return None


class ScheduleState(NamedTuple):
    count: jax.Array  # int32, updates done
    peak: jax.Array  # of JAX's default float type, peak learning rate
    total: jax.Array  # of the same type, length of the run in updates


def rate_at(config: OptimizerConfig, state: ScheduleState) -> jax.Array:
    """Give the learning rate of the update that comes next."""
    step = state.count.astype(jnp.float32)
    warm = jnp.ceil(config.warmup * state.total)
    rise = jnp.minimum(1.0, (step + 1.0) / jnp.maximum(warm, 1.0))
    done = jnp.clip((step - warm) / jnp.maximum(state.total - warm, 1.0), min=0.0, max=1.0)
    fall = {"cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * done)), "linear": 1.0 - done, "constant": 1.0}[config.schedule]
    return state.peak * rise * fall


def schedule(config: OptimizerConfig) -> optax.GradientTransformation:
    """Scale by minus the learning rate: linear warm-up, then the decay of `config.schedule`."""

    def init(params):
        return ScheduleState(jnp.int32(0), jnp.asarray(config.learning_rate, float), jnp.asarray(1.0, float))

    def update(updates, state, params=None):
        rate = rate_at(config, state)
        updates = jax.tree.map(lambda u: -rate * u, updates)
        return updates, state._replace(count=state.count + 1)

    return optax.GradientTransformation(init, update)


def _decays(params: PyTree) -> Any:
    # Stacked blocks give every leaf a leading L, so a bias has two axes: decide by name.
    def decays(path, x):
        return getattr(path[-1], "key", "") in ("kernel", "table")

    return jax.tree_util.tree_map_with_path(decays, params)


@functools.cache
def _adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity(),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=_decays) if config.weight_decay else optax.identity(),
        schedule(config),
    )


def adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    """Build the transformation. Configs that differ in learning rate alone give the same object, hence one program."""
    names = [field.name for field in dataclasses.fields(OptimizerConfig)]  # a TrainConfig has more
    return _adamw(OptimizerConfig(**{**{name: getattr(config, name) for name in names}, "learning_rate": 0.0}))


def set_schedule(state: State, *, learning_rate: Any, total: Any) -> State:
    """Write the peak learning rate and the run length, in updates, into a fresh state; of K members, K of each."""

    def write(node):
        if isinstance(node, ScheduleState):
            kind = node.peak.dtype
            return node._replace(peak=jnp.asarray(learning_rate, kind), total=jnp.asarray(total, kind))
        return node

    is_schedule = lambda node: isinstance(node, ScheduleState)  # noqa: E731
    return state._replace(opt_state=jax.tree.map(write, state.opt_state, is_leaf=is_schedule))
