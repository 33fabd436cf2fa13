"""Make small ensembles in this process, and train single models without them to compare with.

The models here are toys, whose programs compile in a second; `start="llama"` or `"distilbert"` keeps the real one.
"""

import atexit
import dataclasses
import functools
import json
import shutil
import tempfile
from fractions import Fraction
from math import floor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from conftest import Toy

from jaxforget.data.sampling import hash_int
from jaxforget.data.sources import Record
from jaxforget.data.tasks import classify
from jaxforget.data.text import TextConfig
from jaxforget.data.tokens import tokenize
from jaxforget.errors import UserError
from jaxforget.models import hub
from jaxforget.report.run import plain
from jaxforget.sisa.deletion import ask, serve
from jaxforget.sisa.ensemble import Ensemble, base_digest
from jaxforget.sisa.ledger import Ledger, Row
from jaxforget.sisa.recipe import Recipe
from jaxforget.training.batches import Batches, Stream
from jaxforget.training.ensemble import member, members, stack
from jaxforget.training.gradients import mean_gradient
from jaxforget.training.lora import LoraConfig, moving_parts
from jaxforget.training.objectives import classification, next_token
from jaxforget.training.optimizer import TrainConfig, adamw, set_schedule
from jaxforget.training.start import ComputeConfig, SizeConfig, start_from, tokenizer_files
from jaxforget.training.step import make_run, make_step

CONTEXT, VOCABULARY = 16, 300
LABELS = ("no", "yes")
TOKENIZER_TEXT = ["the cat sat on the mat and the dog ran to the river and back again"] * 2
SETTINGS = dict(epochs=3, batch_size=4, microbatch=2, learning_rate=0.02)


@dataclasses.dataclass(frozen=True)
class Speaker(Toy):
    """The toy language model with the vocabulary of the tokenizer."""

    vocab_size: int = VOCABULARY
    max_length: int = CONTEXT
    config = None


@dataclasses.dataclass(frozen=True)
class Classifier:
    """Classes from the mean embedding of a text."""

    vocab_size: int = VOCABULARY
    width: int = 6
    classes: int = len(LABELS)
    max_length: int = CONTEXT
    config = None

    def init(self, key):
        k1, k2 = jax.random.split(key)
        return {
            "embed": {"embedding": jax.random.normal(k1, (self.vocab_size, self.width))},
            "score": {"kernel": jax.random.normal(k2, (self.width, self.classes)), "bias": jnp.zeros(self.classes)},
        }

    def batch_logits(self, params, batch):
        real_BT1 = (jnp.arange(batch["tokens"].shape[1])[None] < batch["length"][:, None])[..., None]
        total_BD = jnp.sum(jnp.where(real_BT1, params["embed"]["embedding"][batch["tokens"]], 0.0), axis=1)
        hidden_BD = jnp.tanh(total_BD / batch["length"][:, None])
        return hidden_BD @ params["score"]["kernel"] + params["score"]["bias"][None]


TOYS = {"causal": Speaker(), "classification": Classifier()}


@functools.cache
def base(family: str, task: str, seed: int = 0) -> Path:
    """Save a tiny model of a real family with a tokenizer, once."""
    directory = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    size = SizeConfig(family=family, width=16, layers=1, heads=2, context=CONTEXT, vocab_size=VOCABULARY)
    labels = LABELS if task == "classification" else ()
    start = start_from(
        None, tokenizer_name=None, size=size, compute=ComputeConfig(), texts=TOKENIZER_TEXT, head=task, labels=labels
    )
    return hub.save(
        directory / "base", start.model, start.params(seed), extra_files=tokenizer_files(start.save_tokenizer)
    )


def record(identity: str, task: str = "causal", length: int = 4) -> Record:
    """Return a record that says something no other one does."""
    digest = hash_int(int.from_bytes(identity.encode(), "big") % 2**61)
    words = " ".join(f"{digest:016x}"[3 * i : 3 * i + 3] for i in range(max(1, length)))
    fields = {"label": LABELS[digest % 2]} if task == "classification" else {}
    return Record(identity, words, None, fields)


def grid(sizes, task: str = "causal") -> list[tuple[Record, int, int]]:
    """Give sizes[shard][slice] records their places; their ids say where they are."""
    return [
        (record(f"record-s{shard}r{cut}n{n}", task, 1 + (shard + cut + n) % 5), shard, cut)
        for shard, row in enumerate(sizes)
        for cut, size in enumerate(row)
        for n in range(size)
    ]


def recipe_of(places, *, start: str | None = None, train=None, text=None, **settings) -> tuple[Recipe, Path]:
    """Return the recipe of an ensemble with records in these places, and the model to copy."""
    task = settings.pop("task", "causal")
    shards = 1 + max(shard for _, shard, _ in places)
    origin = base(start or "llama", task if start else "causal")
    recipe = Recipe(
        task=task, labels=LABELS if task == "classification" else (), start=base_digest(origin),
        widths={"tokens": CONTEXT} if task == "classification" else {"tokens": CONTEXT, "labels": CONTEXT},
        train=TrainConfig(**SETTINGS | (train or {})), text=text or TextConfig(), compute=ComputeConfig(),
        **{
            "shards": shards, "slices": 1 + max(cut for *_, cut in places), "seed": 0, "weighting": "sequence",
            "members": "map", "width": shards, "trainable": (), "lora": LoraConfig(rank=0), **settings,
        },
    )  # fmt: skip
    return recipe, origin


