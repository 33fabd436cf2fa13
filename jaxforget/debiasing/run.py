"""Train modules: gates that close, pruning to the budget, and the values that are left.

Modules train as members of one program: attributes over the same frozen core, seeds, or both. Shapes: K members, J
modules of a member, N parameters that may differ.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxforget import checks
from jaxforget.data.tokens import Examples
from jaxforget.debiasing.differences import difference, fixed, gated, layout_of, sparse
from jaxforget.debiasing.gates import GateConfig, stretched
from jaxforget.debiasing.objective import RemovalConfig, debiasing, draw_adversaries
from jaxforget.debiasing.optimizer import grouped, module_groups
from jaxforget.models import Model
from jaxforget.models.sharding import ROWS, host, size
from jaxforget.training.batches import AnyBatches, Batches, Stream
from jaxforget.training.checkpoints import Checkpoints
from jaxforget.training.ensemble import MemberBatches, Members, join_parts, member, members
from jaxforget.training.gradients import mean_gradient
from jaxforget.training.loop import fit
from jaxforget.training.optimizer import OptimizerConfig, set_schedule
from jaxforget.training.step import Objective, State, Trainable, make_step
from jaxforget.training.trainable import subset


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModuleConfig:
    """How modules are trained. Rates and clipping: the released code of arXiv 2205.15171, but separate."""

    regime: Literal["post", "par", "task"] = "post"
    """post: over a finished, frozen core. par: beside the core. task: over frozen weights, and the head trains too."""
    epochs: int = 15
    """Passes with gates; then the difference is pruned."""
    fixed_epochs: int = 15
    """Passes that train the values that are left."""
    batch_size: int = 64
    """Examples in a batch."""
    learning_rate: float = 2e-5
    """Of the values of a difference."""
    gate_rate: float = 0.1
    """Learning rate of the gates."""
    adversary_rate: float = 1e-4
    """Learning rate of the adversaries."""
    core_rate: float = 2e-5
    """Learning rate of the core and its head, in the regime par."""
    max_grad_norm: float = 1.0
    """Clip the gradient of every group to this norm; 0 does not clip."""
    head: Literal["shared", "frozen"] = "shared"
    """par: whether the losses with modules on train the task head too."""
    strict: bool = False
    """Drop ties at the cut-off as the released code does, instead of using the whole budget."""
    differs: tuple[str, ...] = (".*",)
    """Parameters that may differ, as regular expressions for paths; the head never does."""

    def __post_init__(self):
        checks.at_least(1, epochs=self.epochs, batch_size=self.batch_size)
        checks.at_least(0, fixed_epochs=self.fixed_epochs, max_grad_norm=self.max_grad_norm)
        checks.positive(learning_rate=self.learning_rate, gate_rate=self.gate_rate, adversary_rate=self.adversary_rate,
                        core_rate=self.core_rate)  # fmt: skip


class Learner(NamedTuple):
    """A member: what it starts from, what it learns from, and which attributes its modules take out."""

    params: Any
    examples: Examples  # with the column attributes, int32 (N, attributes)
    shares: list[np.ndarray]  # of the classes of every attribute
    targets: tuple[tuple[int, ...], ...]  # for every module the attributes it takes out
    seed: int


class Slots(NamedTuple):
    """How members are fed and differentiated, where it is not the plain way: privately, say."""

    batches: Sequence[AnyBatches]  # of every member
    gradient: Any = mean_gradient()  # as in training/step.py
    noise: optax.GradientTransformation | None = None  # what gradients go through before the optimizer
    prepare: Callable[[State], State] = lambda state: state  # completes the fresh states of all members


class Gated(NamedTuple):
    """A member after the first phase."""

    params: Any
    adversary: Any
    values_JN: np.ndarray  # z * w, gates without noise


class Fixed(NamedTuple):
    """A member after the second phase."""

    params: Any
    modules: list[dict[str, np.ndarray]]  # {"place", "value"}


def shares_of(attributes_NJ: np.ndarray, classes: Sequence[int]) -> list[np.ndarray]:
    """Return the share of every class among the rows whose attribute is known; of one that does not occur, a row's."""
    found = []
    for attribute_N, count in zip(attributes_NJ.T, classes, strict=True):
        known_N = attribute_N[attribute_N >= 0]
        found.append((np.maximum(np.bincount(known_N, minlength=count), 1) / max(len(known_N), 1)).astype(np.float32))
    return found


