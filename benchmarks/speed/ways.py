"""The ways of every part, compiled: what runs in turns. Shapes: S steps of a turn, B rows, T tokens, K members."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from benchmarks import peers, timing
from benchmarks.speed.config import Config
from benchmarks.speed.models import batches, examples, plain_batches, plain_step, subject
from jaxforget.metrics.language import token_scores
from jaxforget.models import generate, hub
from jaxforget.privacy.clipping import Clipping
from jaxforget.privacy.noise import gaussian_noise, private_gradient, set_privacy
from jaxforget.training import cost
from jaxforget.training.ensemble import members, stack
from jaxforget.training.objectives import next_token
from jaxforget.training.optimizer import adamw
from jaxforget.training.step import Step, make_run, make_step
from jaxforget.training.trainable import everything
from jaxforget.unlearning import METHODS, Setting
from jaxforget.unlearning.run import step_of


class Way(NamedTuple):
    """What runs in turns."""

    turn: Callable[[], Any]  # waits for the device at its end; training returns its losses, (..., S)
    steps: int  # of a turn
    tokens: int  # of a step
    flops: float | None = None  # of a step
    against: str | None = None  # the way that its time is divided by
    memory: timing.Memory | None = None
    peer: bool = False  # may fail
    trains: bool = True  # returns losses


def families(config: Config) -> dict[str, Way]:
    """Training of every family, and PyTorch's of the same GPT-2."""
    found: dict[str, Way] = {}
    for family in dict.fromkeys(("gpt2", *config.families)):
        model, task, params = subject(config, family, config.size)
        batch_S = plain_batches(config, task, config.size)
        texts = 2 if task == "seq2seq" else 1  # a row is a source and a target
        way = trained(config, plain_step(config, model, task), {"model": params}, batch_S)
        found[family] = way._replace(tokens=texts * way.tokens, flops=flops(config, model, "plain"))
        if family == "gpt2" and config.peers and peers.torch_device():
            found |= torch_ways(config, model, params, batch_S)
    return found


def torch_ways(config: Config, model, params, batch_S) -> dict[str, Way]:
    """Make PyTorch's turns from the same weights and batches."""
    both = np.asarray(batch_S["tokens"]), np.asarray(batch_S["labels"])
    with tempfile.TemporaryDirectory() as home:
        weights = hub.save(Path(home) / "model", model, params)
        return {
            name: Way(peers.torch_training(weights, *both, model.dtype, config.train, compile_=compile_), config.steps,
                      both[0][0].size, flops(config, model, "plain"), "gpt2", peer=True)
            for name, compile_ in (("torch eager", False), ("torch.compile", True))
        }  # fmt: skip


