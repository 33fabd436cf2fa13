"""A stage of a command: train, save the model, and never do finished work twice.

The saved model directory appears by one rename and holds the record of its training, so a stage is done or not done.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax

from jaxforget import files
from jaxforget.models import Model, hub
from jaxforget.models.layers import merge
from jaxforget.models.sharding import resting
from jaxforget.training.batches import AnyBatches
from jaxforget.training.checkpoints import Checkpoints
from jaxforget.training.loop import Outcome, fit
from jaxforget.training.optimizer import set_schedule
from jaxforget.training.start import tokenizer_files
from jaxforget.training.step import Parts, State, Step

RECORD = "training.json"


def finished(directory: Path) -> dict[str, Any] | None:
    """Return the record of the training that made a model directory, or None."""
    path = directory / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


class StageBatches(AnyBatches, Protocol):
    """Batches that tell as well what a stage is recorded and seeded by."""

    @property
    def seed(self) -> int: ...

    @property
    def mean_length(self) -> float: ...


def train_stage(
    directory: Path,
    model: Model,
    step: Step,
    parts: Parts,
    batches: StageBatches,
    *,
    learning_rate: float,
    save_tokenizer: Callable[[Path], Any],
    checkpoints: Path,
    describe: Callable[[Outcome, Any], dict[str, Any]] = lambda outcome, params: {},
    save_adapter: Callable[[Any], Any] = lambda params: None,
    prepare: Callable[[State], State] = lambda state: state,
    **loop: Any,
) -> tuple[Any, dict[str, Any]]:
    """Train `parts["model"]` over the batches and save it, adapters merged, as a Hugging Face directory.

    Returns (params, record), the parameters as `resting` keeps them; a finished directory is loaded instead. The record
    holds steps, seconds, train_tokens, train_flops, stopped_at and what `describe` adds; `forward_tokens` among that
    counts tokens that cost a forward pass besides. save_adapter gets the parameters before adapters are merged. prepare
    completes the fresh state. Checkpoints are removed once the model is saved.
    """
    if (record := finished(directory)) is not None:
        return hub.load(directory)[1], record
    state, frozen = step.init(jax.random.key(batches.seed), parts)
    state = prepare(set_schedule(state, learning_rate=learning_rate, total=batches.steps))
    with Checkpoints(checkpoints) as store:
        outcome = fit(step, state, frozen, batches, checkpoints=store, **loop)
    joined = step.combine(frozen, outcome.state.trainable)["model"]
    params = resting(merge(joined))
    record = {
        "steps": outcome.steps,
        "seconds": outcome.seconds,
        "compile_seconds": outcome.compile_seconds,
        "train_tokens": outcome.tokens,
        "tokens_per_second": outcome.tokens / max(outcome.seconds, 1e-9),
        "stopped_at": outcome.stopped_at,
        "learning_rate": learning_rate,
        **describe(outcome, params),
    }
    record["train_flops"] = training_flops(
        model, outcome.tokens, batches.mean_length, forward_tokens=record.pop("forward_tokens", 0)
    )

    beside: dict[str, str | bytes] = {**tokenizer_files(save_tokenizer)}
    files.remove(*directory.parent.glob(f".{directory.name}.*"))  # what a kill during an earlier save left
    save_adapter(joined)
    beside[RECORD] = json.dumps(record, indent=2) + "\n"
    hub.save(directory, model, params, extra_files=beside)
    files.remove(checkpoints)
    return params, record


def training_flops(model: Model, tokens: int, mean_length: float, *, forward_tokens: int = 0) -> float:
    """Estimate the FLOPs of a run: forward plus twice that for backward on `tokens`, forward alone on `forward_tokens`.

    A forward pass costs what `model.flops_per_token` says at this length. Padding is not counted. Where most kernels
    are frozen this is too much by up to a third: their own gradients are not computed.
    """
    return model.flops_per_token(round(mean_length)) * (3.0 * tokens + forward_tokens)
