"""Time of an unlearning step by method, against a loop in PyTorch: same formula, weights, batches and optimizer.

    python -m benchmarks.unlearning_speed --batch 16 --length 128

Both sides run in turns in one process, ours first; a ratio is that of one turn, and medians count. A turn is `--steps`
steps: one device program of ours, as the training loop runs them, and one eager loop of PyTorch's, written here from
the formulas on transformers' model of the exported weights, with its own attention and fused AdamW. Making batches is
in neither time. The starting model is read when the method reads it, on both sides alike: NPO's log-likelihoods once
before training (not in the time), KL, UNDIAL and RMU in every step without gradient. RMU computes no more blocks than
it steers, on both sides; PyTorch's AdamW then skips the parameters of the others.

Losses of the first turn must agree, else nothing is reported. Without PyTorch its columns are empty. On a shared CPU,
pin the process (`taskset`): two contended threads make PyTorch's times erratic. `compile_seconds` is next to nothing
where a method before, or the machine's compile cache, has the same program.

Shapes: B rows of a batch, forget rows first, T tokens, V vocabulary, D width, S steps of a turn.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers, timing
from jaxforget import command
from jaxforget.data.sampling import id_keys
from jaxforget.data.tokens import IGNORED, Examples
from jaxforget.errors import RunError, UserError
from jaxforget.models import hub, llama
from jaxforget.models.model import build
from jaxforget.report.page import cell, figure, plots, table, write_page
from jaxforget.report.run import Run
from jaxforget.training.batches import Batches
from jaxforget.training.optimizer import TrainConfig, set_schedule
from jaxforget.training.start import ComputeConfig
from jaxforget.training.step import make_run
from jaxforget.training.trainable import everything
from jaxforget.unlearning import METHODS, Method, Recipe, Setting
from jaxforget.unlearning.rmu import RMU
from jaxforget.unlearning.run import step_of

MEASURED = ("gradient_ascent", "random_labels", "ascent_descent_indist", "ascent_kl_indist", "npo", "simnpo", "rmu",
            "wga", "satimp", "undial", "ceu")  # fmt: skip
TOLERANCE = {"first": 1e-4, "last": 1e-3}  # of losses, relative above 1: before any update, and after those of a turn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Measure the time of unlearning steps beside PyTorch's."""

    out: Path | None = None
    """Directory for everything the run leaves. Must be empty."""
    methods: tuple[str, ...] = MEASURED
    """Names from MEASURED in benchmarks/unlearning_speed.py."""
    model: str | None = None
    """Llama, Mistral or Qwen2 as a Hugging Face directory or hub name. Not given: a random one, as wide as follows."""
    width: int = 256
    """Width of the random model."""
    layers: int = 4
    """Its blocks."""
    vocab_size: int = 8192
    """Its vocabulary, tied."""
    batch: int = 8
    """Forget rows of a batch; as many retain rows where a method has them."""
    length: int = 128
    """Tokens of a row, all real; those after a prompt of random length are scored."""
    steps: int = 4
    """Steps of a turn."""
    repeats: int = 5
    """Turns, after one that warms up."""
    compute: ComputeConfig = ComputeConfig(dtype="float32")
    train: TrainConfig = TrainConfig(epochs=1, learning_rate=1e-4, schedule="constant", warmup=0.0)


def default() -> Config:
    """a Llama of width 256 with 4 layers, eleven methods: about ten minutes on two CPU cores"""
    return Config()


def smoke() -> Config:
    """a tiny model, two turns of each method; a minute, numbers without meaning"""
    return Config(width=32, layers=2, vocab_size=256, batch=4, length=16, steps=3, repeats=2)


PRESETS = {"default": default, "smoke": smoke}
FIELDS = ("name", "seconds_per_step", "tokens_per_second", "torch_seconds_per_step", "speedup", "speedup_low",
          "speedup_high", "compile_seconds", "loss_difference", "reference", "note")  # fmt: skip



