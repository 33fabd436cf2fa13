"""The truth: train again without a dataset, and see whose loss is higher.

    influence of k on q = L(q | trained without k) - L(q | trained on all)

All runs (everything, each dataset left out, random halves of the datasets; for every seed) are members of one program.
Runs of a seed are pairs: they start from the same parameters and visit what they share in the same relative order, for
order is a function of (seed, id, epoch).
Shapes: K datasets, Q queries, O seeds, J random subsets, M members.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxforget import checks, files
from jaxforget.data.sampling import hash64, id_keys
from jaxforget.data.tokens import Examples, concatenate, same_widths
from jaxforget.errors import UserError
from jaxforget.influence.losses import set_losses
from jaxforget.models.sharding import host
from jaxforget.training.batches import AnyBatches, Batches, Stream
from jaxforget.training.checkpoints import Checkpoints
from jaxforget.training.ensemble import MemberBatches, Members, join_parts, member, members
from jaxforget.training.gradients import mean_gradient
from jaxforget.training.loop import fit
from jaxforget.training.optimizer import TrainConfig, adamw, set_schedule
from jaxforget.training.step import Objective, Parts, make_step
from jaxforget.training.trainable import everything


@dataclasses.dataclass(frozen=True, kw_only=True)
class TruthConfig:
    """How to retrain."""

    seeds: int = 3
    """Seeds of initialisation and data order."""
    subsets: int = 0
    """Random subsets of half of the datasets, besides each one left out."""
    protocol: Literal["fixed_steps", "conventional"] = "fixed_steps"
    """fixed_steps: every run has as many steps as the one on all datasets, so that the others are seen more often.
    conventional: as many epochs, so that runs without large datasets are shorter."""
    members: Members = "auto"
    """How one program trains many models; auto is map on a CPU and vmap elsewhere."""
    width: int = 0
    """Runs in one program, which bounds memory; 0 is all."""
    checkpoint_every: int = 200
    """Steps between checkpoints; 0 is none on the way."""

    def __post_init__(self):
        checks.at_least(1, named="--retrain.", seeds=self.seeds)
        checks.at_least(0, named="--retrain.", subsets=self.subsets, width=self.width,
                        checkpoint_every=self.checkpoint_every)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Truth:
    """Losses of the queries after every run, nats a token."""

    datasets: tuple[str, ...]
    queries: tuple[str, ...]
    full_OQ: np.ndarray
    without_OKQ: np.ndarray
    subset_OJQ: np.ndarray
    kept_JK: np.ndarray  # bool: what each random subset holds
    about: dict[str, Any] = dataclasses.field(default_factory=dict)  # protocol, steps, seconds, forward tokens

    @property
    def influence_OKQ(self) -> np.ndarray:
        """Positive where the dataset helps the query, by seed."""
        return self.without_OKQ - self.full_OQ[:, None]

    def save(self, path: Path) -> None:
        """Write one .npz, completely or not at all."""
        arrays = {name: getattr(self, name) for name in ("full_OQ", "without_OKQ", "subset_OJQ", "kept_JK")}
        text = json.dumps({"datasets": self.datasets, "queries": self.queries, "about": self.about})
        files.save_arrays(path, about=np.array(text), **arrays)


def load_truth(path: Path) -> Truth:
    """Read what `save` wrote. Raises UserError where it is something else."""
    try:
        with np.load(path) as saved:
            about = json.loads(str(saved["about"]))
            arrays = {name: saved[name] for name in ("full_OQ", "without_OKQ", "subset_OJQ", "kept_JK")}
        return Truth(tuple(about["datasets"]), tuple(about["queries"]), **arrays, about=about["about"])
    except (OSError, EOFError, KeyError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a truth.npz that eval.influence or benchmarks.untrac wrote ({error})") from None



# ------------------------------------------------------------------------------------------------------------ runs


@dataclasses.dataclass(frozen=True, eq=False)
class Cut:
    """The first `steps` of batches."""

    batches: AnyBatches
    steps: int

    @property
    def tokens(self) -> int:
        return self.batches.tokens_until(self.steps)

    def tokens_until(self, steps: int) -> int:
        return self.batches.tokens_until(steps)

    def count(self, start: int, stop: int) -> int:
        return self.batches.count(start, stop)

    def take(self, start: int, stop: int, size: int) -> dict[str, np.ndarray]:
        return self.batches.take(start, stop, size)


def subsets(names: Sequence[str], count: int) -> np.ndarray:
    """Draw subsets of half of the datasets, bool (J, K): a function of their names and the subset's number."""
    key_K = id_keys(names)
    draws_JK = hash64(np.arange(count, dtype=np.uint64)[:, None], key_K[None]).reshape(count, len(names))
    return draws_JK.argsort(axis=1).argsort(axis=1) < len(names) // 2