def train_gated(
    model: Model,
    learners: Sequence[Learner],
    config: ModuleConfig,
    gates: GateConfig,
    removal: RemovalConfig,
    **loop: Any,
) -> list[Gated]:
    """Run the first phase of all members in one program."""
    layout = layout_of(model, config.differs)
    trainable = gated(layout, gates, len(learners[0].targets), **_besides(model, learners[0], config))
    objective = debiasing(model, removal, learners[0].targets, core=config.regime == "par", gates=gates)
    parts = [_parts(model, learner, removal) for learner in learners]

    @jax.jit
    def open_share(modules_K):
        return [jnp.mean(stretched(module["alpha"], gates) > 0) for module in modules_K]

    def density(moving_K):
        """Share of gates that are open without noise, by module, mean over members."""
        return list(map(float, open_share(moving_K["modules"])))

    trained = _train(objective, trainable, learners, parts, config, config.epochs, density=density, **loop)
    settle = jax.jit(lambda module: difference(layout, gates, module))
    return [
        Gated(one.params if config.regime == "post" else part["model"], part["adversary"],
              np.stack([np.asarray(settle(m)) for m in moving["modules"]]))
        for one, (part, moving) in zip(learners, trained, strict=True)
    ]  # fmt: skip


def train_fixed(
    model: Model,
    learners: Sequence[Learner],
    found: Sequence[Gated],
    density: float,
    config: ModuleConfig,
    removal: RemovalConfig,
    **loop: Any,
) -> list[Fixed]:
    """Prune to a density and run the second phase of all members in one program."""
    layout = layout_of(model, config.differs)
    trainable = fixed(layout, len(learners[0].targets), **_besides(model, learners[0], config))
    objective = debiasing(model, removal, learners[0].targets, core=config.regime == "par", gates=None)
    parts = [
        _parts(model, learner, removal) | {
            "model": one.params, "adversary": one.adversary,
            "modules": [sparse(value_N, density, strict=config.strict) for value_N in one.values_JN],
        }
        for learner, one in zip(learners, found, strict=True)
    ]  # fmt: skip
    if not config.fixed_epochs:
        return [Fixed(part["model"], part["modules"]) for part in parts]
    trained = _train(objective, trainable, learners, parts, config, config.fixed_epochs, **loop)
    return [Fixed(part["model"], part["modules"]) for part, _ in trained]


def train_whole(
    model: Model, learners: Sequence[Learner], config: ModuleConfig, removal: RemovalConfig, epochs: int, **loop: Any
) -> list[Any]:
    """Debias whole models, without modules: the full-parameter baseline. Without attributes: train the task alone.

    Their learning rate is config.core_rate. Returns the parameters of every member.
    """
    objective = debiasing(model, removal, learners[0].targets, gates=None)
    parts = [_parts(model, learner, removal) for learner in learners]
    moving = subset("model/.*", *_adversaries(learners[0]))
    trained = _train(objective, moving, learners, parts, config, epochs, **loop)
    return [part["model"] for part, _ in trained]


def _besides(model: Model, learner: Learner, config: ModuleConfig) -> dict[str, Any]:
    """Say what trains in full beside the modules, and whether the losses with a module on train the head."""
    head = "|".join(name for name in model.shapes() if name not in model.headless.shapes())
    moving = {"post": (), "par": ("model/.*",), "task": (f"model/({head})/.*",)}[config.regime]
    learns = config.regime == "task" or (config.regime == "par" and config.head == "shared")
    return {"others": (*moving, *_adversaries(learner)), "head": learns}