class Work(NamedTuple):
    """What both sides do in a turn."""

    name: str
    method: Method
    recipe: Recipe
    batch_S: Mapping[str, np.ndarray]  # stacked


def run(config: Config) -> None:
    """Measure one method after another."""
    command.at_least(1, width=config.width, layers=config.layers, batch=config.batch, steps=config.steps,
                     repeats=config.repeats)  # fmt: skip
    command.at_least(4, length=config.length, vocab_size=config.vocab_size)
    if wrong := [name for name in config.methods if name not in MEASURED]:
        raise UserError(f"--methods {wrong[0]} is not measured here; use some of {', '.join(MEASURED)}")
    if not config.methods:
        raise UserError("--methods is empty; give one or more")
    if config.train.weight_decay:
        raise UserError(f"--train.weight-decay is {config.train.weight_decay}; only 0 is the same on both sides")
    config.train.microbatch_of(config.batch)
    model, params = model_of(config)
    out = Run("benchmarks.unlearning_speed", config, config.out, None)
    out.begin()
    rows = []
    with tempfile.TemporaryDirectory() as home:
        weights = hub.save(Path(home) / "model", model, params)
        for name in config.methods:
            rows.append(measure(config, work(config, model, params, name), model, params, weights))
            command.say(f"done: {name}")
    report(config, out, model, rows)


