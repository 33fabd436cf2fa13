"""A small classifier of positions in float64, and its gradients, Hessian and factors as whole matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxforget.data.sampling import id_keys
from jaxforget.data.tokens import IGNORED, Examples, concatenate
from jaxforget.influence.question import Question
from jaxforget.models.layers import linear, run_blocks
from jaxforget.training.objectives import sequence_mean

WIDTH, CLASSES, LAYERS, POSITIONS = 3, 4, 2, 3


def forward(model, x_BTD, shifts=None):
    """Return logits (B, T, C), and what comes into every kernel. shifts: added to what comes out."""
    shifts = shifts or {"in": 0.0, "blocks": [0.0] * LAYERS, "out": 0.0}
    met = {"in": x_BTD, "blocks": []}
    x_BTD = jnp.tanh(x_BTD @ model["in"]["kernel"] + model["in"]["bias"][None, None] + shifts["in"])
    for layer in range(LAYERS):
        met["blocks"].append(x_BTD)
        x_BTD = x_BTD + jnp.tanh(x_BTD @ model["blocks"]["kernel"][layer] + shifts["blocks"][layer])
    met["out"] = x_BTD
    return x_BTD @ model["out"]["kernel"] + shifts["out"], met


def nll(logits_BTC, labels_BT):
    scored_BT = labels_BT != IGNORED
    logp_BTC = jax.nn.log_softmax(logits_BTC)
    picked = jnp.take_along_axis(logp_BTC, jnp.where(scored_BT, labels_BT, 0)[..., None], axis=-1)[..., 0]
    return -sequence_mean(picked, scored_BT)


def losses(parts, batch, key):
    """The same through the operations of layers.py, as an objective."""
    model = parts["model"]
    x_BTD = jnp.tanh(linear(batch["x"], model["in"]["kernel"], model["in"]["bias"]))

    def body(x_BTD, block, layer):
        return x_BTD + jnp.tanh(linear(x_BTD, block["kernel"])), None

    x_BTD, _ = run_blocks(body, x_BTD, model["blocks"], None, scan=True, remat="none")
    return batch["factor"] * nll(linear(x_BTD, model["out"]["kernel"]), batch["labels"])


def draw_set(name: str, count: int, rng) -> Examples:
    """Inputs at random; classes follow a rule that every set has for itself. The number of scored positions varies."""
    x_NTD = rng.normal(size=(count, POSITIONS, WIDTH))
    labels_NT = np.argmax(x_NTD @ rng.normal(size=(WIDTH, CLASSES)), axis=-1).astype(np.int32)
    length_N = rng.integers(1, POSITIONS + 1, count).astype(np.int32)
    labels_NT[np.arange(POSITIONS)[None] >= length_N[:, None]] = IGNORED
    ids = tuple(f"{name}{i}" for i in range(count))
    return Examples(ids, {"x": x_NTD, "labels": labels_NT, "length": length_N, "key": id_keys(ids)})


@functools.cache
def question(sizes=(5, 9, 4)) -> Question:
    """Three datasets, two queries of which one is a dataset, parameters after some training. Needs float64."""
    rng = np.random.default_rng(4)
    train = {f"t{k}": draw_set(f"t{k}", size, rng) for k, size in enumerate(sizes)}
    shapes = {"in": {"bias": (WIDTH,), "kernel": (WIDTH, WIDTH)}, "blocks": {"kernel": (LAYERS, WIDTH, WIDTH)},
              "out": {"kernel": (WIDTH, CLASSES)}}  # fmt: skip
    model = jax.tree.map(lambda s: 0.7 * rng.normal(size=s), shapes, is_leaf=lambda s: isinstance(s, tuple))
    queries = {"twin": train["t1"], "other": draw_set("q", 6, rng)}
    together = concatenate(list(train.values()))
    descend = jax.jit(lambda model: jax.lax.fori_loop(
        0, 3000, lambda _, m: jax.tree.map(lambda x, g: x - 0.1 * g, m, jax.grad(mean_loss)(m, together)), model
    ))  # fmt: skip
    model = jax.tree.map(np.asarray, descend(model))
    return Question(losses, {"model": model}, train, queries, seed=3)


def flat_model():
    """Parameters as one vector, and the way back."""
    return ravel_pytree(question().parts["model"])


@jax.jit
def _own(flat, x_NTD, labels_NT):
    return nll(forward(ravel_pytree(question().parts["model"])[1](flat), x_NTD)[0], labels_NT)


_own_gradients = jax.jit(jax.jacobian(_own))


def own_losses(flat) -> dict[str, np.ndarray]:
    """Losses of single examples, by set."""
    together = concatenate(list(sets().values()))
    return _split(_own(flat, together.columns["x"], together.columns["labels"]))


@functools.cache
def own_gradients() -> dict[str, np.ndarray]:
    """Gradients of the losses of single examples, (N, P), by set."""
    together = concatenate(list(sets().values()))
    return _split(_own_gradients(flat_model()[0], together.columns["x"], together.columns["labels"]))


def sets() -> dict[str, Examples]:
    return {**question().train, **question().queries}


def _split(array):
    ends = np.cumsum([len(examples) for examples in sets().values()])[:-1]
    return dict(zip(sets(), np.split(np.asarray(array), ends), strict=True))


def count(name: str) -> np.ndarray:
    """Scored positions of the examples of a set."""
    return (sets()[name].columns["labels"] != IGNORED).sum(axis=1)


def gradients() -> tuple[np.ndarray, np.ndarray]:
    """Gradients of the losses of datasets (K, P) and queries (Q, P)."""
    mean = {name: np.average(rows, axis=0, weights=count(name)) for name, rows in own_gradients().items()}
    return tuple(np.stack([mean[name] for name in part]) for part in (question().train, question().queries))


def train_rows() -> np.ndarray:
    """Gradients of the losses of all training examples, (N, P)."""
    return np.concatenate([own_gradients()[name] for name in question().train])


@functools.cache
def hessian() -> np.ndarray:
    """H of the mean loss over all scored positions of the training data, (P, P)."""
    return hessian_of(concatenate(list(question().train.values())))


def hessian_of(examples: Examples) -> np.ndarray:
    flat, unravel = flat_model()
    return np.asarray(jax.jit(jax.hessian(lambda flat: mean_loss(unravel(flat), examples)))(flat))


def mean_loss(model, examples: Examples):
    count_N = (examples.columns["labels"] != IGNORED).sum(axis=1).astype(np.float64)
    return nll(forward(model, examples.columns["x"])[0], examples.columns["labels"]) @ count_N / count_N.sum()


def factors() -> dict:
    """Sums over examples and scored positions of a a^T and b b^T for every kernel, by the name of its part."""
    together, model = concatenate(list(question().train.values())), question().parts["model"]
    x_NTD, labels_NT = together.columns["x"], together.columns["labels"]
    hidden = np.zeros((len(together), POSITIONS, WIDTH))
    shifts = {"in": hidden, "blocks": [hidden] * LAYERS, "out": np.zeros((len(together), POSITIONS, CLASSES))}
    b = jax.jit(jax.grad(lambda shifts: nll(forward(model, x_NTD, shifts)[0], labels_NT).sum()))(shifts)
    a, scored_NT = forward(model, x_NTD)[1], labels_NT != IGNORED
    return jax.tree.map(lambda a, b: tuple(np.asarray(y)[scored_NT].T @ np.asarray(y)[scored_NT] for y in (a, b)), a, b)
