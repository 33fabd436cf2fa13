"""Run a step over its batches: chunks on the device, everything else around them.

While the device works on one chunk, the host reads the metrics of the one before. It waits for the device only to
evaluate and to save.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxforget.errors import NonFiniteLoss
from jaxforget.models import sharding
from jaxforget.training.batches import AnyBatches
from jaxforget.training.checkpoints import Checkpoints
from jaxforget.training.ensemble import MemberBatches
from jaxforget.training.step import Parts, State, Step, make_run, place

Log = Callable[[int, dict[str, float]], None]


@dataclasses.dataclass
class Progress:
    """How far a run is, for whoever displays it."""

    step: int
    steps: int
    seconds: float  # spent in this process and, after a resume, in those before it
    tokens: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A finished run. `stopped_at` is the step at which `evaluate` asked to stop, or None."""

    state: State
    steps: int
    seconds: float  # training alone: neither compilation nor evaluation
    compile_seconds: float  # of this process
    tokens: int
    stopped_at: int | None = None


def fit(
    step: Step,
    state: State,
    frozen: Parts,
    batches: AnyBatches | MemberBatches,
    *,
    chunk: int = 16,
    evaluate_every: int = 0,
    evaluate: Callable[[int, Any], bool] | None = None,
    checkpoints: Checkpoints | None = None,
    checkpoint_every: int = 0,
    finite: bool = True,
    log: Log = lambda step, metrics: None,
    resumed: Callable[[int], None] = lambda step: None,
    show: Callable[[Progress], None] = lambda progress: None,
) -> Outcome:
    """Train over all batches, resuming from the newest checkpoint when there is one.

    A step and batches lifted to members train side by side. chunk: steps in one device program. evaluate(step, parts)
    is called at step 0 of a fresh run, then every `evaluate_every` steps (0: never) and at the end; returning True
    stops the run there. checkpoint_every: steps between checkpoints (0: at the end alone). finite: stop at a bad loss;
    without it a member that collapses spoils nothing but itself. log gets the metrics of every step in order. A resumed
    run repeats the steps after its checkpoint, so `resumed` tells the log's owner which lines to drop.

    Raises NonFiniteLoss naming the step. Numbers do not depend on where a run was interrupted: every chunk runs in
    one compiled program, and chunk boundaries do not enter the arithmetic.
    """
    run = make_run(step)
    state, frozen = place(step, state, frozen)
    several = step.own is not None

    def take(start: int, stop: int) -> tuple[Any, Any]:
        batch, count = batches.take(start, stop, chunk), batches.count(start, stop)
        return sharding.place_whole(batch, lead=several), count

    seconds, stopped = 0.0, None
    if checkpoints is not None and (saved := checkpoints.restore(state)) is not None:
        state, notes = saved
        seconds, stopped = notes["seconds"], notes["stopped_at"]
    done = int(jax.numpy.max(state.step))  # of members, the one with most steps
    fresh = done == 0
    resumed(done)
    stops = sorted({every for every in (evaluate_every, checkpoint_every) if every})
    pending: tuple[int, int, Any, dict] | None = None
    began = time.perf_counter()
    # No steps, but the program is compiled: `seconds` then counts work, whichever run happened to need a program first.
    state, _ = run(state, frozen, take(0, 1)[0], batches.count(0, 0))
    jax.block_until_ready(state)
    started = time.perf_counter()
    compiling = started - began

    def elapsed() -> float:
        return seconds + time.perf_counter() - started

    def settle() -> None:
        """Read the metrics of the chunk dispatched last, log them, and stop at the first bad loss."""
        nonlocal pending
        if pending is None:
            return
        first, count, ran, metrics_S = pending
        pending = None
        metrics_S = sharding.host(metrics_S)
        for i in range(count):
            metrics = {name: _at(i, values_S, ran) for name, values_S in metrics_S.items()}
            if finite and not all(math.isfinite(x) for x in np.ravel(metrics["loss"]) if x is not None):
                raise NonFiniteLoss(f"the loss is {metrics['loss']} at step {first + i + 1}; lower the learning rate")
            log(first + i + 1, metrics)
        show(Progress(first + count, batches.steps, elapsed(), batches.tokens_until(first + count)))

    def wants_stop() -> bool:
        nonlocal started
        settle()
        paused = time.perf_counter()  # evaluation is not training time
        answer = evaluate is not None and bool(evaluate(done, step.combine(frozen, state.trainable)))
        started += time.perf_counter() - paused
        return answer

    if fresh and evaluate_every and wants_stop():
        stopped = 0
    while done < batches.steps and stopped is None:
        count = min([chunk, batches.steps - done] + [every - done % every for every in stops])
        batches_S, ran = take(done, done + count)
        state, metrics_S = run(state, frozen, batches_S, ran)
        settle()
        pending = (done, count, ran, metrics_S)
        done += count
        last = done == batches.steps
        if evaluate_every and (last or done % evaluate_every == 0) and wants_stop():
            stopped = done
        due = last or stopped is not None or (checkpoint_every and done % checkpoint_every == 0)
        if checkpoints is not None and due:
            settle()  # a bad state must not replace a good one
            checkpoints.save(done, state, {"seconds": elapsed(), "stopped_at": stopped})
    settle()
    jax.block_until_ready(state)
    return Outcome(state, done, elapsed(), compiling, batches.tokens_until(done), stopped)


def _at(i: int, values_S: np.ndarray, ran: Any) -> Any:
    """Take step i of a metric: a number, or a list over members with None for those that had no such step."""
    values = values_S[..., i].tolist()
    return [x if i < n else None for x, n in zip(values, ran, strict=True)] if isinstance(values, list) else values
