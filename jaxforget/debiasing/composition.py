"""Modules on a model, one or several: merged weights, and what may go wrong together.

Composition is order-free: modules are always added up in the order of their names, and always onto the base itself,
because adding and taking away again does not restore a float. Shapes: P places of a module, Q of several.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxforget.debiasing.modules import Entry, Module
from jaxforget.errors import UserError
from jaxforget.models.hub import get_leaf, set_leaf
from jaxforget.models.model import Params


def add_up(entries: list[Entry]) -> Entry:
    """Sum, one after the other in float32."""
    place_Q = _union(entries)
    total_Q = np.zeros(len(place_Q), np.float32)
    for entry in entries:
        total_Q[np.searchsorted(place_Q, entry.place_P)] += entry.value_P
    return Entry(place_Q, total_Q)


def _count(entries: list[Entry], place_Q: np.ndarray) -> np.ndarray:
    count_Q = np.zeros(len(place_Q), np.float32)
    for entry in entries:
        count_Q[np.searchsorted(place_Q, entry.place_P)] += 1
    return count_Q


def _union(entries: list[Entry]) -> np.ndarray:
    return np.unique(np.concatenate([entry.place_P for entry in entries]))


def _mean(entries: list[Entry], modules: int) -> Entry:
    place_Q, total_Q = add_up(entries)
    return Entry(place_Q, total_Q / np.float32(modules))


def _nonzero_mean(entries: list[Entry], modules: int) -> Entry:
    place_Q, total_Q = add_up(entries)
    return Entry(place_Q, total_Q / _count(entries, place_Q))


COMPOSITIONS: dict[str, Callable[[list[Entry], int], Entry]] = {
    "sum": lambda entries, modules: add_up(entries),
    "mean": _mean,
    "nonzero_mean": _nonzero_mean,  # over the modules that have a value at the place
}


def compose(modules: Mapping[str, Module], how: str = "sum") -> dict[str, Entry]:
    """Join modules to one difference. Always in the order of their names, so that it is the same to the last bit."""
    if how not in COMPOSITIONS:
        raise UserError(f"unknown composition {how!r}; valid names are {', '.join(COMPOSITIONS)}")
    found: dict[str, list[Entry]] = {}
    for name in sorted(modules):
        for path, entry in modules[name].entries.items():
            found.setdefault(path, []).append(entry)
    return {path: COMPOSITIONS[how](entries, len(modules)) for path, entries in found.items()}


def merged(params: Params, modules: Mapping[str, Module], how: str = "sum") -> Params:
    """Return host parameters with the modules on; without any, the given ones. What no module touches is not copied."""
    if not modules:
        return params
    joined = _copied(params)
    for path, (place_P, value_P) in compose(modules, how).items():
        leaf = np.array(get_leaf(params, path), np.float32)  # a copy
        leaf.reshape(-1)[place_P] += value_P
        set_leaf(joined, path, leaf)
    return joined


def _copied(tree):
    return {name: _copied(part) for name, part in tree.items()} if isinstance(tree, dict) else tree


def conflicts(modules: Mapping[str, Module]) -> list[dict[str, Any]]:
    """Compare every pair of modules: overlap, the share of the smaller one's places that both have, and opposite, the
    share of those places where they pull in opposite directions."""
    rows = []
    for one, two in itertools.combinations(sorted(modules), 2):
        a, b = modules[one], modules[two]
        both = opposite = 0
        for path in a.entries.keys() & b.entries.keys():
            x, y = a.entries[path], b.entries[path]
            _, at_x, at_y = np.intersect1d(x.place_P, y.place_P, assume_unique=True, return_indices=True)
            both += len(at_x)
            opposite += int((np.sign(x.value_P[at_x]) * np.sign(y.value_P[at_y]) < 0).sum())
        smaller = max(min(a.nonzeros, b.nonzeros), 1)
        rows.append({"modules": [one, two], "overlap": both / smaller, "opposite": opposite / max(both, 1)})
    return rows


def warnings(modules: Mapping[str, Module]) -> list[str]:
    """Say what may go wrong when these modules are on together."""
    said = []
    for row in conflicts(modules):
        one, two = row["modules"]
        if row["overlap"]:
            said.append(f"modules {one} and {two} overlap at {row['overlap']:.1%} of the smaller one's places, "
                        f"{row['opposite']:.0%} of these with opposite signs")  # fmt: skip
        shared = modules[one].about.get("attribute")
        if shared is not None and shared == modules[two].about.get("attribute"):
            said.append(f"modules {one} and {two} both take out {shared}")
    return said


def with_required(params: Params, modules: Mapping[str, Module]) -> tuple[Any, dict[str, Module], dict[str, Module]]:
    """Return what the modules were trained over, the modules that make it, and those that are switched.

    The first is the base, or where attributes were taken out of a task that is a module itself, the base with that on.
    """
    needed = {name for module in modules.values() for name in module.about.get("requires", ())}
    if missing := sorted(needed - set(modules)):
        raise UserError(f"module {missing[0]} is needed by another one; give its file too")
    base = {name: module for name, module in modules.items() if name in needed}
    return merged(params, base), base, {name: module for name, module in modules.items() if name not in needed}


def sets_of(modules: Mapping[str, Module]) -> list[tuple[str, ...]]:
    """Return what is measured: each module alone, and all where there are several."""
    return [(name,) for name in modules] + ([tuple(modules)] if len(modules) > 1 else [])
