"""Sparse differences at fixed places: what is not listed keeps its bits, and pruning by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxforget.errors import UserError
from jaxforget.models.layers import LowRank
from jaxforget.training.ensemble import members
from jaxforget.training.gradients import mean_gradient
from jaxforget.training.optimizer import OptimizerConfig, adamw, set_schedule
from jaxforget.training.sparse import lay_out, prune, sparse_difference
from jaxforget.training.step import make_step

SHAPES = {"a": {"kernel": (3, 4), "bias": (4,)}, "b": (2, 5)}
PARAMS = jax.tree.map(lambda shape: np.random.default_rng(len(shape)).normal(0, 1, shape).astype(np.float32), SHAPES,
                      is_leaf=lambda x: isinstance(x, tuple))  # fmt: skip
PARAMS["a"]["bias"][:2] = -0.0, 0.0
LAYOUT = lay_out(PARAMS, (".*",), {})  # a/bias, a/kernel, b
PLACES = np.asarray([1, 4, 9, 25], np.uint32)
BATCH = {"weight": np.ones(2, np.float32), "x": np.float32([[1, 2, 3, 4], [0, 1, 0, 1]])}


def losses(parts, batch, key):
    sums = [jnp.sum(jnp.square(x)) for x in jax.tree.leaves(parts["model"])]
    return batch["x"] @ parts["model"]["a"]["bias"] + sum(sums) + parts["other"]


def test_the_vector_is_the_parameters_in_the_order_of_paths():
    assert LAYOUT.paths == ("a/bias", "a/kernel", "b") and LAYOUT.size == 26
    vector_N = LAYOUT.join(PARAMS)
    np.testing.assert_array_equal(vector_N, np.concatenate([np.ravel(x) for x in jax.tree.leaves(PARAMS)]))
    for path, x in LAYOUT.split(vector_N).items():
        np.testing.assert_array_equal(x, PARAMS["a"][path[2:]] if "/" in path else PARAMS[path])
    assert lay_out(PARAMS, ("a/.*",), {}).paths == ("a/bias", "a/kernel")
    for patterns, words in ((("c",), "pattern 'c' matches no parameter"), (("(",), "is not a regular expression")):
        with pytest.raises(UserError, match=words):
            lay_out(PARAMS, patterns, {})


def test_a_difference_of_what_is_not_there_is_refused():
    """It would be lost without a word, as where an adapter stands for a kernel."""
    kernel = LowRank(PARAMS["a"]["kernel"], np.ones((3, 1)), np.ones((1, 4)), 1.0)
    adapted = {**PARAMS, "a": {"bias": PARAMS["a"]["bias"], "kernel": kernel}}
    with pytest.raises(UserError, match="of the parameter a/kernel, which this model does not have"):
        LAYOUT.add(adapted, jnp.zeros(LAYOUT.size))
    assert LAYOUT.add({**PARAMS, "more": np.ones(3)}, jnp.ones(LAYOUT.size))["more"].tolist() == [1, 1, 1]


def test_training_moves_the_places_and_no_other_bit():
    """Against Adam on all parameters of which all but the places are put back after every step."""
    config = OptimizerConfig(learning_rate=0.1, schedule="constant", warmup=0.0, max_grad_norm=0.0)
    step = make_step(losses, sparse_difference(LAYOUT, PLACES), mean_gradient(), adamw(config))
    state, frozen = step.init(jax.random.key(0), {"model": PARAMS, "other": np.float32(1)})
    assert jax.tree.map(jnp.shape, state.trainable) == {"value": (4,)}
    start_N, vector_N = LAYOUT.join(PARAMS), LAYOUT.join(PARAMS).astype(np.float64)
    same = step.combine(frozen, state.trainable)
    np.testing.assert_array_equal(LAYOUT.join(same["model"]).view(np.uint32), start_N.view(np.uint32))
    assert same.keys() == {"model", "other"}
    state = set_schedule(state, learning_rate=0.1, total=5)
    first, second = np.zeros(26), np.zeros(26)
    for n in range(1, 6):
        gradient_N = 2.0 * vector_N
        gradient_N[:4] += BATCH["x"].mean(axis=0)  # the bias stands first
        first, second = 0.9 * first + 0.1 * gradient_N, 0.999 * second + 0.001 * gradient_N**2
        moved_N = vector_N - 0.1 * (first / (1 - 0.9**n)) / (np.sqrt(second / (1 - 0.999**n)) + 1e-8)
        vector_N[PLACES] = moved_N[PLACES]
        state, _ = jax.jit(step.update)(state, frozen, BATCH)
    found_N = LAYOUT.join(step.combine(frozen, state.trainable)["model"])
    np.testing.assert_allclose(found_N[PLACES], vector_N[PLACES], rtol=1e-5, atol=1e-5)  # steps of 0.1, in float32
    rest = np.setdiff1d(np.arange(26), PLACES)
    np.testing.assert_array_equal(found_N[rest].view(np.uint32), start_N[rest].view(np.uint32))  # -0 is among them


@pytest.mark.parametrize("how", ["map", "vmap"])
def test_members_have_differences_of_their_own(how):
    step = make_step(losses, sparse_difference(LAYOUT, PLACES), mean_gradient(), adamw(OptimizerConfig()))
    lifted = members(step, how, ("model",))
    both = [PARAMS, jax.tree.map(lambda x: x + 1, PARAMS)]
    parts = {"model": jax.tree.map(lambda *x: np.stack(x), *both), "other": np.float32(1)}
    states, frozen = lifted.init([jax.random.key(0)] * 2, parts)
    states = set_schedule(states, learning_rate=[0.1, 0.2], total=[1, 1])
    states, _ = lifted.update(states, frozen, jax.tree.map(lambda x: np.stack([x] * 2), BATCH))
    found = lifted.combine(frozen, states.trainable)["model"]
    for k, params in enumerate(both):
        moved_N = LAYOUT.join(jax.tree.map(lambda x, k=k: x[k], found)) != LAYOUT.join(params)
        assert np.flatnonzero(moved_N).tolist() == PLACES.tolist()


def test_pruning_by_hand():
    values = np.asarray([0.9, -0.1, 0.5, -0.5, 0.3, 0, 0.7, 0.2, 0, 0])
    assert prune(values, 0.3, strict=True).tolist() == [0, 6]  # 0.5 is the cutoff, and twice there
    assert prune(values, 0.3).tolist() == [0, 2, 6]
    assert prune(values, 1.0).tolist() == prune(values, 1.0, strict=True).tolist() == [0, 1, 2, 3, 4, 6, 7]


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01])
def test_impossible_densities_are_refused(density):
    with pytest.raises(UserError, match=f"density is {density}; it must be above 0 and at most 1"):
        prune(np.ones(10), density)


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(UserError, match="density 0.04 of 10 parameters keeps none"):
        prune(np.ones(10), 0.04)