def create(directory: Path, places, recipe: Recipe, origin: Path, *, real: bool = False) -> Ensemble:
    """Write an untrained ensemble and open it."""
    directory.mkdir()
    shutil.copytree(origin, directory / "base")
    config = {"export": real, "checkpoint_every": 0, "out": "here", "resume": False}
    (directory / "config.json").write_text(json.dumps({"config": config}))
    meta = {"recipe": json.dumps(plain(recipe)), "config": json.dumps(config)}
    tokenizer = _tokenizer(origin)
    rows = [Row(one, shard, cut, len(tokens(recipe, tokenizer, [one]) or ())) for one, shard, cut in places]
    Ledger.create(directory, meta, rows)
    return opened(directory, real=real)


def make(directory: Path, places, **settings) -> Ensemble:
    """Write an untrained ensemble of toys (of real models with `start`) and open it."""
    return create(directory, places, *recipe_of(places, **settings), real=bool(settings.get("start")))


def opened(directory: Path, real: bool = False) -> Ensemble:
    """Open an ensemble and put the toy in the place of its model."""
    ensemble = Ensemble(directory)
    if not real:
        ensemble.model = TOYS[ensemble.recipe.task]
        ensemble._initial = ensemble.model.init(jax.random.key(1))
        ensemble.step = ensemble.recipe.step(ensemble.model, None)
    return ensemble


def delete(ensemble: Ensemble, *requests) -> list[dict]:
    """Accept requests, each of some ids, and serve them together."""
    for ids in requests:
        ensemble.ledger.receive(ask(ensemble, ids).new)
    return serve(ensemble, export=False)


@functools.cache
def _tokenizer(origin: Path):
    from jaxforget.data.tokens import load_tokenizer

    return load_tokenizer(origin)


def tokens(recipe: Recipe, tokenizer, records):
    """Tokenise records, or return None when none of them has anything to train on."""
    longest = recipe.text.max_length or CONTEXT
    if recipe.task == "classification":
        examples = classify(records, tokenizer, LABELS, max_length=longest)
    else:
        try:
            examples = tokenize(records, tokenizer, max_length=longest, text_mode=recipe.text.text_mode)
        except UserError:
            return None
    return examples.widen(recipe.widths) if len(examples) else None


def alone(ensemble: Ensemble, places, shard: int, *, solo: bool = False) -> list:
    """Train one shard by itself on the records in these places; returns the parameters of each stage, None if empty.

    Nothing of the ensemble is used but its settings, model and tokenizer: a plain loop over slices, with the records
    in another order. The shard has its place in the program of all members, whose other places are idle. solo: a
    program of one member and other chunks instead; compilers may round that one differently.
    """
    recipe, model = ensemble.recipe, ensemble.model
    objective = {"causal": next_token, "classification": classification}[recipe.task](model)
    moving = moving_parts(recipe.trainable, recipe.lora)
    step = make_step(objective, moving, mean_gradient(recipe.train.microbatch or None), adamw(recipe.train))
    root = jax.random.key(recipe.seed)
    rate = Fraction(2 * recipe.train.epochs, recipe.slices + 1)
    result, trained = [], None
    for stage in range(recipe.slices):
        records = [one for one, where, cut in places if where == shard and cut <= stage][::-1]
        examples = tokens(recipe, ensemble.tokenizer, records) if records else None
        if examples is None:
            result.append(None)
            continue
        epochs = floor((stage + 1) * rate) - floor(stage * rate)
        seed = hash_int(recipe.seed, shard, stage)
        batches = Batches((Stream(examples, recipe.train.batch_size),), epochs, seed, recipe.weighting)
        key = jax.random.fold_in(jax.random.fold_in(root, shard), stage)
        state, frozen = step.init(key, {"model": ensemble._initial})
        if trained is not None:
            state = state._replace(trainable=jax.tree.map(jnp.array, trained))
        state = set_schedule(state, learning_rate=recipe.train.learning_rate, total=batches.steps)
        chunk, slot = 5 if solo else 32, shard % recipe.width
        run = make_run(step if solo else members(step, recipe.members))
        if not solo:
            state = stack([state] * recipe.width)
        for first in range(0, batches.steps, chunk):
            last = min(first + chunk, batches.steps)
            batch, count = batches.take(first, last, chunk), np.int32(last - first)
            if not solo:
                here_K = np.arange(recipe.width) == slot
                count = np.where(here_K, count, 0).astype(np.int32)
                batch = {name: np.stack([x if here else 0 * x for here in here_K]) for name, x in batch.items()}
            state, _ = run(state, frozen, batch, count)
        trained = jax.tree.map(np.asarray, state.trainable if solo else member(state.trainable, slot))
        result.append(trained)
    return result


def stored(ensemble: Ensemble) -> list[list]:
    """Load what every shard has of every stage, None where there is none."""
    state, _ = ensemble.step.init(jax.random.key(0), {"model": ensemble._initial})
    return [
        [None if key is None else ensemble.store.get(key, state.trainable) for key in row] for row in ensemble.needed()
    ]


def bits(tree) -> dict[str, tuple] | None:
    """Return all that a pytree of arrays is, to compare with ==."""
    if tree is None:
        return None
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): (str(x.dtype), x.shape, np.asarray(x).tobytes()) for path, x in leaves
    }


def files(directory: Path) -> dict[str, tuple]:
    """Return path -> inode, time of change and content of every file below a directory."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            about = path.stat()
            found[str(path.relative_to(directory))] = (about.st_ino, about.st_mtime_ns, path.read_bytes())
    return found