def run_batches(
    train: Mapping[str, Examples], kept_K: Sequence[bool], config: TrainConfig, seed: int, steps: int
) -> AnyBatches:
    """Give the batches of a run on some of the datasets. steps: how many, or 0 for all epochs of what is kept."""
    kept = [examples for examples, keep in zip(train.values(), kept_K, strict=True) if keep]
    batches = Batches((Stream(concatenate(kept), config.batch_size),), config.epochs, seed, "token")
    if not steps or batches.steps == steps:
        return batches
    epochs = -(-steps // batches.steps_per_epoch)
    return Cut(dataclasses.replace(batches, epochs=epochs), steps)


def retrain(
    objective: Objective,
    params: Callable[[int], Any],
    train: Mapping[str, Examples],
    queries: Mapping[str, Examples],
    config: TruthConfig,
    training: TrainConfig,
    directory: Path,
    *,
    seed: int = 0,
    keep: Callable[[int, int, Any], None] | None = None,
    keep_every: int = 0,
    **loop: Any,
) -> Truth:
    """Train every run and evaluate the queries. Finished programs are not run again.

    params(seed): what the runs of a seed start from. keep(seed, step, params) gets the model of each full run at its
    end, and every `keep_every` steps. Further arguments go to `fit`.
    """
    names, K = tuple(train), len(train)
    if K < 2:
        raise UserError("the truth leaves one dataset out at a time; give two or more")
    train = dict(zip(names, same_widths(list(train.values())), strict=True))  # members share a shape
    seeds = range(seed, seed + config.seeds)
    kept_JK = subsets(names, config.subsets)
    kept_RK = np.concatenate([np.ones((1, K), bool), ~np.eye(K, dtype=bool), kept_JK])
    steps = run_batches(train, kept_RK[0], training, seed, 0).steps
    fixed = steps if config.protocol == "fixed_steps" else 0
    runs = [(one, kept_K) for one in seeds for kept_K in kept_RK]
    width = config.width or len(runs)
    directory.mkdir(parents=True, exist_ok=True)
    gradient = mean_gradient(training.microbatch_of(training.batch_size))
    step = make_step(objective, everything(), gradient, adamw(training))
    losses_MQ, seconds, tokens = [], 0.0, 0.0
    for first in range(0, len(runs), width):
        group, file = runs[first : first + width], directory / f"runs{first}.npz"
        if not file.exists():
            batches = [run_batches(train, kept_K, training, one, fixed) for one, kept_K in group]
            made = _group(objective, params, queries, config, training, step, group, batches, directory, keep,
                          keep_every, **loop)  # fmt: skip
            files.save_arrays(file, **made)
        with np.load(file) as saved:
            losses_MQ.append(saved["losses_MQ"])
            seconds, tokens = seconds + float(saved["seconds"]), tokens + float(saved["tokens"])
    losses_ORQ = np.concatenate(losses_MQ).reshape(config.seeds, len(kept_RK), len(queries))
    about = {"protocol": config.protocol, "steps": steps, "seed": seed, "runs": len(runs), "seconds": seconds,
             "forward_tokens": 3.0 * tokens}  # fmt: skip
    return Truth(names, tuple(queries), losses_ORQ[:, 0], losses_ORQ[:, 1 : K + 1], losses_ORQ[:, K + 1 :], kept_JK,
                 about)  # fmt: skip


def _group(objective, params, queries, config, training, step, group, batches, directory, keep, keep_every, **loop):
    """Train some of the runs in one program."""
    begin = {one: params(one) for one in dict.fromkeys(one for one, _ in group)}  # runs of a seed share it
    own, parts = join_parts([{"model": begin[one]} for one, _ in group])
    lifted = members(step, config.members, own)
    state, frozen = lifted.init([jax.random.key(one) for one, _ in group], parts)
    rates = [training.learning_rate] * len(group)
    state = set_schedule(state, learning_rate=rates, total=[rows.steps for rows in batches])
    full = [(m, one) for m, (one, kept_K) in enumerate(group) if all(kept_K)]
    seen = 0

    def evaluate(at: int, parts_M: Parts) -> bool:
        nonlocal seen
        if at > seen and keep is not None:
            seen = at
            for m, one in full:
                keep(one, at, host(member(parts_M["model"], m)))
        return False

    scratch = directory / "checkpoints"
    with Checkpoints(scratch) as store:
        outcome = fit(
            lifted, state, frozen, MemberBatches(tuple(batches)), evaluate=evaluate, evaluate_every=keep_every,
            checkpoints=store, checkpoint_every=config.checkpoint_every, **loop,
        )  # fmt: skip
    parts_M = lifted.combine(frozen, outcome.state.trainable)
    evaluate(outcome.steps, parts_M)
    found = [set_losses(objective, parts_M["model"], one, how=config.members).mean_K for one in queries.values()]
    files.remove(scratch)
    return {"losses_MQ": np.stack(found, axis=1), "seconds": outcome.seconds, "tokens": float(outcome.tokens)}
