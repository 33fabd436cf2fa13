"""Train the yardsticks, sweep the methods, and keep the models that are chosen."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.unlearning.config import Config
from benchmarks.unlearning.study import Study, validate
from jaxforget import command
from jaxforget.data.tokens import concatenate, same_widths
from jaxforget.report.run import Run
from jaxforget.training.batches import Batches, Stream
from jaxforget.training.checkpoints import load_tree, save_tree
from jaxforget.training.ensemble import MemberBatches, join_parts, member, members
from jaxforget.training.gradients import mean_gradient
from jaxforget.training.loop import fit
from jaxforget.training.lora import moving_parts
from jaxforget.training.objectives import next_token
from jaxforget.training.optimizer import adamw, set_schedule
from jaxforget.training.step import make_step
from jaxforget.training.trainable import everything
from jaxforget.unlearning.sweep import Member, grid, sweep
from jaxforget.unlearning.tuning import YARDSTICKS, criterion, over_settings, robustness


def side_by_side(config: Config, study: Study, label: str, params_K, examples_K, seed_K, training, watch=None,
                 every: int = 0) -> tuple[list[Any], dict[str, float]]:  # fmt: skip
    """Train models on sets of their own in one program, or in several of --width. Returns (params, cost).

    watch(k, step, params) is called every `every` steps and at the end.
    """
    model, found, cost = study.start.model, [], {"seconds": 0.0, "steps": 0, "tokens": 0}
    gradient = mean_gradient(training.microbatch_of(training.batch_size))
    step = make_step(next_token(model), everything(), gradient, adamw(training))
    examples_K, width = same_widths(list(examples_K)), config.width or len(params_K)
    for first in range(0, len(params_K), width):
        group = range(first, min(first + width, len(params_K)))
        batches = MemberBatches(tuple(Batches((Stream(examples_K[k], training.batch_size),), training.epochs,
                                              seed_K[k], "token") for k in group))  # fmt: skip
        own, parts = join_parts([{"model": params_K[k]} for k in group])
        lifted = members(step, config.members, own)
        state, frozen = lifted.init([jax.random.key(seed_K[k]) for k in group], parts)
        state = set_schedule(state, learning_rate=[training.learning_rate] * len(group),
                             total=[mine.steps for mine in batches.active])  # fmt: skip

        def models(parts_K, group=group):
            host_K = jax.tree.map(np.asarray, parts_K["model"])
            return [member(host_K, k) for k in range(len(group))]

        def evaluate(at: int, parts_K, group=group) -> bool:
            for k, params in zip(group, models(parts_K, group), strict=True):
                watch(k, at, params)
            return False

        with command.progress(label) as show:
            outcome = fit(lifted, state, frozen, batches, finite=watch is None, evaluate=watch and evaluate,
                          evaluate_every=every, show=show)  # fmt: skip
        found += models(lifted.combine(frozen, outcome.state.trainable), group)
        cost = {"seconds": cost["seconds"] + outcome.seconds, "tokens": cost["tokens"] + outcome.tokens,
                "steps": cost["steps"] + sum(mine.steps for mine in batches.active)}  # fmt: skip
    return found, cost


def keep(path: Path, params) -> None:
    """Save parameters; what an interrupted run left there is replaced."""
    shutil.rmtree(path, ignore_errors=True)
    save_tree(path, params)


def loaded(study: Study, path: Path) -> Any:
    return load_tree(path, study.start.params(0))


def train_yardsticks(config: Config, study: Study, models: Mapping[str, list[Path]]) -> dict[str, float]:
    """Train `original` and `retrained` of all seeds. General text is trained on from scratch alone."""
    sets, seeds = study.setting.sets, range(config.seeds)
    rest = [sets["retain"]] + ([sets["general"]] if config.base is None and "general" in sets else [])
    data = {"original": concatenate([sets["forget"], *rest]), "retrained": concatenate(rest)}
    runs = [(name, seed) for name in YARDSTICKS for seed in seeds]
    found, cost = side_by_side(
        config, study, "original and retrained", [study.start.params(seed) for _, seed in runs],
        [data[name] for name, _ in runs], [seed for _, seed in runs], config.train,
    )  # fmt: skip
    for (name, seed), params in zip(runs, found, strict=True):
        keep(models[name][seed], params)
    return cost


def sweep_method(config: Config, out: Run, study: Study, name: str, models: Mapping[str, list[Path]],
                 before: Sequence[Mapping[str, Any]]) -> dict[str, Any]:  # fmt: skip
    """Run all settings of a method, choose one by the criterion and keep its models.

    With --choosing-seeds the others run the chosen setting alone.
    """
    method, scratch = study.methods[name], out.directory / "scratch" / name
    shutil.rmtree(scratch, ignore_errors=True)
    settings = [study.setting._replace(params=loaded(study, path), seed=seed, cache=out.directory / "reference")
                for seed, path in enumerate(models["original"])]  # fmt: skip
    choosing = config.choosing_seeds or config.seeds
    runs = grid(method, settings[:choosing], config.learning_rates, config.strengths)
    points, notes, cost = watched(config, study, name, runs, before, scratch)
    means = over_settings(points, choosing)
    best = max((one for one in means if one["criterion"] is not None), key=lambda one: one["criterion"], default=None)
    if best is not None:
        chosen = (best["learning_rate"],), (best["strength"],)
        if rest := grid(method, settings[choosing:], *chosen):
            notes += watched(config, study, name, rest, before, scratch)[1]
        for seed, target in enumerate(models[name]):
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(place(scratch, best["step"], *chosen[0], *chosen[1], seed), target)
    shutil.rmtree(scratch, ignore_errors=True)
    return {"grid": means, "chosen": best, "robustness": robustness(means), "cost": cost, "notes": notes}


def watched(config: Config, study: Study, name: str, runs: Sequence[Member], before: Sequence[Mapping[str, Any]],
            scratch: Path) -> tuple[list[dict[str, Any]], list[str], dict[str, float]]:  # fmt: skip
    """Unlearn side by side, measuring the validation half and keeping models at every checkpoint.

    Returns the measurements, what is to be said of runs that failed, and the cost.
    """
    steps = config.unlearning.epochs * -(-len(study.setting.sets["forget"]) // config.unlearning.batch_size)
    every, width = -(-steps // config.checkpoints), config.width or len(runs)
    points, notes = [], []
    cost = {"runs": len(runs), "seconds": 0.0, "steps": 0, "tokens": 0}
    for first in range(0, len(runs), width):
        group = runs[first : first + width]

        def evaluate(step: int, params, group=group) -> None:
            for one, mine in zip(group, params, strict=True) if step else ():
                found = validate(study, mine)
                points.append({"learning_rate": one.learning_rate, "strength": one.strength, "step": step,
                               "seed": one.setting.seed, **found,
                               "criterion": criterion(found, before[one.setting.seed])})  # fmt: skip
                save_tree(place(scratch, step, one.learning_rate, one.strength, one.setting.seed), mine)

        with command.progress(f"{name}: {len(group)} runs") as show:
            swept = sweep(study.methods[name], group, config.unlearning, moving_parts(config.trainable, config.lora),
                          how=config.members, evaluate=evaluate, evaluate_every=every, show=show)  # fmt: skip
        notes += [f"rate {one.learning_rate:g}, strength {one.strength:g}, seed {one.setting.seed}: {note}"
                  for one, note in zip(group, swept.notes, strict=True) if note]  # fmt: skip
        cost = {**cost, "seconds": cost["seconds"] + swept.outcome.seconds,
                "steps": cost["steps"] + swept.outcome.steps * len(group),
                "tokens": cost["tokens"] + swept.outcome.tokens}  # fmt: skip
    return points, notes, cost


def place(scratch: Path, step: int, rate: float, strength: float, seed: int) -> Path:
    """Name the model of a member at a checkpoint."""
    return scratch / f"step{step}-rate{rate:g}-strength{strength:g}-seed{seed}"