def methods(config: Config) -> dict[str, Way]:
    """A plain step of GPT-2, and those of methods that do more, on as many rows."""
    model, task, params = subject(config, "gpt2", config.size)
    train, rows, length = config.train, config.train.batch_size, config.size.context
    batch_S, parts = plain_batches(config, task, config.size), {"model": params}
    found = {"plain": trained(config, plain_step(config, model, task), parts, batch_S)
             ._replace(flops=flops(config, model, "plain"))}  # fmt: skip

    recipe = METHODS["ascent_kl_indist"].recipe(Setting(
        model, params, {name: examples(task, config.size, rows // 2 * config.steps, name)
                        for name in ("forget", "retain")}, rows // 2, 0,
    ))  # fmt: skip
    needed = flops(config, model, "plain", rows // 2) + flops(config, model, "ascent_kl", rows // 2)
    found["ascent with KL to the reference"] = trained(
        config, step_of(recipe, train, everything()), parts | dict(recipe.parts), batches(config, recipe.streams)
    )._replace(flops=needed, against="plain")

    gradient = private_gradient(Clipping(), float(rows), config.private_microbatch)
    adam = adamw(dataclasses.replace(train, max_grad_norm=0.0))
    for name, optimizer in (("private", optax.chain(gaussian_noise(), adam)), ("private without noise", adam)):
        step = make_step(next_token(model), everything(), gradient, optimizer)
        found[name] = trained(config, step, parts, batch_S)._replace(
            flops=flops(config, model, "dp_bookkeep"), against="plain"
        )
    return found | (private_peers(config, model, params, batch_S, rows * length) if config.peers else {})


def private_peers(config: Config, model, params, batch_S, tokens: int) -> dict[str, Way]:
    """Make steps of jax_privacy, against ours, and of Opacus, against PyTorch's. Gradient and step, in turn."""
    found = {}
    gradient = peers.jax_privacy(model, config.private_microbatch)
    if gradient is not None:
        batch = jax.tree.map(lambda x: x[0], batch_S)
        program, _, memory = timing.compiled(jax.jit(gradient), params, batch)
        found["jax_privacy, gradient"] = Way(lambda: jax.block_until_ready(program(params, batch)), 1, tokens,
                                             against="plain", memory=memory, peer=True, trains=False)  # fmt: skip
    for name, step in peers.opacus(model.config, config.train.batch_size, config.size.context).items():
        against = None if name == "torch: plain" else "torch: plain"
        found[name] = Way(step, 1, tokens, against=against, peer=True, trains=False)
    return found


def ensemble(config: Config) -> dict[str, Way]:
    """Members trained by one program, against a program that is called for each of them."""
    model, task, params = subject(config, "gpt2", config.shard)
    step, parts, K = plain_step(config, model, task), {"model": params}, config.members
    key_K = jax.random.split(jax.random.key(0), K)
    batch_KS = [plain_batches(config, task, config.shard, "x" * k) for k in range(K)]
    states, frozen = zip(*(step.init(key, parts) for key in key_K), strict=True)
    states = list(states)
    program, _, memory = timing.compiled(make_run(step), states[0], frozen[0], batch_KS[0], config.steps)

    def one_after_another():
        losses = []
        for k in range(K):
            states[k], metrics_S = program(states[k], frozen[k], batch_KS[k], config.steps)
            losses.append(metrics_S["loss"])
        return jax.block_until_ready((losses, states))[0]

    work = cost.Work(model=model, method="sisa", rows=config.train.batch_size, length=config.shard.context, members=K)
    base = "one run after another"
    found = {base: Way(one_after_another, config.steps, int(work.tokens), cost.cost(work).flops, memory=memory)}
    for how in ("map", "vmap"):
        way = trained(config, members(step, how), parts, stack(batch_KS), key_K)
        found[f"one program, {how}"] = way._replace(flops=cost.cost(work).flops, against=base)
    return found


def inference(config: Config) -> dict[str, Way]:
    """Generation and scoring as evaluations do them, scores read back."""
    model, task, params = subject(config, "gpt2", config.size)
    rows, length = config.train.batch_size, config.size.context
    prompt, new = length // 2, length - length // 2
    prompts = examples(task, config.size, config.generate).columns["tokens"][:, :prompt]
    sets = examples(task, config.size, rows * config.steps)

    def generation():
        return jax.block_until_ready(
            generate(model, params, prompts, np.ones(prompts.shape, bool), max_new_tokens=new)
        )

    return {
        "generation": Way(generation, 1, config.generate * new, trains=False),
        "scoring": Way(lambda: token_scores(model, params, sets, rows), config.steps, rows * length,
                       rows * length * model.flops_per_token(length), trains=False),
    }  # fmt: skip


def flops(config: Config, model, method: str, rows: int | None = None) -> float:
    """Return the FLOPs of a step of a method, of the whole batch or of so many rows."""
    rows = config.train.batch_size if rows is None else rows
    return cost.cost(cost.Work(model=model, method=method, rows=rows, length=config.size.context)).flops


def trained(config: Config, step: Step, parts: dict[str, Any], batch_S, key_K=None) -> Way:
    """Compile the steps of a turn as `training.loop.fit` runs them. key_K: of members; arrays then have a leading K."""
    state, frozen = step.init(jax.random.key(0) if key_K is None else key_K, parts)
    state = set_privacy(state, bound=1.0, multiplier=1.0)  # where it is private
    count = config.steps if key_K is None else np.full(len(key_K), config.steps, np.int32)
    program, _, memory = timing.compiled(make_run(step), state, frozen, batch_S, count)

    def turn():
        nonlocal state  # its buffers are donated
        state, metrics_S = jax.block_until_ready(program(state, frozen, batch_S, count))
        return metrics_S["loss"]

    return Way(turn, config.steps, batch_S["tokens"].size // config.steps, memory=memory)


PARTS = {"families": families, "methods": methods, "members": ensemble, "inference": inference}