def model_of(config: Config):
    """Return the model and its parameters, on the host."""
    if config.model:
        model, params = hub.load(config.model)
        if model.config.model_type not in llama.ARCHITECTURES or model.config.head != "causal":
            raise UserError(f"--model {config.model} is {model.config.model_type} with a {model.config.head} head; "
                            f"use a causal {', '.join(llama.ARCHITECTURES)}")  # fmt: skip
        if config.length > model.max_length:
            raise UserError(f"--length is {config.length}; the model was made for {model.max_length} tokens")
        return config.compute.apply(model), params
    heads = max(1, config.width // 64)
    if config.width % (2 * heads):
        raise UserError(f"--width {config.width} does not divide into {heads} heads of even width")
    shape = llama.Config(
        vocab_size=config.vocab_size, hidden_size=config.width, intermediate_size=-(-8 * config.width // 3 // 8) * 8,
        num_hidden_layers=config.layers, num_attention_heads=heads, tie_word_embeddings=True,
        max_position_embeddings=config.length,
    )  # fmt: skip
    model = config.compute.apply(build(shape))
    return model, jax.tree.map(np.asarray, model.init(jax.random.key(0)))


def work(config: Config, model, params, name: str) -> Work:
    """Ask the method for its recipe, and make the batches of a turn."""
    sets = {kind: texts(config, model.vocab_size, kind) for kind in ("forget", "retain")}
    method = METHODS[name]
    recipe = method.recipe(Setting(model, params, sets, config.batch, 0))
    return Work(name, method, recipe, Batches(recipe.streams, 1, 0).take(0, config.steps, config.steps))


def texts(config: Config, vocab_size: int, kind: str) -> Examples:
    """Draw as many random texts as a turn needs. Their prompts differ in length: means of other kinds then differ."""
    rng, rows = np.random.default_rng(len(kind)), config.batch * config.steps
    token_NT = rng.integers(0, vocab_size, (rows, config.length)).astype(np.int32)
    prompt_N1 = rng.integers(1, config.length // 2 + 1, (rows, 1))
    label_NT = np.pad(token_NT[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
    label_NT = np.where(np.arange(config.length)[None] < prompt_N1 - 1, IGNORED, label_NT).astype(np.int32)
    ids = tuple(f"{kind}{i}" for i in range(rows))
    length_N = np.full(rows, config.length, np.int32)
    return Examples(ids, {"tokens": token_NT, "labels": label_NT, "length": length_N, "key": id_keys(ids)})


def measure(config: Config, mine: Work, model, params, weights: Path) -> dict[str, Any]:
    """Run both sides in turns."""
    ours, compiling = our_turn(config, mine, params)
    theirs = torch_turn(config, mine, model, weights)
    sides = {"ours": ours} | ({} if theirs is None else {"torch": theirs})
    seconds, losses = timing.turns(sides, config.repeats)  # the first turns are from the same weights
    median = statistics.median(seconds["ours"]) / config.steps
    row = {"name": mine.name, "seconds_per_step": median, "compile_seconds": compiling,
           "tokens_per_second": mine.batch_S["tokens"][0].size / median, "reference": reference_of(mine.recipe),
           "torch_seconds_per_step": None, "speedup": None, "speedup_low": None, "speedup_high": None,
           "loss_difference": None, "last_loss_difference": None, "note": "no PyTorch or transformers to compare with"}
    if theirs is None:
        return row
    return row | agreement(mine.name, losses["ours"], losses["torch"]) | {
        "torch_seconds_per_step": statistics.median(seconds["torch"]) / config.steps,
        **timing.spread("speedup", timing.ratios(seconds["torch"], seconds["ours"])), "note": None,
    }  # fmt: skip


def agreement(name: str, ours_S: np.ndarray, torch_S: np.ndarray) -> dict[str, float]:
    """Return by how much losses differ at the first and the last step. Raises RunError where it is too much."""
    found = {}
    for when, step in (("first", 0), ("last", -1)):
        one, other = float(ours_S[step]), float(torch_S[step])
        found[when] = abs(one - other)
        if not found[when] <= TOLERANCE[when] * max(1.0, abs(other)):
            raise RunError(f"{name}: the {when} loss of a turn is {one:.6g} here and {other:.6g} in PyTorch; both "
                           "sides must compute the same")  # fmt: skip
    return {"loss_difference": found["first"], "last_loss_difference": found["last"]}


def reference_of(recipe: Recipe) -> str:
    """Say when the starting model is read."""
    return "each step" if recipe.reference_streams else "before" if recipe.prepare_forwards else "never"


# ------------------------------------------------------------------------------------------------ both sides
def our_turn(config: Config, mine: Work, params) -> tuple[peers.Turn, float]:
    """Compile the steps of a turn as `training.loop.fit` runs them. Returns the turn and the seconds it took."""
    step = step_of(mine.recipe, config.train, everything())
    state, frozen = step.init(jax.random.key(0), {"model": params, **mine.recipe.parts})
    state = set_schedule(state, learning_rate=config.train.learning_rate, total=config.steps)
    batch_S = jax.tree.map(jnp.asarray, dict(mine.batch_S))
    program, took, _ = timing.compiled(make_run(step), state, frozen, batch_S, config.steps)

    def turn() -> np.ndarray:
        nonlocal state  # its buffers are donated
        state, metrics_S = jax.block_until_ready(program(state, frozen, batch_S, config.steps))
        return np.asarray(metrics_S["loss"])

    return turn, took


def torch_turn(config: Config, mine: Work, model, weights: Path) -> peers.Turn | None:
    """Make the same steps in PyTorch; None where it is not installed, or not on our device."""
    device = peers.torch_device()
    if device is None:
        return None
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of reading weights

    def load():
        found = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32).to(device)
        if not isinstance(mine.method, RMU):
            return found
        blocks = mine.method.blocks(model)
        found.model.layers, found.model.norm = found.model.layers[:blocks], torch.nn.Identity()
        return found.model

    moving = load().train()
    reference = load().requires_grad_(False) if "reference" in mine.recipe.parts else None
    target = torch.tensor(np.asarray(mine.recipe.parts["target"])).to(device) if mine.name == "rmu" else None
    names = {"tokens", "labels", "reference_logp"} & set(mine.batch_S)
    batches = [{name: torch.tensor(mine.batch_S[name][s]).to(device) for name in names} for s in range(config.steps)]
    for batch in batches:
        batch["labels"] = batch["labels"].long()
    loss_of = functools.partial(torch_losses(torch, moving, reference, target, config.batch)[mine.name], mine.method)
    return peers.torch_steps(torch, moving, loss_of, batches, config.train)


def torch_losses(torch, model, reference, target_D, rows: int) -> dict[str, Callable[[Any, dict], Any]]:
    """Return loss(method, batch) in PyTorch by method. The first `rows` rows are to be forgotten.

    The formulas are those at the heads of jaxforget/unlearning/*.py.
    """
    F = torch.nn.functional

    def by_sequence(value_BT, scored_BT):
        return (value_BT * scored_BT).sum(1) / scored_BT.sum(1)

    def by_token(value_BT, scored_BT):
        return (value_BT * scored_BT).sum() / scored_BT.sum()

    def read(batch):
        label_BT = batch["labels"]
        logit_BTV = model(input_ids=batch["tokens"], use_cache=False).logits
        nll = F.cross_entropy(logit_BTV.flatten(0, 1), label_BT.flatten(), ignore_index=IGNORED, reduction="none")
        return logit_BTV, nll.view_as(label_BT), label_BT != IGNORED

    def before(token_BT):
        with torch.no_grad():
            return reference(input_ids=token_BT, use_cache=False)

    def ascent(method, batch):
        _, nll_BT, scored_BT = read(batch)
        return -by_sequence(nll_BT, scored_BT).mean()

    def descent(method, batch):
        return -ascent(method, batch)

    def ascent_descent(method, batch):
        _, nll_BT, scored_BT = read(batch)
        loss_B = by_sequence(nll_BT, scored_BT)
        return method.retain_weight * loss_B[rows:].mean() - method.forget_weight * loss_B[:rows].mean()

    def ascent_kl(method, batch):
        logit_BTV, nll_BT, scored_BT = read(batch)
        was_BTV = before(batch["tokens"][rows:]).logits.log_softmax(-1)
        kl_BT = F.kl_div(logit_BTV[rows:].log_softmax(-1), was_BTV, reduction="none", log_target=True).sum(-1)
        forget_B, retain_B = by_sequence(nll_BT[:rows], scored_BT[:rows]), by_sequence(kl_BT, scored_BT[rows:])
        return method.retain_weight * retain_B.mean() - method.forget_weight * forget_B.mean()

    def beside_retain(forget_loss):
        def loss(method, batch):
            logit_BTV, nll_BT, scored_BT = read(batch)
            found = forget_loss(method, batch, logit_BTV[:rows], nll_BT[:rows], scored_BT[:rows])
            if len(nll_BT) > rows:
                found = method.forget_weight * found + method.retain_weight * by_token(nll_BT[rows:], scored_BT[rows:])
            return found

        return loss

    def npo(method, batch, logit_BTV, nll_BT, scored_BT):
        ratio_B = -nll_BT.sum(1) - batch["reference_logp"][:rows]
        return 2 / method.beta * F.softplus(method.beta * ratio_B).mean()

    def simnpo(method, batch, logit_BTV, nll_BT, scored_BT):
        over_B = method.beta * (by_sequence(nll_BT, scored_BT) - method.delta) - method.margin
        return -2 / method.beta * F.logsigmoid(over_B).mean()

    def weighted(weight):
        def loss(method, batch, logit_BTV, nll_BT, scored_BT):
            return -by_token(weight(method, (-nll_BT).exp().detach()) * nll_BT, scored_BT)

        return loss

    def cross_entropy(logit_BTV, target_BTV, scored_BT):
        cross = F.cross_entropy(logit_BTV.flatten(0, 1), target_BTV.flatten(0, 1), reduction="none")
        return by_token(cross.view_as(scored_BT), scored_BT)

    def undial(method, batch, logit_BTV, nll_BT, scored_BT):
        true_BTV = F.one_hot(batch["labels"][:rows].clamp(min=0), logit_BTV.shape[-1])
        lowered_BTV = before(batch["tokens"][:rows]).logits - method.beta * true_BTV
        return cross_entropy(logit_BTV, lowered_BTV.softmax(-1), scored_BT)

    def ceu(method, batch, logit_BTV, nll_BT, scored_BT):
        true_BT1 = batch["labels"][:rows].clamp(min=0)[..., None]
        without_BTV = logit_BTV.detach().scatter(-1, true_BT1, float("-inf"))
        return cross_entropy(logit_BTV, without_BTV.softmax(-1), scored_BT)

    def rmu(method, batch):
        answer_BT = F.pad(batch["labels"][:, :-1] != IGNORED, (1, 0))
        h_BTD = model(input_ids=batch["tokens"], use_cache=False).last_hidden_state
        was_BTD = before(batch["tokens"][rows:]).last_hidden_state
        forget_B = by_sequence((h_BTD[:rows] - target_D).square().mean(-1), answer_BT[:rows])
        retain_B = by_sequence((h_BTD[rows:] - was_BTD).square().mean(-1), answer_BT[rows:])
        return method.forget_weight * forget_B.mean() + method.retain_weight * retain_B.mean()

    return {
        "gradient_ascent": ascent, "random_labels": descent, "ascent_descent_indist": ascent_descent,
        "ascent_kl_indist": ascent_kl, "npo": beside_retain(npo), "simnpo": beside_retain(simnpo), "rmu": rmu,
        "wga": beside_retain(weighted(lambda method, p_BT: p_BT**method.beta)),
        "satimp": beside_retain(weighted(lambda method, p_BT: p_BT**method.beta1 * (1 - p_BT) ** method.beta2)),
        "undial": beside_retain(undial), "ceu": beside_retain(ceu),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------- report
def report(config: Config, out: Run, model, rows: list[dict[str, Any]]) -> None:
    """Write results.json and the page."""
    document = out.finish(rows)
    shown = [row for row in rows if row["speedup"]]
    fields = [field for field in FIELDS if any(row[field] is not None for row in rows)]

    def draw(axes):
        ends = [[row["speedup"] - row["speedup_low"] for row in shown],
                [row["speedup_high"] - row["speedup"] for row in shown]]  # fmt: skip
        axes.barh([row["name"] for row in shown], [row["speedup"] for row in shown], height=0.6, xerr=ends)
        axes.invert_yaxis()
        axes.axvline(1, color="0.5", lw=0.8)
        axes.set(xlabel="time of a step in PyTorch / ours", ylabel="method")

    weights = sum(x.size for x in jax.tree.leaves(model.shapes()))
    lead = ("How long does a step of each method take, here and in PyTorch? "
            f"{model.config.model_type}, {weights / 1e6:.1f} M parameters, {config.batch} forget rows of "
            f"{config.length} tokens; {document['device']}.")  # fmt: skip
    found = [f"`{row['name']}`: {cell(row['seconds_per_step'])} s a step"
             + (f", {cell(row['speedup'])} times as fast as PyTorch" if row["speedup"] else "") + "." for row in rows]
    note = (f"Medians of {config.repeats} turns of {config.steps} steps. Speedup: time of PyTorch's turn / ours, in "
            "brackets the lowest and highest turn. Reference: when the starting model is read, on both sides. Loss "
            "difference: at the first step.")  # fmt: skip
    plot = plots(figure(draw, height=1.0 + 0.26 * len(shown))) if shown else ""
    write_page(out.directory / "report.html", "Time of an unlearning step", lead,
               [("Methods", note, plot + table(rows, fields))], document["config"], found)  # fmt: skip
    command.print_table(rows, fields, f"benchmarks.unlearning_speed · {out.directory}")


if __name__ == "__main__":
    command.main(run, PRESETS)
