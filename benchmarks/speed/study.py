"""Run the parts one after the other, and make the table."""

from __future__ import annotations

import math
import time
from typing import Any

import jax
import numpy as np

from benchmarks import timing
from benchmarks.speed import start
from benchmarks.speed.config import Config, check
from benchmarks.speed.models import model_of
from benchmarks.speed.peak import peak
from benchmarks.speed.ways import PARTS, Way
from jaxforget import command
from jaxforget.errors import RunError
from jaxforget.report.page import table, write_page
from jaxforget.report.run import Run

FIELDS = ("part", "name", "seconds", "tokens_per_second", "tflops", "share_of_peak", "times", "times_low", "times_high",
          "memory_mb", "peak_mb", "compile_seconds", "note")  # fmt: skip
WANTED = ("name", "at_least", "at_most", "found", "met")
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of the first loss beside PyTorch's, relative


def run(config: Config) -> None:
    """Measure every part, and write the table."""
    check(config)
    out = Run("benchmarks.speed", config, config.out, None)
    out.begin()
    dtype = model_of(config, "gpt2", config.size)[0].dtype
    rows, parts = [], []
    if "start" in config.parts:  # before this process holds much of a device
        rows += [{"part": "start", **row} for row in start.rows(config)]
    top = peak(config, dtype)
    for name in config.parts:
        if name != "start":
            began = time.perf_counter()
            rows += [{"part": name, **row} for row in measure(config, PARTS[name](config), top["flops"], dtype)]
            parts.append({"name": name, "seconds": time.perf_counter() - began, "device_peak_mb": device_peak()})
            command.say(f"done: {name}")
    wanted = targets(rows, jax.default_backend(), config)
    document = out.finish(rows, **timing.machine(), dtype=dtype, peak=top, parts=parts, targets=wanted)
    fields = [field for field in FIELDS if any(row.get(field) is not None for row in rows)]
    about = f"{document['hardware']}, {dtype}; peak {top['flops'] / 1e12:.3g} TFLOP/s: {top['source']}."
    write_page(out.directory / "report.html", "Speed", about, [
        ("Ways", "Seconds are of a step, medians of turns. Times: seconds of the way over those of the one it is "
                 "compared with, with the lowest and highest turn. MB: temporary, and all that the program needs.",
         table(rows, fields)),
        ("Targets", "Where this machine can tell.", table(wanted, WANTED)),
    ], document["config"])  # fmt: skip
    command.print_table(rows, fields, f"benchmarks.speed · {out.directory}")
    command.print_table(wanted, WANTED, "targets")


def measure(config: Config, ways: dict[str, Way], top: float, dtype: str) -> list[dict[str, Any]]:
    """Run the ways of a part in turns. A peer that fails is left out and says why."""
    failed, first = {}, {}
    for name in [name for name, way in ways.items() if way.peer]:
        try:
            first[name] = ways[name].turn()
        except Exception as error:  # of another library, for any reason: out of memory, no compiler
            command.say(f"{name} failed: {error}")
            failed[name] = f"failed: {type(error).__name__}: {(str(error).strip() or 'no word').splitlines()[0]}"
            del ways[name]
    seconds, warm = timing.turns({name: way.turn for name, way in ways.items()}, config.repeats)
    first = warm | first
    rows = []
    for name, way in ways.items():
        of_step = [value / way.steps for value in seconds[name]]
        row: dict[str, Any] = {"name": name, **timing.spread("seconds", of_step), "tokens": way.tokens,
                               "flops": way.flops, "against": way.against, "loss": None}  # fmt: skip
        row["tokens_per_second"] = way.tokens / row["seconds"]
        row["tflops"] = way.flops and way.flops / row["seconds"] / 1e12
        row["share_of_peak"] = way.flops and way.flops / row["seconds"] / top
        if way.against in ways:
            base = [value / ways[way.against].steps for value in seconds[way.against]]
            row |= timing.spread("times", timing.ratios(of_step, base))
        if way.memory is not None:
            row |= {"memory_mb": way.memory.temporary, "peak_mb": way.memory.peak}
        if way.trains:
            row["loss"] = float(np.mean(np.asarray(first[name])[..., 0]))
        rows.append(row)
    losses = {row["name"]: row["loss"] for row in rows}
    for name, way in ways.items():
        if way.peer and way.trains:
            check_same(name, losses[name], losses[way.against], dtype)
    return rows + [{"name": name, "note": note} for name, note in failed.items()]


def check_same(name: str, theirs: float, ours: float, dtype: str) -> None:
    """Raise RunError where a peer's first loss is not ours: it then does not compute the same."""
    if not abs(theirs - ours) <= TOLERANCE[dtype] * abs(ours):
        raise RunError(f"{name}: the first loss is {theirs:.6g} there and {ours:.6g} here; both must compute the same")


def device_peak() -> float | None:
    """Return the most memory of the device that was in use so far, MB, where it says."""
    used = jax.local_devices()[0].memory_stats() or {}
    return used["peak_bytes_in_use"] / 1e6 if "peak_bytes_in_use" in used else None


def targets(rows: list[dict[str, Any]], backend: str, config: Config) -> list[dict[str, Any]]:
    """Compare with what the project wants to reach; None where this machine cannot tell."""
    by_name = {row["name"]: row for row in rows}

    def found(name: str, field: str, here: bool = True) -> float | None:
        return by_name.get(name, {}).get(field) if here else None

    both = [found(f"one program, {how}", "times", backend != "cpu") for how in ("map", "vmap")]
    one_program = [times for times in both if times is not None]
    h200 = jax.devices()[0].device_kind == "NVIDIA H200"
    wanted = (
        ("torch eager, times our step, on a CPU", 1.1, math.inf, found("torch eager", "times", backend == "cpu")),
        ("private step, times a plain one", 0, 1.15, found("private", "times")),
        (f"{config.members} members in one program, times as fast as one after another, on an accelerator", 4, math.inf,
         1 / min(one_program) if len(one_program) == len(both) else None),
        ("gpt2, share of 790 TFLOP/s in bfloat16, on an H200", 0.4, 1, found("gpt2", "share_of_peak", h200)),
    )  # fmt: skip
    return [
        {"name": name, "at_least": low, "at_most": high, "found": value,
         "met": None if value is None else low <= value <= high}
        for name, low, high, value in wanted
    ]  # fmt: skip
