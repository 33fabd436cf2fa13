"""Derived predictors: fit one to the votes of an ensemble, apply it inside jit, draw from it, keep it in a file.

METHODS, after the three of FairSISA, arXiv 2312.07420 (their formulas are derived here, not quoted):

    none      the plain majority vote, nothing fitted
    each      post-process every member by itself, then take the majority of the members' random outputs
    majority  take the majority vote, then post-process it
    count     post-process the number of votes for 1
    vector    post-process the vector of all votes: the optimum of all that see votes and group

The last three have equal odds on the rows they were fitted on. `each` has them only where members are independent given
group and label. On other rows all are approximate, `vector` most of all when members are many.
Shapes: N examples, K members, A groups, Y classes (2), T cells of a statistic, J thresholds, x any axes in front.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxforget import checks
from jaxforget.errors import UserError
from jaxforget.fairness.odds import check_settings, equalized_odds, score_thresholds
from jaxforget.fairness.statistics import STATISTICS, cell_counts, pooled, smoothed, votes_of_vector
from jaxforget.files import write_atomic

# The statistic that the table of a method is indexed by; with `each`, of one member, whose vote is its majority.
METHODS = {"none": "majority", "each": "majority", "majority": "majority", "count": "count", "vector": "vector"}
FORMAT, VERSION = "jaxforget.fairness", 1
STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Predictor:
    """P(output 1) by group and cell of a statistic of the votes. A pytree: pass it to jitted functions."""

    method: str = dataclasses.field(metadata=STATIC)
    statistic: str = dataclasses.field(metadata=STATIC)
    epsilon: float = dataclasses.field(metadata=STATIC)
    groups: tuple[str, ...] = dataclasses.field(metadata=STATIC)
    members: int = dataclasses.field(metadata=STATIC)
    rows: int = dataclasses.field(metadata=STATIC)  # that it was fitted on
    notes: tuple[str, ...] = dataclasses.field(metadata=STATIC)
    table_xAT: np.ndarray  # (A, T), or (K, A, 2) of `each`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Thresholds:
    """P(output 1) of a score: base, plus the weights of the thresholds that it reaches. A pytree, as Predictor."""

    epsilon: float = dataclasses.field(metadata=STATIC)
    groups: tuple[str, ...] = dataclasses.field(metadata=STATIC)
    rows: int = dataclasses.field(metadata=STATIC)
    notes: tuple[str, ...] = dataclasses.field(metadata=STATIC)
    base_A: np.ndarray
    threshold_AJ: np.ndarray  # filled up with infinity, which no score reaches
    weight_AJ: np.ndarray


def fit(
    method: str,
    votes_NK: np.ndarray,
    label_N: np.ndarray,
    group_N: np.ndarray,
    groups: Sequence[str],
    *,
    epsilon: float = 0.0,
    objective: str = "error",
    cost_fp: float = 1.0,
    cost_fn: float = 1.0,
    constraint: str = "odds",
    smoothing: float = 0.0,
    pool: bool = False,
) -> Predictor:
    """Fit a method on rows that no member was trained on. Settings as of odds.equalized_odds.

    votes_NK, label_N: 0 or 1. group_N: indices into the names `groups`. `none` has no use for the settings.
    Cells without rows get the majority decision, those of `vector` what `count` decides.
    smoothing: of `vector` alone, from 0 to 1. Within a group and number of votes, that share of a cell's labels is
    replaced by the labels of all such rows, so cells keep their size and come to differ less. 1 is `count`. In between,
    odds are equal for the smoothed counts, not for the rows themselves.
    pool: a group that lacks a label, and so has no rates of its own, counts as if its rows were distributed as those of
    all groups together. A note says so. Otherwise it is refused.
    Raises UserError naming the setting, the group or the row that cannot be used.
    """
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}; valid names are {', '.join(METHODS)}")
    check_settings(epsilon, objective, constraint, cost_fp, cost_fn)
    checks.between(0, 1, smoothing=smoothing)
    groups = tuple(groups)
    votes_NK, label_N, group_N = np.asarray(votes_NK), np.asarray(label_N), np.asarray(group_N)
    if votes_NK.ndim != 2 or not votes_NK.size:
        raise UserError(f"votes have shape {votes_NK.shape}; there must be a row or more, each of a vote or more")
    _check_rows(label_N, group_N, groups, len(votes_NK))
    _check_binary("vote", votes_NK)
    A, K = len(groups), votes_NK.shape[1]
    notes = []

    def counts(statistic: str, votes_NK: np.ndarray) -> np.ndarray:
        rule = STATISTICS[statistic]
        cells = rule.cells(votes_NK.shape[1])
        count = cell_counts(rule.code(votes_NK), label_N, group_N, cells, A)
        count_AYT = np.asarray(count, np.float64)
        return pooled(count_AYT) if pool else count_AYT

    def table(statistic: str, count_AYT: np.ndarray, empty_AT: np.ndarray) -> np.ndarray:
        return equalized_odds(count_AYT, epsilon, objective=objective, cost_fp=cost_fp, cost_fn=cost_fn,
                              constraint=constraint, empty_AT=empty_AT, groups=groups)  # fmt: skip

    if method == "none":
        table_xAT, epsilon = np.tile([0.0, 1.0], (A, 1)), 0.0
    elif method == "each":
        column_K = [votes_NK[:, k : k + 1] for k in range(K)]
        table_xAT = np.stack([table("majority", counts("majority", column), np.arange(2)) for column in column_K])
    else:
        name = METHODS[method]
        by_AT, count_AYT = STATISTICS[name].decision(K), counts(name, votes_NK)
        if method == "vector":
            size_T = votes_of_vector(K).sum(axis=1)
            by_AT = table("count", counts("count", votes_NK), STATISTICS["count"].decision(K))[:, size_T]
            count_AYT = smoothed(count_AYT, size_T, smoothing)
        # At 1 all cells of a number of votes tie, and the program would be free to choose among them.
        table_xAT = by_AT if method == "vector" and smoothing == 1 else table(name, count_AYT, by_AT)
        notes += [f"smoothing {smoothing:g}"] if smoothing else []
    if method != "none":
        notes += [f"objective {objective}", f"constraint {constraint}", f"cost_fp {cost_fp:g}, cost_fn {cost_fn:g}"]
        notes += [f"group {groups[a]!r} has no example of label {y}: pooled with all others"
                  for a in range(A) for y in (0, 1) if not np.any((group_N == a) & (label_N == y))]  # fmt: skip
    return Predictor(method=method, statistic=METHODS[method], epsilon=float(epsilon), groups=groups, members=K,
                     rows=len(votes_NK), notes=tuple(notes), table_xAT=table_xAT)  # fmt: skip


def fit_scores(
    score_N: np.ndarray,
    label_N: np.ndarray,
    group_N: np.ndarray,
    groups: Sequence[str],
    *,
    epsilon: float = 0.0,
    objective: str = "error",
    cost_fp: float = 1.0,
    cost_fn: float = 1.0,
    constraint: str = "odds",
) -> Thresholds:
    """Fit randomised thresholds of a score by group, on rows that the scorer was not trained on. Arguments as of `fit`.

    score_N: as float32, in which it is compared later.
    """
    groups, score_N = tuple(groups), np.asarray(score_N, np.float32)
    label_N, group_N = np.asarray(label_N), np.asarray(group_N)
    _check_rows(label_N, group_N, groups, len(score_N))
    base_A, thresholds, weights = score_thresholds(
        score_N, label_N, group_N, epsilon, objective=objective, cost_fp=cost_fp, cost_fn=cost_fn,
        constraint=constraint, groups=groups,
    )  # fmt: skip
    notes = (f"objective {objective}", f"constraint {constraint}", f"cost_fp {cost_fp:g}, cost_fn {cost_fn:g}")
    return _thresholds(float(epsilon), groups, len(score_N), notes, base_A, thresholds, weights)


def probability(predictor: Predictor | Thresholds, votes_NK: jax.Array, group_N: jax.Array) -> jax.Array:
    """Return P(output 1), probability_N. Inside jit too. Thresholds take score_N in place of votes.

    Raises UserError for another number of members, and for a group that was not there at the fit, naming those that
    were. Inside jit values are not known, and such a group's probability is NaN.
    """
    A = len(predictor.groups)
    if not isinstance(group_N, jax.core.Tracer):
        _check_groups(np.asarray(group_N), predictor.groups)
    group_N = jnp.asarray(group_N)
    known_N = (group_N >= 0) & (group_N < A)
    group_N = jnp.clip(group_N, 0, A - 1)
    if isinstance(predictor, Thresholds):
        score_N = jnp.asarray(votes_NK, jnp.float32)
        reached_NJ = score_N[:, None] >= jnp.asarray(predictor.threshold_AJ, jnp.float32)[group_N]
        weight_NJ = jnp.asarray(predictor.weight_AJ)[group_N]
        probability_N = jnp.asarray(predictor.base_A)[group_N] + jnp.sum(jnp.where(reached_NJ, weight_NJ, 0), axis=1)
        return jnp.where(known_N, probability_N, jnp.nan)
    if votes_NK.shape[-1] != predictor.members:
        raise UserError(f"the predictor is for {predictor.members} members, the votes are of {votes_NK.shape[-1]}")
    votes_NK, table_xAT = jnp.asarray(votes_NK), jnp.asarray(predictor.table_xAT)
    if predictor.method == "each":
        member_K = jnp.arange(predictor.members)
        one_NK = table_xAT[member_K[None], group_N[:, None], votes_NK.astype(jnp.int32)]
        return jnp.where(known_N, majority_probability(one_NK), jnp.nan)
    code_N = STATISTICS[predictor.statistic].code(votes_NK)
    return jnp.where(known_N, table_xAT[group_N, code_N], jnp.nan)


def majority_probability(probability_NK: jax.Array) -> jax.Array:
    """Return P(more than K / 2 of K independent outputs are 1), probability_N: exact, by the count's recursion."""
    K = probability_NK.shape[1]
    count_NC = jnp.ones_like(probability_NK[:, :1])  # of the members so far, P(c outputs are 1) for c = 0, 1, …
    for k in range(K):
        one_N1 = probability_NK[:, k : k + 1]
        same_NC, more_NC = count_NC * (1 - one_N1), count_NC * one_N1
        count_NC = jnp.pad(same_NC, ((0, 0), (0, 1))) + jnp.pad(more_NC, ((0, 0), (1, 0)))
    return jnp.sum(count_NC[:, K // 2 + 1 :], axis=1)


def sample(
    predictor: Predictor | Thresholds, key: jax.Array, votes_NK: jax.Array, group_N: jax.Array, draw_N: jax.Array
) -> jax.Array:
    """Draw outputs 0 or 1, int32 (N,). Inside jit too.

    draw_N: uint32, a hash of each example's id. An output depends on the key, on it, and on the example's votes and
    group, so neither on its position nor on who else is there; examples of one hash share their luck. key: of JAX's
    default generator, threefry; others draw differently inside vmap.
    """
    one_N = probability(predictor, votes_NK, group_N)
    luck_N = jax.vmap(lambda draw: jax.random.uniform(jax.random.fold_in(key, draw), dtype=one_N.dtype))(
        jnp.asarray(draw_N, jnp.uint32)
    )
    return (luck_N < one_N).astype(jnp.int32)


# files


def save(predictor: Predictor | Thresholds, path: Path) -> None:
    """Write a predictor as JSON, whole or not at all."""
    about = {"format": FORMAT, "version": VERSION}
    about |= {field.name: getattr(predictor, field.name) for field in dataclasses.fields(predictor)
              if field.metadata.get("static")}  # fmt: skip
    if isinstance(predictor, Thresholds):
        by_group: dict[str, Any] = {}
        for a, name in enumerate(predictor.groups):
            steps = zip(predictor.threshold_AJ[a].tolist(), predictor.weight_AJ[a].tolist())
            by_group[name] = {"base": float(predictor.base_A[a]),
                              "steps": [list(step) for step in steps if math.isfinite(step[0])]}  # fmt: skip
        about["thresholds"] = by_group
    else:
        tables = np.asarray(predictor.table_xAT, np.float64)
        each = predictor.method == "each"
        names = STATISTICS[predictor.statistic].names(1 if each else predictor.members)
        named = [{group: dict(zip(names, table_AT[a].tolist())) for a, group in enumerate(predictor.groups)}
                 for table_AT in (tables if each else tables[None])]  # fmt: skip
        about["probability_of_1"] = named if each else named[0]
    write_atomic(Path(path), json.dumps(about, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def load(path: Path) -> Predictor | Thresholds:
    """Read what `save` wrote. Raises UserError for a file that is missing, damaged or something else."""
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is no predictor: it is not JSON, or only part of it") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UserError(f"{path} is no predictor of {FORMAT}")
    if document.get("version") != VERSION:
        raise UserError(f"{path} is of version {document.get('version')}; this program reads {VERSION}")
    try:
        return _from_document(document)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, UserError) as error:
        said = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{path} is a damaged predictor: {said}") from error


def _from_document(document: dict[str, Any]) -> Predictor | Thresholds:
    groups = tuple(document["groups"])
    if not groups or len(set(groups)) < len(groups) or not all(isinstance(name, str) for name in groups):
        raise ValueError("its groups are not distinct names")
    epsilon, rows = _share(document["epsilon"], "epsilon"), _whole(document["rows"], "rows")
    notes = tuple(str(note) for note in document["notes"])
    if "thresholds" in document:
        by_group = document["thresholds"]
        _same_names(by_group, groups, "thresholds")
        steps = [[(float(at), _share(weight, name)) for at, weight in by_group[name]["steps"]] for name in groups]
        base_A = np.asarray([_share(by_group[name]["base"], name) for name in groups])
        for name, base, mine in zip(groups, base_A, steps):
            if not all(math.isfinite(at) for at, _ in mine) or base + sum(weight for _, weight in mine) > 1 + 1e-9:
                raise ValueError(f"the thresholds of {name!r} are no probability")
        return _thresholds(epsilon, groups, rows, notes, base_A, [np.asarray([at for at, _ in mine]) for mine in steps],
                           [np.asarray([weight for _, weight in mine]) for mine in steps])  # fmt: skip
    method, members = document["method"], _whole(document["members"], "members")
    if members < 1 or METHODS.get(method) is None or METHODS[method] != document["statistic"]:
        raise ValueError(f"method {method!r} with statistic {document['statistic']!r} and {members} members")
    each = method == "each"
    rule = STATISTICS[METHODS[method]]
    named = document["probability_of_1"] if each else [document["probability_of_1"]]
    if len(named) != (members if each else 1):
        raise ValueError(f"{len(named)} tables for {members} members")
    for table in named:
        _same_names(table, groups, "probability_of_1")
        for group in groups:
            # The number first: names of an absurd number of members would fill the memory.
            if len(table[group]) != rule.cells(1 if each else members):
                raise ValueError(f"{len(table[group])} cells of {group!r} for {members} members")
            _same_names(table[group], rule.names(1 if each else members), f"the cells of {group!r}")
    cells = rule.names(1 if each else members)
    tables = np.asarray([[[_share(table[group][cell], f"{group} {cell}") for cell in cells] for group in groups]
                         for table in named])  # fmt: skip
    return Predictor(method=method, statistic=METHODS[method], epsilon=epsilon, groups=groups, members=members,
                     rows=rows, notes=notes, table_xAT=tables if each else tables[0])  # fmt: skip


def _same_names(found: dict[str, Any], wanted: Sequence[str], what: str) -> None:
    if set(found) != set(wanted):
        raise ValueError(f"{what} are not those of {', '.join(map(repr, wanted))}")


def _share(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{what} is {value!r}, not a number between 0 and 1")
    return float(value)


def _whole(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{what} is {value!r}, not a whole number")
    return value


def _thresholds(
    epsilon: float,
    groups: tuple[str, ...],
    rows: int,
    notes: tuple[str, ...],
    base_A: np.ndarray,
    thresholds: Sequence[np.ndarray],
    weights: Sequence[np.ndarray],
) -> Thresholds:
    """Fill the groups' lists up to one length."""
    J = max((len(threshold_J) for threshold_J in thresholds), default=0)
    threshold_AJ = np.full((len(groups), J), np.inf)
    weight_AJ = np.zeros((len(groups), J))
    for a, (threshold_J, weight_J) in enumerate(zip(thresholds, weights)):
        threshold_AJ[a, : len(threshold_J)] = threshold_J
        weight_AJ[a, : len(weight_J)] = weight_J
    return Thresholds(epsilon=epsilon, groups=groups, rows=rows, notes=notes, base_A=np.asarray(base_A, np.float64),
                      threshold_AJ=threshold_AJ, weight_AJ=weight_AJ)  # fmt: skip


# rows


def _check_rows(label_N: np.ndarray, group_N: np.ndarray, groups: tuple[str, ...], rows: int) -> None:
    if len(set(groups)) < len(groups) or not groups:
        raise UserError(f"groups are {', '.join(groups) or 'none'}; give distinct names")
    if label_N.shape != (rows,) or group_N.shape != (rows,):
        raise ValueError(f"label_N has shape {label_N.shape} and group_N {group_N.shape} for {rows} rows")
    _check_binary("label", label_N)
    _check_groups(group_N, groups)


def _check_binary(what: str, value_N: np.ndarray) -> None:
    wrong_N = ~((value_N == 0) | (value_N == 1))
    if wrong_N.any():
        place = np.argwhere(wrong_N)[0]
        raise UserError(f"row {place[0]} has a {what} of {value_N[tuple(place)]}; it must be 0 or 1")


def _check_groups(group_N: np.ndarray, groups: tuple[str, ...]) -> None:
    unknown_N = ~((group_N >= 0) & (group_N < len(groups)))
    if unknown_N.any():
        known = ", ".join(f"{a} {name!r}" for a, name in enumerate(groups))
        raise UserError(f"row {int(np.argmax(unknown_N))} is of group {group_N[np.argmax(unknown_N)]}, which was not "
                        f"there at the fit; known groups are {known}")  # fmt: skip
