"""What a compiled program sends between devices, read from its text: the independent count beside cost.py.

A program's text lists computations; a loop whose turns the compiler knows, such as one over layers, counts as often,
any other loop once: of a chunk of steps, one step.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict

import jax
import numpy as np

from jaxforget.models.sharding import AXES

_OPERATION = re.compile(
    r"= (?P<kind>\(?[a-z].*?) (?P<name>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?P<start>-start)?\("
)
_CALLED = re.compile(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TURNS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_WIDTHS = {"pred": 1, "bf16": 2, "f16": 2}


def collectives(text: str, mesh: jax.sharding.Mesh) -> dict[str, float]:
    """Return the bytes that a device sends along each axis, by rings. text: `compiled.as_text()`.

    What goes over several axes at once stands under their names joined by `+`.
    """
    lines: dict[str, list[str]] = {}
    entry = current = ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            current = head[2]
            lines[current] = []
            entry = current if head[1] else entry
        elif current:
            lines[current].append(line)
    sent: dict[str, float] = defaultdict(float)

    def visit(name: str, times: int) -> None:
        for line in lines.get(name, ()):
            if found := _OPERATION.search(line):
                axes, count = _axes(line, mesh)
                if count > 1:
                    sent[axes] += times * _sent(found, count)
                continue
            turns = int(found[1]) if (found := _TURNS.search(line)) else 1
            inner = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                inner += [branch.strip(" %") for branch in branches.split(",")]
            for one in inner:
                visit(one, times * turns)

    visit(entry, 1)
    return dict(sent)


def _sent(found: re.Match, devices: int) -> float:
    """Return the bytes that one operation sends from each of its devices."""
    shapes = re.findall(r"([a-z]\w*)\[([\d,]*)\]", found["kind"])
    if found["start"] and found["name"] in ("all-gather", "collective-permute"):  # what goes in stands before
        shapes = shapes[len(shapes) // 2 :]
    size = sum(_width(kind) * math.prod(int(n) for n in shape.split(",") if n) for kind, shape in shapes)
    ring = (devices - 1) / devices
    factor = {"all-reduce": 2 * ring, "reduce-scatter": devices - 1, "collective-permute": 1.0}
    return size * factor.get(found["name"], ring)


def _width(kind: str) -> int:
    return _WIDTHS.get(kind) or int(re.sub(r"\D", "", kind)[:2]) // 8


def _axes(line: str, mesh: jax.sharding.Mesh) -> tuple[str, int]:
    """Return the axes that an operation goes over, and how many devices take part."""
    devices = mesh.devices.size
    group = np.asarray(_group(line, devices))
    places = np.unravel_index(group, mesh.devices.shape)
    moved = [axis for axis, place in zip(AXES, places, strict=True) if len(set(place.tolist())) > 1]
    return "+".join(moved), len(group)


def _group(line: str, devices: int) -> list[int]:
    """Return the first group of devices that an operation works in; the text has four spellings."""
    if "source_target_pairs" in line:  # every pair is a group
        pairs = re.findall(r"\{(\d+),(\d+)\}", line)
        return next(([int(a), int(b)] for a, b in pairs if a != b), [0])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return [int(n) for n in found[1].split(",")]
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=(\S+?),? ", line):
        return _iota(found[2]).reshape(-1, int(found[1]))[0].tolist()
    if found := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", line):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", found[1])}
        order = _iota(found[2]) if found[2] else np.arange(devices)
        over = re.findall(r"'(\w+)'", found[3])
        where = tuple(slice(None) if name in over else 0 for name in sizes)
        return order.reshape(tuple(sizes.values()))[where].ravel().tolist()
    return list(range(devices))


def _iota(text: str) -> np.ndarray:
    """Return the order of devices that a text such as [2,4]T(1,0) means."""
    shape, _, axes = text.partition("T")
    order = np.arange(math.prod(sizes := [int(n) for n in re.findall(r"\d+", shape)])).reshape(sizes)
    return (order.transpose([int(n) for n in re.findall(r"\d+", axes)]) if axes else order).ravel()
