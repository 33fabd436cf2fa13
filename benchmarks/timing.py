"""Times that can be compared: everything in turns, ratios within a turn, medians, and the machine they are from."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxforget.report.run import environment

PEERS = ("torch", "opacus", "jax_privacy")


class Memory(NamedTuple):
    """What a compiled program needs on a device, in MB (10^6 bytes)."""

    temporary: float  # besides arguments and results
    peak: float  # all together; what is donated counts once


def turns(ways: Mapping[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Run every way once, which warms up, then all of them in turns. A way waits for its device itself, at its end.

    Returns the seconds of each way in every turn, and what it returned when it warmed up.
    """
    first = {name: way() for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
    return seconds, first


def spread(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """Return the fields <name>, the median, <name>_low and <name>_high; None where there are no values."""
    if not values:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    return {name: statistics.median(values), f"{name}_low": min(values), f"{name}_high": max(values)}


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Divide the times of one way by those of another, turn by turn."""
    return [a / b for a, b in zip(over, under, strict=True)]


def compiled(jitted, *arguments) -> tuple[Callable[..., Any], float, Memory | None]:
    """Compile a jitted function. Returns the program, the seconds that took, and its memory where the compiler says."""
    began = time.perf_counter()
    program = jitted.lower(*arguments).compile()
    took = time.perf_counter() - began
    found = program.memory_analysis()
    if found is None:
        return program, took, None
    beside = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return program, took, Memory(found.temp_size_in_bytes / 1e6, (beside + found.temp_size_in_bytes) / 1e6)


def machine() -> dict[str, Any]:
    """Return the fields date, hardware and versions; of peers, the versions of those that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    versions = dict(environment()["versions"])
    for name in PEERS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {"date": time.strftime("%Y-%m-%d"), "hardware": _hardware(), "versions": versions}


def _hardware() -> str:
    devices = jax.devices()
    if devices[0].platform != "cpu":
        return f"{len(devices)} x {devices[0].device_kind}"
    about = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in about.splitlines() if line.startswith("model name")]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{models[0] if models else 'cpu'}, {usable} of {os.cpu_count()} cores used"
