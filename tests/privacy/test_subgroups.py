"""Gradients of groups against ordinary ones, and what must not change them."""

import jax
import numpy as np
import pytest
from conftest import make_examples

from jaxforget.privacy.clipping import Clipping
from jaxforget.privacy.subgroups import NO_BOUND, subgroups
from jaxforget.training.objectives import next_token

SETTINGS = dict(noise_std=0.5, units=10, how=Clipping("vmap"), microbatch=4)


@pytest.fixture
def setting(toy):
    groups = {"a": make_examples(7), "b": make_examples(5, seed=1, prefix="y")}
    return next_token(toy), {"model": toy.init(jax.random.key(0))}, groups


def gradients(losses, trainable, examples):
    """One gradient a unit, (U, P)."""
    rows = []
    for n in range(len(examples)):
        batch = {name: column[[n]] for name, column in examples.columns.items() if name != "key"}
        batch["factor"] = np.ones(1, np.float32)
        found = jax.grad(lambda moving, batch=batch: losses(moving, batch, None)[0])(trainable)
        rows.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found)]))
    return np.stack(rows)


def test_every_number_is_what_it_says(setting):
    losses, trainable, groups = setting
    grad = {name: gradients(losses, trainable, examples) for name, examples in groups.items()}
    bound = float(np.median(np.linalg.norm(grad["a"], axis=1)))
    rows = {row["group"]: row for row in subgroups(losses, trainable, groups, bound=bound, **SETTINGS)}
    cut = {name: g * np.minimum(1, bound / np.linalg.norm(g, axis=1))[:, None] for name, g in grad.items()}
    whole, clipped = grad["a"].sum(0), cut["a"].sum(0)
    total = clipped + cut["b"].sum(0)
    norm_U = np.linalg.norm(grad["a"], axis=1)
    expected = {
        "units": 7, "unit_norm": norm_U.mean(), "clip_factor": np.minimum(1, bound / norm_U).mean(),
        "group_norm": np.linalg.norm(whole) / 7, "clipped_norm": np.linalg.norm(clipped) / 7,
        "clipped_to_other": np.linalg.norm(clipped) / 7 / (np.linalg.norm(cut["b"].sum(0)) / 5),
        "cosine": whole @ clipped / np.linalg.norm(whole) / np.linalg.norm(clipped),
        "clipped_share": clipped @ total / (total @ total),
        "snr": 10 * np.linalg.norm(clipped) / 7 / (0.5 * np.sqrt(grad["a"].shape[1])),
    }  # fmt: skip
    assert {name: rows["a"][name] for name in expected} == pytest.approx(expected, rel=1e-4)  # float32 sums
    for share in ("share", "clipped_share"):
        assert sum(row[share] for row in rows.values()) == pytest.approx(1.0, rel=1e-4)


def test_micro_batches_do_not_matter_and_a_large_bound_cuts_nothing(setting):
    losses, trainable, groups = setting
    found = [subgroups(losses, trainable, groups, bound=NO_BOUND, **SETTINGS | {"microbatch": size, "noise_std": 0.0})
             for size in (1, 4, 16)]  # fmt: skip
    for rows in zip(*found, strict=True):
        for row in rows:
            assert row["clip_factor"] == 1 and row["clipped"] == 0 and row["snr"] is None
            assert row["cosine"] == pytest.approx(1, rel=1e-5)
            numbers = {name: value for name, value in row.items() if isinstance(value, float)}
            assert numbers == pytest.approx({name: rows[0][name] for name in numbers}, rel=1e-4)
