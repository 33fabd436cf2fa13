"""The time from the start of a process to the end of its first training steps: with nothing compiled, and after that.

Every pair of processes has a compile cache of its own, which is empty at first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from benchmarks import timing
from benchmarks.speed.config import Config
from benchmarks.speed.models import plain_batches, plain_step, subject
from jaxforget import command
from jaxforget.report.run import from_plain, plain
from jaxforget.training.step import make_run

NAMES = ("first steps, nothing compiled", "first steps, compiled before")


def rows(config: Config) -> list[dict[str, Any]]:
    """Start processes. Where they fail, such as on a TPU, which one process holds, rows say so."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}  # launches
    for _ in range(config.starts):
        with tempfile.TemporaryDirectory() as cache:
            for name, launches in found.items():
                launches.append(launch(config, cache))
                if note := launches[-1].get("note"):
                    return [{"name": name, "note": note} for name in NAMES]
    cold, warm = ([one["seconds"] for one in launches] for launches in found.values())
    base: dict[str, Any] = {"against": None, **timing.spread("times", [])}
    compared: dict[str, Any] = {"against": NAMES[0], **timing.spread("times", timing.ratios(warm, cold))}
    return [
        {"name": name, **timing.spread("seconds", [one["seconds"] for one in launches]),
         **timing.spread("compile_seconds", [one["compile_seconds"] for one in launches]), **beside}
        for (name, launches), beside in zip(found.items(), (base, compared), strict=True)
    ]  # fmt: skip


def launch(config: Config, cache: str) -> dict[str, Any]:
    """Run a process with this compile cache to the end of its first steps. Returns its times, or a note."""
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed.start"], input=json.dumps(plain(config)), text=True,
        capture_output=True, cwd=Path(__file__).resolve().parents[2],
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache},
    )  # fmt: skip
    if done.returncode:
        said = (done.stderr.strip() or "no word").splitlines()[-1]
        return {"note": f"a process ended with {done.returncode}: {said}"}
    told = json.loads(done.stdout.splitlines()[-1])
    return {"seconds": told["ended"] - began, "compile_seconds": told["compile_seconds"]}


def main() -> None:
    """Do in a new process what training does first."""
    config = from_plain(Config, json.load(sys.stdin))
    command.configure_jax()
    model, task, params = subject(config, "gpt2", config.size)
    step = plain_step(config, model, task)
    state, frozen = step.init(jax.random.key(0), {"model": params})
    batch_S = plain_batches(config, task, config.size)
    program, took, _ = timing.compiled(make_run(step), state, frozen, batch_S, config.steps)
    jax.block_until_ready(program(state, frozen, batch_S, config.steps))
    print(json.dumps({"compile_seconds": took, "ended": time.time()}))


if __name__ == "__main__":
    main()
