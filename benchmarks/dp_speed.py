"""What clipping every record's gradient costs: time and memory of a step by each estimator, against a plain step.

    python -m benchmarks.dp_speed --width 768 --layers 4 --vocab-size 50257

All ways compute the same model in one run, in turns, and a ratio is that of one turn; their median counts. Memory is
what the compiled step allocates besides its arguments and results. Noise is drawn once a batch, however large that is,
and so stands apart. Peers are measured where they are installed: jax_privacy on
the same losses, Opacus (hooks and ghost clipping) on transformers' GPT-2 of the same shape, against torch's own step.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import peers, timing
from jaxforget import command
from jaxforget.errors import UserError
from jaxforget.models import gpt2
from jaxforget.models.model import build
from jaxforget.privacy.clipping import Clipping
from jaxforget.privacy.noise import gaussian_noise, private_gradient
from jaxforget.report.page import cell, figure, plots, table, write_page
from jaxforget.report.run import Run
from jaxforget.training.gradients import mean_gradient
from jaxforget.training.objectives import next_token
from jaxforget.training.start import ComputeConfig
from jaxforget.training.step import Estimator, Gradient, make_step
from jaxforget.training.trainable import everything


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Measure what private gradients cost."""

    out: Path | None = None
    """Directory for everything the run leaves. Must be empty."""
    width: int = 256
    """Width of a GPT-2."""
    layers: int = 4
    """Its blocks."""
    vocab_size: int = 8192
    """Its vocabulary, tied."""
    context: int = 128
    """Tokens of a record."""
    batch_size: int = 16
    """Records of a batch."""
    microbatch: int = 4
    """Records at a time, for the ways that have micro-batches."""
    whole: bool = True
    """Also without micro-batches."""
    repeats: int = 5
    """Turns."""
    compute: ComputeConfig = ComputeConfig(dtype="float32")


def small() -> Config:
    """width 256, 4 layers, vocabulary 8192: a few minutes on two CPU cores"""
    return Config()


def wide() -> Config:
    """the width and vocabulary of GPT-2, 4 layers: about twenty minutes on two CPU cores"""
    return Config(width=768, vocab_size=50257, batch_size=8, repeats=3)


PRESETS = {"small": small, "wide": wide}
FIELDS = ("name", "seconds", "times_plain", "times_plain_low", "times_plain_high", "memory_mb", "memory_times_plain",
          "compile_seconds")  # fmt: skip


def run(config: Config) -> None:
    """Compile every way, then run them in turns."""
    command.at_least(1, width=config.width, layers=config.layers, batch_size=config.batch_size, repeats=config.repeats)
    if config.batch_size % config.microbatch:
        raise UserError(f"--microbatch {config.microbatch} does not divide the batch of {config.batch_size}")
    out = Run("benchmarks.dp_speed", config, config.out, None)
    out.begin()
    rows = measure(config, {**ours(config), **jax_privacy(config)})  # and let go of them: each holds an Adam's state
    if peers := opacus(config):
        rows += measure(config, peers)
    document = out.finish(rows)

    def draw(axes):
        shown = [row for row in rows if row["times_plain"]]
        ends = [[row["times_plain"] - row["times_plain_low"] for row in shown],
                [row["times_plain_high"] - row["times_plain"] for row in shown]]  # fmt: skip
        axes.barh([row["name"] for row in shown], [row["times_plain"] for row in shown], height=0.6, xerr=ends)
        axes.invert_yaxis()
        axes.axvline(1, color="0.5", lw=0.8)
        axes.set(xlabel="time of a step / plain step", ylabel="way of clipping")

    lead = ("How much longer is a training step that cuts every record's gradient (DP-SGD), and how much more memory "
            f"does it take? A GPT-2 of width {config.width}, batches of {config.batch_size}; {document['device']}.")
    found = [f"`{row['name']}`: {cell(row['times_plain'])} times the time of `{row['against']}`."
             for row in rows if row["times_plain"] and row["name"] != row["against"]]  # fmt: skip
    note = ("Ratios are to the plain step with the same micro-batches; medians of turns, in brackets the lowest and "
            "highest turn.")  # fmt: skip
    drawn = figure(draw, height=1.0 + 0.26 * sum(bool(row["times_plain"]) for row in rows))
    write_page(out.directory / "report.html", "What private gradients cost", lead,
               [("Steps", note, plots(drawn) + table(rows, FIELDS))], document["config"], found)  # fmt: skip
    command.print_table(rows, FIELDS, f"benchmarks.dp_speed · {out.directory}")


