"""UnTrac and UnTrac-Inv: unlearn a set by ascent, and see whose loss rises.

UnTrac unlearns every dataset and scores the queries; UnTrac-Inv unlearns every query and scores the datasets, by
forward passes alone. Ascent is the ordinary step on a stream of factor -1: the optimiser sees the gradient of the
negated mean loss, without clipping, from a fresh state. Unlearned sets, learning rates and orders are members of one
program. Source: arXiv 2401.15241, equations 2-4. Its equation 1 has the sign of the truth the other way round.
Shapes: K datasets, Q queries, N examples of a set, M members, R rates, O orders, S steps that were watched.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np

from jaxforget import checks
from jaxforget.data.sampling import order
from jaxforget.data.tokens import Examples, concatenate, same_widths
from jaxforget.errors import UserError
from jaxforget.influence.losses import SetLosses, set_losses
from jaxforget.influence.optimizers import ascent_optimizer
from jaxforget.influence.question import Answer, Question
from jaxforget.models.sharding import ROWS, size
from jaxforget.training.batches import Batches, Stream
from jaxforget.training.ensemble import MemberBatches, Members, members
from jaxforget.training.gradients import mean_gradient
from jaxforget.training.loop import fit
from jaxforget.training.optimizer import set_schedule
from jaxforget.training.step import Parts, make_step
from jaxforget.training.trainable import everything

Optimizer = Literal["adam", "adafactor", "rmsprop", "sgd", "momentum"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AscentConfig:
    """How to ascend."""

    optimizer: Optimizer = "adam"
    """Optimiser by torch's definition, see influence/optimizers.py."""
    learning_rate: float = 5e-5
    """Constant learning rate."""
    collapse: float = 2.0
    """Note the step at which a loss is above so many times that of a uniform guess, or not finite."""
    kl_weight: float = 0.0
    """Hold on to theta0 by this weight of the KL divergence to it on batches of all datasets; 0 does not."""
    l2: float = 0.0
    """Hold on to theta0 by this weight of half the squared distance to it; 0 does not."""
    microbatch: int | None = None
    """Examples differentiated at a time; 0 is the whole batch. Not given: up to 4 on a CPU, else 0."""
    members: Members = "auto"
    """How one program unlearns many sets; auto is map on a CPU and vmap elsewhere."""
    width: int = 0
    """Sets unlearned in one program, which bounds memory; 0 is all."""

    def __post_init__(self):
        ascent_optimizer(self.optimizer)  # tells a wrong name
        checks.at_least(0, learning_rate=self.learning_rate, collapse=self.collapse, kl_weight=self.kl_weight,
                        l2=self.l2, width=self.width)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnTrac(AscentConfig):
    """score = L(query) after ascent on the dataset, minus before."""

    batch_size: int = 1
    """Examples of a step."""
    epochs: int = 1
    """Passes over a dataset, each a permutation."""
    limit: int = 0
    """Examples of a dataset that are unlearned, drawn by their ids; 0 is all."""
    orders: int = 1
    """Runs with different permutations, and draws of examples, whose scores are averaged."""
    every: int = 0
    """Steps between evaluations of the queries on the way; 0 is only at the end."""

    def __post_init__(self):
        super().__post_init__()
        checks.at_least(1, batch_size=self.batch_size, epochs=self.epochs, orders=self.orders)
        checks.at_least(0, limit=self.limit, every=self.every)
        if self.microbatch and self.batch_size % self.microbatch:
            raise UserError(f"microbatch {self.microbatch} does not divide batch_size {self.batch_size}")

    def answer(self, question: Question) -> Answer:
        return answers(self, question, (self.learning_rate,))[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnTracInv(AscentConfig):
    """score = L(dataset) after full-batch ascent on the query, minus before."""

    steps: int = 5
    """Steps, each on all examples of the query."""
    sums: bool = False
    """Sum over the examples of a dataset, as equation 4 does, instead of their mean: large datasets then count for
    more. In units of a dataset of mean size."""

    def __post_init__(self):
        super().__post_init__()
        checks.at_least(1, steps=self.steps)

    def answer(self, question: Question) -> Answer:
        return answers(self, question, (self.learning_rate,))[0]


def answers(method: UnTrac | UnTracInv, question: Question, rates: Sequence[float]) -> list[Answer]:
    """Answer with each of several learning rates; all of them are members of one program."""
    if isinstance(method, UnTracInv):
        return _inverse(method, question, tuple(rates))
    return _forward(method, question, tuple(rates))


# ------------------------------------------------------------------------------------------------ two directions


def _forward(method: UnTrac, question: Question, rates: tuple[float, ...]) -> list[Answer]:
    runs = []
    for rate in rates:
        for seed in range(question.seed, question.seed + method.orders):
            for examples in question.train.values():
                drawn = examples.take(order(examples.columns["key"], seed, 0)[: method.limit or None])
                runs.append(Run(drawn, method.epochs, rate, seed))
    microbatch = math.gcd(4 * size(*ROWS), method.batch_size) if jax.default_backend() == "cpu" else 0
    microbatch = microbatch if method.microbatch is None else method.microbatch
    steps, after = ascend(method, question, runs, method.batch_size, microbatch, method.every, question.queries)
    shape = (len(steps), len(rates), method.orders, len(question.train))
    losses_SROKQ = np.stack([one.mean_K.reshape(shape) for one in after.values()], axis=-1)
    base_Q = np.array([one.mean_K[0] for one in question.query_losses.values()])
    tokens = 3.0 * sum(int(run.examples.lengths.sum()) * run.epochs for run in runs)
    tokens += (len(runs) * len(steps) + 1) * sum(int(one.lengths.sum()) for one in question.queries.values())
    results = []
    for r in range(len(rates)):
        changes_SKQ = losses_SROKQ[:, r].mean(axis=1) - base_Q
        left_KQ, notes = _left(method, question, steps, losses_SROKQ[:, r].max(axis=1))
        curves = {"step": np.array(steps), "query_change": changes_SKQ, "collapsed_at": left_KQ}
        results.append(Answer(changes_SKQ[-1], None, curves, notes, tokens / len(rates)))
    return results


def _inverse(method: UnTracInv, question: Question, rates: tuple[float, ...]) -> list[Answer]:
    runs = [Run(one, method.steps, rate, question.seed) for rate in rates for one in question.queries.values()]
    rows = max(len(run.examples) for run in runs)
    devices = size(*ROWS)
    microbatch = 4 * devices if jax.default_backend() == "cpu" else 0
    microbatch = microbatch if method.microbatch is None else method.microbatch
    rows += -rows % (microbatch or devices)  # rows beyond a query's are filled with weight 0
    steps, after = ascend(method, question, runs, rows, microbatch, 0, question.train)
    base = question.train_losses
    shape = (len(rates), len(question.queries), -1)
    changes = {name: (one.losses_KN[0] - base[name].losses_KN).reshape(shape) for name, one in after.items()}
    losses_KM = np.stack([one.mean_K[0] for one in after.values()])
    base_K1 = np.stack([one.mean_K for one in base.values()])
    size_K = np.array([one.tokens_N.sum() for one in base.values()], np.float64)
    share_K1 = (size_K / size_K.mean())[:, None] if method.sums else 1.0
    tokens = 3.0 * sum(int(run.examples.lengths.sum()) * run.epochs for run in runs)
    tokens += (len(runs) + 1) * sum(int(one.lengths.sum()) for one in question.train.values())
    results = []
    for r, losses_KQ in enumerate(np.split(losses_KM, len(rates), axis=1)):
        by_example = {name: change_RQN[r].T for name, change_RQN in changes.items()}
        left_KQ, notes = _left(method, question, steps, losses_KQ[None])
        scores_KQ = (losses_KQ - base_K1) * share_K1
        results.append(Answer(scores_KQ, by_example, {"collapsed_at": left_KQ}, notes, tokens / len(rates)))
    return results


def _left(
    method: AscentConfig, question: Question, steps: Sequence[int], losses_SKQ: np.ndarray
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the first watched step at which each loss was out of range, NaN where none was, and a note about it."""
    out_SKQ = ~(losses_SKQ <= method.collapse * question.chance)  # NaN is in no range
    left_KQ = np.where(out_SKQ.any(axis=0), np.asarray(steps, np.float64)[out_SKQ.argmax(axis=0)], np.nan)
    if not out_SKQ.any():
        return left_KQ, ()
    k, q = np.argwhere(out_SKQ.any(axis=0))[0]
    pair = f"{list(question.train)[k]} and {list(question.queries)[q]}, step {left_KQ[k, q]:g}"
    return left_KQ, (
        f"{np.isfinite(left_KQ).sum()} of {left_KQ.size} losses went above {method.collapse:g} times that of a uniform "
        f"guess or are not finite, first {pair}: the model is destroyed there; lower the learning rate",
    )


# ------------------------------------------------------------------------------------------------------- ascent


class Run(NamedTuple):
    """A set to be unlearned."""

    examples: Examples
    epochs: int
    rate: float
    seed: int


def ascend(
    method: AscentConfig, question: Question, runs: Sequence[Run], rows: int, microbatch: int, every: int,
    watched: Mapping[str, Examples],
) -> tuple[list[int], dict[str, SetLosses]]:  # fmt: skip
    """Unlearn every run's set from theta0, `rows` examples a step, `method.width` sets side by side.

    Returns the steps at which the watched sets were evaluated, every `every` and the last, and their losses (S, M, N).
    A run that is shorter than others keeps its last values.
    """
    objective, parts = question.objective, {"model": question.parts["model"]}
    anchor: tuple[Stream, ...] = ()
    if method.kl_weight:
        if question.anchored is None:
            raise UserError("kl_weight needs the logits of a language model, which this question does not tell")
        objective, parts = question.anchored, {**parts, "reference": question.parts["model"]}
        anchor = (Stream(concatenate(list(question.train.values())), rows, method.kl_weight),)
    gradient = mean_gradient(microbatch if microbatch and (microbatch < rows or anchor) else None)
    step = make_step(objective, everything(), gradient, ascent_optimizer(method.optimizer, method.l2))
    lifted, width = members(step, method.members), method.width or len(runs)
    wide = same_widths([run.examples for run in runs])
    batches = [
        Batches((Stream(examples, rows, -1.0), *anchor), run.epochs, run.seed, "token")
        for examples, run in zip(wide, runs, strict=True)
    ]
    last = max(one.steps for one in batches)
    stops = sorted({*range(every, last, every), last} if every else {last})
    groups: list[dict[str, list[SetLosses]]] = []
    for first in range(0, len(runs), width):
        group = slice(first, first + width)
        count = len(runs[group])
        idle = -count % size("member")  # members that fill the devices and do nothing
        filled = [*runs[group], *[runs[first]] * idle]
        states, frozen = lifted.init([jax.random.key(run.seed) for run in filled], parts)
        rates = [run.rate for run in filled]
        states = set_schedule(states, learning_rate=rates, total=[1.0] * len(rates))
        seen: dict[int, dict[str, SetLosses]] = {}

        def look(at: int, parts_M: Parts, seen: dict[int, dict[str, SetLosses]] = seen) -> bool:
            if at:
                seen[at] = {
                    name: set_losses(question.objective, parts_M["model"], examples, how=method.members)
                    for name, examples in watched.items()
                }
            return False

        outcome = fit(
            lifted, states, frozen, MemberBatches((*batches[group], *[None] * idle)), chunk=16 if rows < 16 else 1,
            finite=False, evaluate_every=every, evaluate=look,
        )  # fmt: skip
        if outcome.steps not in seen:
            look(outcome.steps, lifted.combine(frozen, outcome.state.trainable))
        ends = [seen[min(stop, outcome.steps)] for stop in stops]
        groups.append({name: [end[name]._replace(losses_KN=end[name].losses_KN[:count]) for end in ends]
                       for name in watched})  # fmt: skip
    return stops, {
        name: SetLosses(
            np.stack([np.concatenate([group[name][s].losses_KN for group in groups]) for s in range(len(stops))]),
            groups[0][name][0].tokens_N,
        )
        for name in watched
    }
