"""What influence is asked of, and what an answer is: one interface for every method.

Sign, everywhere: influence = loss after minus loss before, so positive means that the dataset helps the query.
Shapes: K training datasets, Q queries (test sets), N examples of a dataset.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np

from jaxforget.data.tokens import Examples
from jaxforget.influence.losses import SetLosses, set_losses
from jaxforget.training.step import Objective, Parts


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """Which of the training datasets cause the loss on which of the queries.

    The loss of a set is the mean over its scored tokens, in nats, whatever its batches.
    """

    objective: Objective  # losses_B, mean over the scored tokens of an example, times factor_B
    parts: Parts  # parts["model"]: the parameters after training on all datasets
    train: Mapping[str, Examples]  # K
    queries: Mapping[str, Examples]  # Q
    seed: int = 0
    checkpoints: tuple[tuple[float, Any], ...] = ()  # learning rate and parts["model"], for TracIn
    chance: float = float("inf")  # loss of a uniform guess: the log of the vocabulary's size
    anchored: Objective | None = None  # the objective where stream 0, elsewhere KL to parts["reference"]
    drawn: Objective | None = None  # the objective with labels that the model draws, for EK-FAC

    @functools.cached_property
    def query_losses(self) -> dict[str, SetLosses]:
        """Losses of the queries before anything is unlearned."""
        return self._losses(self.queries)

    @functools.cached_property
    def train_losses(self) -> dict[str, SetLosses]:
        """Losses of the datasets before anything is unlearned."""
        return self._losses(self.train)

    def _losses(self, sets: Mapping[str, Examples]) -> dict[str, SetLosses]:
        model_K = jax.tree.map(lambda x: x[None], self.parts["model"])
        return {name: set_losses(self.objective, model_K, examples) for name, examples in sets.items()}


@dataclasses.dataclass(frozen=True)
class Answer:
    """The influence of every dataset on every query."""

    scores_KQ: np.ndarray  # float64
    examples: Mapping[str, np.ndarray] | None = None  # by dataset (N, Q), where a method has them
    curves: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # what was watched on the way, by name
    notes: tuple[str, ...] = ()  # sentences about what went wrong or needs care
    forward_tokens: float = 0.0  # the cost; a token that is differentiated as well counts 3


class Method(Protocol):
    """A frozen config."""

    def answer(self, question: Question) -> Answer: ...
