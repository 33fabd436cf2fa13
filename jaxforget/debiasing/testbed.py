"""What a classifier's representation tells of attributes, beside its task and the fairness of its decisions.

A row for every model: task accuracy, and for every attribute the balanced accuracy of fresh attackers, the label-only
floor below which it falls only at the price of the task, and the gaps between groups. Shapes: N examples, D width, J
attributes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxforget.data.tokens import Examples
from jaxforget.debiasing.composition import merged, sets_of
from jaxforget.debiasing.data import SETS
from jaxforget.debiasing.modules import Module
from jaxforget.debiasing.run import Learner, shares_of
from jaxforget.metrics.groups import group_metrics
from jaxforget.metrics.leakage import AttackConfig, Split, attack, balanced_accuracy, embed, label_floor, predict
from jaxforget.metrics.leakage_erasure import fit_eraser
from jaxforget.models import Model, Params
from jaxforget.report.statistics import over_seeds


class Testbed:
    """Encoded sets with labels and attributes, and what models tell of them. A class, to keep what all rows share."""

    def __init__(self, examples: Mapping[str, Examples], names: Mapping[str, tuple[str, ...]], labels: Sequence[str]):
        self.examples, self.names, self.labels = dict(examples), dict(names), tuple(labels)
        columns = {name: part.columns for name, part in self.examples.items()}
        self.label = {name: part["label"] for name, part in columns.items()}
        self.attributes = {name: part["attributes"] for name, part in columns.items()}
        self.floors = {
            name: label_floor(self.label["train"], self.attributes["train"][:, j], self.label["test"],
                              self.attributes["test"][:, j], len(values))
            for j, (name, values) in enumerate(names.items())
        }  # fmt: skip

    @property
    def classes(self) -> tuple[int, ...]:
        """Give the number of values of every attribute."""
        return tuple(map(len, self.names.values()))

    def learner(
        self, params: Params, attributes: tuple[int, ...], targets: tuple[tuple[int, ...], ...], seed: int
    ) -> Learner:
        """Say what a member starts from and learns from: a column for each of the attributes."""
        column_NJ, examples = self.attributes["train"][:, list(attributes)], self.examples["train"]
        examples = dataclasses.replace(examples, columns=examples.columns | {"attributes": column_NJ})
        return Learner(params, examples, shares_of(column_NJ, [self.classes[j] for j in attributes]), targets, seed)

    def embeddings(self, model: Model, params: Params) -> dict[str, np.ndarray]:
        """Return what the head reads of every set."""
        return {name: embed(model, params, part) for name, part in self.examples.items()}

    def row(
        self,
        name: str,
        model: Model,
        params: Params,
        config: AttackConfig,
        seed: int,
        change: Callable[[np.ndarray], np.ndarray] = lambda x_ND: x_ND,
    ) -> dict[str, Any]:
        """Attack and score one model. Percent; gaps are shares. change: of the embeddings, such as an erasure."""
        x = {set_: change(x_ND) for set_, x_ND in self.embeddings(model, params).items()}
        predicted_N, label_N = predict(model, params, x["test"]), self.label["test"]
        row: dict[str, Any] = {
            "name": name,
            "accuracy": float(100.0 * (predicted_N == label_N).mean()),
            "balanced_accuracy": balanced_accuracy(predicted_N, label_N, len(self.labels)),
        }
        for j, (attribute, values) in enumerate(self.names.items()):
            train, valid, test = (Split(x[set_], self.attributes[set_][:, j]) for set_ in SETS)
            found = attack(train, valid, test, len(values), config, seed)
            row |= {f"leakage_{attribute}": found["balanced_accuracy"], f"floor_{attribute}": self.floors[attribute]}
            group_N = self.attributes["test"][:, j]
            row |= {f"{measure}_{attribute}": value for measure, value in
                    gaps(predicted_N, label_N, group_N, len(self.labels), len(values)).items()}  # fmt: skip
        return row

    def erasers(self, model: Model, params: Params) -> dict[str, Any]:
        """Fit LEACE to every attribute, and to all where there are several."""
        x_ND, attributes_NJ = self.embeddings(model, params)["train"], self.attributes["train"]
        found = {f"LEACE {name}": fit_eraser(x_ND, attributes_NJ[:, j]) for j, name in enumerate(self.names)}
        if len(self.names) > 1:
            found[f"LEACE {'+'.join(self.names)}"] = fit_eraser(x_ND, attributes_NJ)
        return found

    def fields(self) -> tuple[str, ...]:
        """Return the columns of tables."""
        measures = ("leakage", "floor", "eo_max")
        return ("name", "accuracy", "balanced_accuracy",
                *(f"{measure}_{name}" for name in self.names for measure in measures))  # fmt: skip


def gaps(
    predicted_N: np.ndarray, label_N: np.ndarray, group_N: np.ndarray, classes: int, groups: int
) -> dict[str, float | None]:
    """Return eo_max and demographic_parity, the largest over classes, each against the rest; null without examples."""
    known_N = group_N >= 0
    found = [
        jax.device_get(_group_metrics(predicted_N[known_N] == c, label_N[known_N] == c, group_N[known_N], groups))
        for c in (range(classes) if classes > 2 else [1])
    ]
    worst = {name: float(np.max([one[name] for one in found])) for name in ("eo_max", "demographic_parity")}
    return {name: value if np.isfinite(value) else None for name, value in worst.items()}


_group_metrics = jax.jit(group_metrics, static_argnums=3)


def measured(
    testbed: Testbed,
    model: Model,
    params: Params,
    modules: Mapping[str, Module],
    compose: str,
    attack: AttackConfig,
    seeds: int,
) -> list[dict[str, Any]]:
    """Return the rows: the base, each module on, all on, and the base after LEACE."""
    erasers = testbed.erasers(model, params)
    runs = []
    for seed in range(seeds):
        rows = [testbed.row("core", model, params, attack, seed)]
        for names in sets_of(modules):
            on = merged(params, {name: modules[name] for name in names}, compose)
            rows.append(testbed.row("+".join(names), model, on, attack, seed))
        rows += [testbed.row(name, model, params, attack, seed, eraser) for name, eraser in erasers.items()]
        runs.append(rows)
    return over_seeds(runs)
