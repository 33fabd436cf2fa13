"""Problems small enough to know the answer of: the quadratic world of the golden file, and toy language models."""

import json

import jax.numpy as jnp
import numpy as np
from conftest import SHARED, Toy, make_examples

from jaxforget.data.sampling import id_keys
from jaxforget.data.tokens import Examples
from jaxforget.influence.question import Question
from jaxforget.training.objectives import next_token

GOLDEN_FILE = SHARED / "papers/golden_untrac.json"
GOLDEN = json.loads(GOLDEN_FILE.read_text()) if GOLDEN_FILE.exists() else None
TOY = Toy()


def quadratic_losses(parts, batch, key):
    """0.5 sum_i h_i (theta_i - c_i)^2, times factor_B."""
    gap_BD = parts["model"]["theta"][None] - batch["center"]
    return batch["factor"] * 0.5 * jnp.sum(batch["curvature"] * gap_BD**2, axis=-1)


def quadratic_set(name, center, curvature) -> Examples:
    """One example of a quadratic loss; its one label makes it one token."""
    columns = {
        "center": np.array([center]), "curvature": np.array([curvature]), "labels": np.zeros((1, 1), np.int32),
        "length": np.ones(1, np.int32), "key": id_keys([name]),
    }  # fmt: skip
    return Examples((name,), columns)


def quadratic_sets(kind: str) -> dict[str, Examples]:
    world = GOLDEN["quadratic_world"]
    pairs = zip(world[f"{kind}_center_c"], world[f"{kind}_curvature_h"], strict=True)
    return {f"{kind}{i}": quadratic_set(f"{kind}{i}", *pair) for i, pair in enumerate(pairs)}


def quadratic_question() -> Question:
    """Solve for theta0 itself: the file rounds it."""
    train = quadratic_sets("train")
    center, curvature = (np.concatenate([e.columns[c] for e in train.values()]) for c in ("center", "curvature"))
    theta = (center * curvature).sum(axis=0) / curvature.sum(axis=0)
    return Question(quadratic_losses, {"model": {"theta": theta}}, train, quadratic_sets("query"))


def toy_question(sizes=(5, 8, 3), queries=(4, 6), seed=0, **more) -> Question:
    """Random tokens under a random toy model; sets have different sizes and widths."""
    import jax

    train = {f"t{k}": make_examples(n, seed=seed + k, prefix=f"t{k}-", width=6 + k) for k, n in enumerate(sizes)}
    tests = {f"q{q}": make_examples(n, seed=seed + 50 + q, prefix=f"q{q}-") for q, n in enumerate(queries)}
    return Question(next_token(TOY), {"model": TOY.init(jax.random.key(seed))}, train, tests, seed, **more)
