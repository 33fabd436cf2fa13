"""How much of an attribute a representation tells: fresh attackers on frozen embeddings, beside what they cannot miss.

Several heads train on the embeddings of one set, are chosen by the loss on another, and vote on a third. The label-only
floor is what the gold task label alone tells: a representation that solves the task cannot leak less. Protocol: arXiv
2205.15171, released code; choosing on validation and reporting on test, and the floor, are ours. Shapes: N examples, D
width, C classes of the attribute, Y of the task, H heads.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxforget import checks
from jaxforget.data.sampling import id_keys
from jaxforget.data.tokens import Examples
from jaxforget.errors import UserError
from jaxforget.metrics.language import in_batches
from jaxforget.metrics.leakage_heads import draw_heads, head_logp
from jaxforget.models import Model, Params
from jaxforget.models.sharding import ROWS, host, size
from jaxforget.training.batches import Batches, Stream
from jaxforget.training.gradients import mean_gradient
from jaxforget.training.loop import fit
from jaxforget.training.optimizer import OptimizerConfig, adamw, set_schedule
from jaxforget.training.step import make_step
from jaxforget.training.trainable import subset


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackConfig:
    """Fresh attackers."""

    heads: int = 5
    """Heads that vote."""
    epochs: int = 40
    """Passes over the training embeddings; the best by validation loss counts."""
    batch_size: int = 64
    """Embeddings in a batch."""
    learning_rate: float = 1e-3
    """Of Adam, constant."""

    def __post_init__(self):
        checks.at_least(1, named="attack ", heads=self.heads, epochs=self.epochs, batch_size=self.batch_size)
        checks.positive(named="attack ", learning_rate=self.learning_rate)


class Split(NamedTuple):
    """Embeddings and an attribute, -1 where it is unknown."""

    x_ND: np.ndarray
    attribute_N: np.ndarray

    @property
    def known(self) -> Split:
        real_N = self.attribute_N >= 0
        return Split(self.x_ND[real_N], self.attribute_N[real_N])


@functools.cache
def _embedder(model):
    return jax.jit(lambda params, batch: model.pooled(params, batch).astype(jnp.float32))


def embed(model: Model, params: Params, examples: Examples, batch: int = 64) -> np.ndarray:
    """Return what the head reads of every example, float32 (N, D)."""
    return in_batches(_embedder(model), params, examples, batch)


@functools.cache
def _score(model):
    return jax.jit(model.classify)


def predict(model: Model, params: Params, x_ND: np.ndarray) -> np.ndarray:
    """Return the class that the head of a model gives embeddings, int (N,)."""
    return host(_score(model)(params, jnp.asarray(x_ND))).argmax(axis=-1)


def balanced_accuracy(predicted_N: np.ndarray, true_N: np.ndarray, classes: int) -> float:
    """Return the mean recall of the classes that occur, in percent."""
    present = [c for c in range(classes) if (true_N == c).any()]
    return float(100.0 * np.mean([(predicted_N[true_N == c] == c).mean() for c in present]))


def votes(predicted_HN: np.ndarray, classes: int) -> np.ndarray:
    """Return the class that most heads name; of equals the first."""
    return np.stack([(predicted_HN == c).sum(axis=0) for c in range(classes)]).argmax(axis=0)


def _losses(parts, batch, key):
    logp_HBC = head_logp(parts["heads"], batch["x"], key)
    logp_HB = jnp.take_along_axis(logp_HBC, batch["attribute"][None, :, None], axis=2)[..., 0]
    return -jnp.mean(logp_HB, axis=0) / (logp_HBC.shape[-1] * parts["shares"][batch["attribute"]])


@jax.jit
def _scores(heads_H, x_ND, attribute_N):
    logp_HNC = head_logp(heads_H, x_ND)
    own_HN = jnp.take_along_axis(logp_HNC, attribute_N[None, :, None], axis=2)[..., 0]
    member_NC = jax.nn.one_hot(attribute_N, logp_HNC.shape[-1])
    return jnp.argmax(logp_HNC, axis=-1), -jnp.mean(own_HN @ (member_NC / jnp.maximum(member_NC.sum(0), 1.0)[None]))


def attack(train: Split, valid: Split, test: Split, classes: int, config: AttackConfig, seed: int) -> dict[str, float]:
    """Train attackers and return their accuracy and balanced accuracy on `test`, in percent, and the epoch chosen.

    Embeddings are standardised by the training set, and classes weigh alike in the loss, as they do in the measure.
    Raises UserError for an attribute with one value.
    """
    train, valid, test = (split.known for split in (train, valid, test))
    count_C = np.bincount(train.attribute_N, minlength=classes)
    if (count_C > 0).sum() < 2:
        raise UserError("an attribute has one value in the training set; there is nothing to tell")
    mean_D, std_D = train.x_ND.mean(axis=0), train.x_ND.std(axis=0) + 1e-6
    train, valid, test = (s._replace(x_ND=(s.x_ND - mean_D) / std_D) for s in (train, valid, test))
    count, ids = len(train.attribute_N), tuple(map(str, range(len(train.attribute_N))))
    columns = {"x": train.x_ND.astype(np.float32), "attribute": train.attribute_N.astype(np.int32),
               "length": np.ones(count, np.int32), "key": id_keys(ids)}  # fmt: skip
    rows = min(config.batch_size, count + -count % size(*ROWS))
    batches = Batches((Stream(Examples(ids, columns), rows),), config.epochs, seed)
    optimizer = adamw(OptimizerConfig(schedule="constant", warmup=0.0, max_grad_norm=0.0, weight_decay=0.01))
    step = make_step(_losses, subset("heads/.*"), mean_gradient(), optimizer)
    key = jax.random.key(seed)
    parts = {"heads": draw_heads(jax.random.fold_in(key, 1), config.heads, train.x_ND.shape[1], classes),
             "shares": jnp.maximum(jnp.asarray(count_C / count, jnp.float32), 1.0 / count)}  # fmt: skip
    state, frozen = step.init(key, parts)
    state = set_schedule(state, learning_rate=config.learning_rate, total=batches.steps)
    best = (np.inf, 0, None)

    def evaluate(done, parts):
        nonlocal best
        _, loss = _scores(parts["heads"], valid.x_ND, valid.attribute_N)
        if float(loss) < best[0]:
            best = float(loss), done, jax.tree.map(np.asarray, parts["heads"])
        return False

    epoch = batches.steps_per_epoch
    fit(step, state, frozen, batches, chunk=epoch, evaluate_every=epoch, evaluate=evaluate)
    predicted_N = votes(np.asarray(_scores(best[2], test.x_ND, test.attribute_N)[0]), classes)
    return {
        "balanced_accuracy": balanced_accuracy(predicted_N, test.attribute_N, classes),
        "accuracy": float(100.0 * (predicted_N == test.attribute_N).mean()),
        "epoch": best[1] // epoch,
    }


def label_floor(
    train_label_N: np.ndarray, train_attribute_N: np.ndarray, label_N: np.ndarray, attribute_N: np.ndarray, classes: int
) -> float:
    """Return the balanced accuracy, in percent, of the best attacker that sees the gold task label alone.

    For every label it names the class a with the largest P(label | a) of the training set.
    """
    train_label_N, train_attribute_N, label_N, attribute_N = map(
        np.asarray, (train_label_N, train_attribute_N, label_N, attribute_N)
    )
    labels = int(max(train_label_N.max(), label_N.max())) + 1
    count_YC = np.zeros((labels, classes))
    known_N = train_attribute_N >= 0
    np.add.at(count_YC, (train_label_N[known_N], train_attribute_N[known_N]), 1)
    named_Y = (count_YC / np.maximum(count_YC.sum(axis=0), 1)).argmax(axis=1)
    known_N = attribute_N >= 0
    return balanced_accuracy(named_Y[label_N[known_N]], attribute_N[known_N], classes)
