"""What influence is asked of, and what an answer is: one interface for every method.

Sign, everywhere: influence = loss after minus loss before, so positive means that the dataset helps the query.
Shapes: K training datasets, Q queries (test sets), N examples of a dataset.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxforget.data.tokens import Examples
from jaxforget.training.step import Objective, Parts


class Question(NamedTuple):
    """Which of the training datasets cause the loss on which of the queries.

    The loss of a set is the mean over its scored tokens, in nats, whatever its batches.
    """

    objective: Objective  # losses_B, mean over the scored tokens of an example, times factor_B
    parts: Parts  # parts["model"]: the parameters after training on all datasets
    train: Mapping[str, Examples]  # K
    queries: Mapping[str, Examples]  # Q
    seed: int = 0
    checkpoints: tuple[tuple[float, Any], ...] = ()  # learning rate and parts["model"], for TracIn


@dataclasses.dataclass(frozen=True)
class Answer:
    """The influence of every dataset on every query."""

    scores_KQ: np.ndarray  # float64
    examples: Mapping[str, np.ndarray] | None = None  # by dataset (N, Q), where a method has them
    curves: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # what was watched on the way, by name
    notes: tuple[str, ...] = ()  # sentences about what went wrong or needs care


class Method(Protocol):
    """A frozen config."""

    def answer(self, question: Question) -> Answer: ...