def _adversaries(learner: Learner) -> tuple[str, ...]:
    return ("adversary/.*",) if learner.shares else ()


def _parts(model: Model, learner: Learner, removal: RemovalConfig) -> dict[str, Any]:
    key = jax.random.fold_in(jax.random.key(learner.seed), 2)
    return {"model": learner.params, "shares": [jnp.asarray(share) for share in learner.shares],
            "adversary": draw_adversaries(key, removal, width_of(model), learner.shares)}  # fmt: skip


def width_of(model: Model) -> int:
    """Return the width of what the head reads."""
    return jax.eval_shape(lambda p: model.pooled(p, {"tokens": jnp.zeros((1, 2), jnp.int32)}), model.shapes()).shape[1]


def _train(
    objective: Objective,
    trainable: Trainable,
    learners: Sequence[Learner],
    parts: list[dict[str, Any]],
    config: ModuleConfig,
    epochs: int,
    *,
    how: Members = "auto",
    checkpoints: Path | None = None,
    log: Callable[[int, dict[str, Any]], None] = lambda step, metrics: None,
    density: Callable[[dict[str, Any]], list[float]] | None = None,
    slots: Slots | None = None,
    **loop: Any,
) -> list[tuple[dict[str, Any], Any]]:
    """Train all members; returns for each its parts on the host and what moved.

    how: members one after the other or side by side. log gets the metrics of every step, and once an epoch `density`.
    slots: plain ones if not given. loop: what else `fit` takes.
    """
    groups = module_groups(
        len(learners[0].targets), gate_rate=config.gate_rate / config.learning_rate,
        adversary_rate=config.adversary_rate / config.learning_rate, core_rate=config.core_rate / config.learning_rate,
    )  # fmt: skip
    settings = OptimizerConfig(schedule="constant", warmup=0.0, max_grad_norm=config.max_grad_norm)
    optimizer = grouped(groups, settings)
    if slots is None:
        rows = [min(config.batch_size, (n := len(one.examples)) + -n % size(*ROWS)) for one in learners]
        slots = Slots([Batches((Stream(one.examples, few),), epochs, one.seed)
                       for one, few in zip(learners, rows, strict=True)])  # fmt: skip
    elif slots.noise is not None:
        optimizer = optax.chain(slots.noise, optimizer)
    step = make_step(objective, trainable, slots.gradient, optimizer)
    own, parts_K = join_parts(parts)  # a core that all members start from is held once
    lifted = members(step, how, own)
    batches = MemberBatches(tuple(slots.batches))
    key_K = jnp.stack([jax.random.key(one.seed) for one in learners])
    state, frozen = jax.jit(lifted.init)(key_K, parts_K)
    rate_K = np.full(len(learners), config.learning_rate, np.float32)
    state = set_schedule(state, learning_rate=rate_K, total=np.asarray([one.steps for one in slots.batches]))
    state = slots.prepare(state)
    loop["log"] = log

    if density is not None:

        def watch(done: int, moving_K: Any) -> bool:
            log(done, {"density": density(moving_K)})
            return False

        loop |= {"evaluate": watch, "evaluate_every": batches.steps // epochs}
    with Checkpoints(checkpoints) if checkpoints else contextlib.nullcontext() as store:
        outcome = fit(lifted._replace(combine=_moving), state, frozen, batches, checkpoints=store, **loop)
    moving_K = outcome.state.trainable
    both_K = host((jax.jit(lifted.combine)(frozen, moving_K), moving_K))
    return [member(both_K, k) for k in range(len(learners))]


def _moving(frozen, moving, key=None):
    """Give what is looked at while training: gates, for which no model need be put together."""
    return moving