Way = tuple[Callable[[], Any], str, float | None, float]  # one step, the way it is compared with, memory, compilation


def model_of(config: Config):
    """Return the model, its parameters and a batch of full records."""
    shape = gpt2.Config(vocab_size=config.vocab_size, n_positions=config.context, n_embd=config.width,
                        n_layer=config.layers, n_head=max(1, config.width // 64))  # fmt: skip
    model = config.compute.apply(build(shape))
    rng = np.random.default_rng(0)
    token_BT = rng.integers(0, config.vocab_size, (config.batch_size, config.context + 1)).astype(np.int32)
    ones = jnp.ones(config.batch_size)
    batch = {"tokens": token_BT[:, :-1], "labels": token_BT[:, 1:], "weight": ones, "factor": ones}
    return model, model.init(jax.random.key(0)), jax.tree.map(jnp.asarray, batch)


def ours(config: Config) -> dict[str, Way]:
    """Compile the plain step and that of every estimator, with micro-batches and without."""
    model, params, batch = model_of(config)
    ways = {}
    for size in (None, config.microbatch) if config.whole else (config.microbatch,):
        about = f", micro-batch {size}" if size else ""
        gradients: dict[str, tuple[Gradient | Estimator, optax.GradientTransformation]] = {
            "plain": (mean_gradient(size), optax.identity())
        }
        for name in ("bookkeep", "ghost", "vmap"):
            gradients[name] = private_gradient(Clipping(name), float(config.batch_size), size), optax.identity()
        gradients["bookkeep and noise"] = gradients["bookkeep"][0], gaussian_noise()
        for name, (gradient, noise) in gradients.items():
            step = make_step(next_token(model), everything(), gradient, optax.chain(noise, optax.adam(1e-4)))
            state, frozen = step.init(jax.random.key(0), {"model": params})
            ways[name + about] = compiled(step.update, (state, frozen, batch), f"plain{about}")
    return ways


def compiled(function, arguments, against: str) -> Way:
    """Compile a function, and say what memory it takes."""
    command.say(f"compiling for {against}")
    program, took, memory = timing.compiled(jax.jit(function), *arguments)
    return lambda: jax.block_until_ready(program(*arguments)), against, memory and memory.temporary, took


def jax_privacy(config: Config) -> dict[str, Way]:
    """Compile jax_privacy's clipped gradient of the same losses, noise and Adam left out."""
    model, params, batch = model_of(config)
    ways = {}
    for size in (None, config.microbatch) if config.whole else (config.microbatch,):
        gradient = peers.jax_privacy(model, size)
        if gradient is None:
            command.say("jax_privacy is not installed; left out")
            return {}
        about = f", micro-batch {size}" if size else ""
        ways[f"jax_privacy{about}"] = compiled(gradient, (params, batch), f"plain{about}")
    return ways


def opacus(config: Config) -> dict[str, Way]:
    """Make steps of Opacus and of torch alone."""
    steps = peers.opacus(model_of(config)[0].config, config.batch_size, config.context)
    if not steps:
        command.say("torch, transformers or opacus is not installed; left out")
    return {name: (step, "torch: plain", None, 0.0) for name, step in steps.items()}


def measure(config: Config, ways: dict[str, Way]) -> list[dict[str, Any]]:
    """Run the ways in turns."""
    seconds, _ = timing.turns({name: step for name, (step, *_) in ways.items()}, config.repeats)
    rows = []
    for name, (_, against, memory, took) in ways.items():
        base = ways[against][2] if against in ways else None
        rows.append({
            "name": name, "seconds": statistics.median(seconds[name]), "against": against,
            **timing.spread("times_plain", timing.ratios(seconds[name], seconds[against]) if against in ways else []),
            "memory_mb": memory, "memory_times_plain": memory / base if memory and base else None,
            "compile_seconds": took,
        })  # fmt: skip
    return rows


if __name__ == "__main__":
    command.main(run, PRESETS)
