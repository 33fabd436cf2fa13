"""A toy model with blocks, questions with answers for it, and the one program a method's tests share."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from jaxforget.data.sampling import id_keys
from jaxforget.data.sources import Record
from jaxforget.data.tokens import IGNORED, Examples
from jaxforget.models.layers import linear
from jaxforget.training.batches import Batches
from jaxforget.training.gradients import mean_gradient
from jaxforget.training.lora import LoraConfig, lora
from jaxforget.training.sparse import Layout, sparse_difference
from jaxforget.unlearning import METHODS, Setting


@dataclasses.dataclass(frozen=True)
class Layered:
    """A causal model of two blocks, each a mix of the tokens so far."""

    vocab_size: int = 11
    width: int = 6
    max_length: int = 16

    config = SimpleNamespace(stacks={"blocks": 2})

    def init(self, key):
        k1, k2, k3, k4 = jax.random.split(key, 4)
        return {
            "embed": {"table": jax.random.normal(k1, (self.vocab_size, self.width))},
            "blocks": {"mix": {"kernel": jax.random.normal(k2, (2, self.width, self.width)) * 0.7,
                               "bias": jax.random.normal(k3, (2, self.width)) * 0.1}},
            "head": {"kernel": jax.random.normal(k4, (self.width, self.vocab_size)) * 0.5},
        }  # fmt: skip

    def stream(self, params, batch, blocks):
        x_BTD = params["embed"]["table"][batch["tokens"]]
        count_T1 = jnp.arange(1, x_BTD.shape[1] + 1, dtype=jnp.float32)[:, None]
        for layer in range(blocks):
            mix = jax.tree.map(lambda x, layer=layer: x[layer], params["blocks"]["mix"])
            x_BTD = x_BTD + jnp.tanh(linear(jnp.cumsum(x_BTD, axis=1) / count_T1[None], mix["kernel"], mix["bias"]))
        return x_BTD

    def batch_logits(self, params, batch):
        return linear(self.stream(params, batch, 2), params["head"]["kernel"])

    def flops_per_token(self, length):
        return 1.0


def example_rows(rows, prompts, ids) -> Examples:
    """Pad rows of tokens to 8; what follows a prompt is scored."""
    width = 8
    tokens_NT = np.zeros((len(rows), width), np.int32)
    labels_NT = np.full((len(rows), width), IGNORED, np.int32)
    for n, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        tokens_NT[n, : len(row)] = row
        labels_NT[n, prompt - 1 : len(row) - 1] = row[prompt:]
    length_N = np.asarray(list(map(len, rows)), np.int32)
    return Examples(tuple(ids), {"tokens": tokens_NT, "labels": labels_NT, "length": length_N, "key": id_keys(ids)})


def question_answers(count: int, *, seed: int, prefix: str, longest: int = 8) -> list[Record]:
    """Questions of 2 or 3 tokens and answers of 2 to 5, written as numbers."""
    rng = np.random.default_rng(seed)

    def words(low, high):
        return " ".join(map(str, rng.integers(1, 11, rng.integers(low, high + 1))))

    fields = [{"perturbed_answer": [words(2, 4)], "alternative_answer": words(2, 4)} for _ in range(count)]
    answers = [words(2, longest - 3) for _ in range(count)]
    return [Record(f"{prefix}{i}", answers[i], words(2, 3), fields[i]) for i in range(count)]


def encode(records) -> Examples:
    """Read numbers as tokens; any other word is a token as well. Eight tokens at most."""
    def ids(text):
        return [int(word) if word.isdecimal() else 1 + sum(map(ord, word)) % 10 for word in text.split()]

    prompts = [ids(record.prompt) for record in records]
    rows = [(prompt + ids(record.text))[:8] for prompt, record in zip(prompts, records, strict=True)]
    return example_rows(rows, list(map(len, prompts)), [record.id for record in records])


MODEL = Layered()
PARAMS, OTHER = (jax.tree.map(np.asarray, MODEL.init(jax.random.key(seed))) for seed in (0, 1))
RECORDS = question_answers(8, seed=1, prefix="f")
SETS = {"forget": encode(RECORDS), "retain": encode(question_answers(12, seed=2, prefix="r")),
        "general": encode(question_answers(10, seed=3, prefix="g", longest=6))}  # fmt: skip
SETTING = Setting(MODEL, PARAMS, SETS, rows=4, seed=0, special_ids=(0,), pad_id=0, records=RECORDS, encode=encode)


# ------------------------------------------------------------------------------------------------ what moves
KERNEL = "blocks/mix/kernel"
PLACES = np.asarray([3, 17, 40, 71], np.uint32)  # of 72 parameters
LORA = LoraConfig(rank=2, targets=("mix",))


MOVING = {"lora": lora(LORA), "sparse": sparse_difference(Layout((KERNEL,), ((2, 6, 6),), (2,)), PLACES)}


# -------------------------------------------------------------------------------------------------- programs
def first_batch(recipe, seed=0):
    return {name: column[0] for name, column in Batches(recipe.streams, 1, seed).take(0, 1, 1).items()}


@functools.cache
def compiled(objective):
    """Return function(params, parts, batch) -> (loss, gradient), compiled once for all methods with this objective."""

    def function(params, parts, batch):
        def losses(params, batch, key):
            return objective({"model": params, **parts}, batch, key)

        report, grads = mean_gradient()(losses, params, batch, jax.random.key(1))
        return report["loss"], grads

    return jax.jit(function)


@functools.cache
def forward(objective, how=""):
    """Return function(params, parts, batch) -> losses_B, compiled. how: `members`, of params_K."""

    def function(params, parts, batch):
        return objective({"model": params, **parts}, batch, jax.random.key(1))

    return jax.jit(jax.vmap(function, (0, None, None)) if how == "members" else function)


def mean_loss(losses_B, batch) -> float:
    return float(np.sum(batch["weight"] * np.asarray(losses_B)) / np.sum(batch["weight"]))


@functools.cache
def prepared(name):
    """Return (recipe, first batch) of a row of METHODS."""
    recipe = METHODS[name].recipe(SETTING)
    return recipe, first_batch(recipe)


def evaluate(name, params=OTHER, batch=None):
    """Return (loss, gradient) of a row of METHODS on its first batch, or another of that shape."""
    recipe, first = prepared(name)
    return compiled(recipe.objective)(params, dict(recipe.parts), first if batch is None else batch)
