"""Sparse differences: off is exact, gradients go where they should, budgets hold, and what is fixed stays fixed."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from classifiers import examples, toy
from scipy.special import expit

from jaxforget.debiasing.differences import (
    difference,
    expected_l0,
    fixed,
    gated,
    layout_of,
    sparse,
)
from jaxforget.debiasing.gates import GateConfig
from jaxforget.debiasing.objective import switched_on
from jaxforget.debiasing.optimizer import grouped, module_groups
from jaxforget.errors import UserError
from jaxforget.training.batches import Batches, Stream
from jaxforget.training.gradients import mean_gradient
from jaxforget.training.objectives import classification
from jaxforget.training.optimizer import OptimizerConfig, set_schedule
from jaxforget.training.sparse import placed, where
from jaxforget.training.step import make_run, make_step
from jaxforget.training.trainable import path_str

MODEL, PARAMS = toy()
LAYOUT = layout_of(MODEL)
KEY = jax.random.key(3)
PLAIN, STRUCTURED = GateConfig(), GateConfig(structured=True)
RATES = {"gate_rate": 10.0, "adversary_rate": 1.0, "core_rate": 1.0}


def numbers(seed=0):
    return jax.random.normal(jax.random.key(seed), (LAYOUT.size,))


def leaves(params):
    return {path_str(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def test_the_layout_is_everything_but_the_head_in_the_order_of_paths():
    assert LAYOUT.paths == tuple(sorted(path for path in leaves(PARAMS) if path.split("/")[0] not in ("pool", "score")))
    assert LAYOUT.size == sum(leaves(PARAMS)[path].size for path in LAYOUT.paths)
    vector_N = numbers()
    joined = np.concatenate([np.ravel(LAYOUT.split(vector_N)[path]) for path in LAYOUT.paths])
    np.testing.assert_array_equal(joined, vector_N)
    only = layout_of(MODEL, (".*/mlp/.*",))
    assert only.paths and all("/mlp/" in path for path in only.paths)
    with pytest.raises(UserError, match="nothing"):
        layout_of(MODEL, ("nothing",))


def test_more_parameters_than_places_count_are_refused():
    class Huge:
        config = MODEL.config

        @property
        def headless(self):
            return self

        def shapes(self):
            return {"embed": {"table": jax.ShapeDtypeStruct((1 << 20, 1 << 12), jnp.float32)}}

    with pytest.raises(UserError, match="4294967296 parameters may differ; at most 2147483647"):
        layout_of(Huge())


@pytest.mark.parametrize("config", [PLAIN, STRUCTURED], ids=["plain", "structured"])
def test_a_fresh_difference_is_the_model_itself_bit_for_bit(config):
    trainable = gated(LAYOUT, config, 2)
    moving, frozen = trainable.init(KEY, {"model": PARAMS})
    for key in (None, KEY):
        parts = trainable.combine(frozen, moving, key)
        assert len(parts["on"]) == 2
        for on in (*parts["on"], parts["model"]):
            chex.assert_trees_all_equal(on, jax.tree.map(jnp.asarray, PARAMS))


@pytest.mark.parametrize("straight, dw", [(True, 1.693176), (False, 0.693176)])
def test_gradients_of_values_and_gates_by_hand(straight, dw):
    """Base 2, value 0.3, alpha 1, without noise: z = 0.693176 and dz/dalpha = 0.589836."""
    config = GateConfig(straight_through=straight)
    one = {"w": jnp.full(LAYOUT.size, 0.3), "alpha": jnp.ones(LAYOUT.size)}
    total, grads = jax.value_and_grad(lambda one: jnp.sum(2.0 + difference(LAYOUT, config, one)))(one)
    assert float(total) / LAYOUT.size == pytest.approx(2.207953, rel=1e-5)
    np.testing.assert_allclose(grads["w"], dw, rtol=1e-5)
    np.testing.assert_allclose(grads["alpha"], 0.3 * 0.589836, rtol=1e-5)


def test_a_tensor_gate_closes_its_tensor_and_counts_once():
    one = {"w": jnp.ones(LAYOUT.size), "alpha": jnp.full(LAYOUT.size, 5.0)}
    one["group"] = jnp.full(sum(LAYOUT.tensors), 5.0).at[1].set(-5.0)
    delta_N = np.asarray(difference(LAYOUT, STRUCTURED, one))
    sizes = np.repeat(LAYOUT.sizes // np.asarray(LAYOUT.tensors), LAYOUT.tensors)
    closed = np.arange(LAYOUT.size) // 1
    start, stop = sizes[0], sizes[0] + sizes[1]
    assert (delta_N[(closed >= start) & (closed < stop)] == 0).all() and delta_N.sum() == LAYOUT.size - sizes[1]
    gates = {name: one[name] for name in ("alpha", "group")}
    expected = LAYOUT.size * expit(5.0) + (len(sizes) - 1) * expit(5.0) + expit(-5.0)
    assert float(expected_l0(gates, STRUCTURED)) == pytest.approx(expected, rel=1e-5)


def test_expected_l0_is_the_mean_number_of_open_gates():
    alpha_N = 2.0 * numbers(4)
    one = {"w": jnp.ones(LAYOUT.size), "alpha": alpha_N}
    draw = jax.jit(lambda key: jnp.sum(difference(LAYOUT, PLAIN, one, key) != 0))
    counts = [int(draw(key)) for key in jax.random.split(KEY, 64)]
    spread = float(jnp.sqrt(jnp.sum(jax.nn.sigmoid(alpha_N) * jax.nn.sigmoid(-alpha_N)) / 64))
    assert np.mean(counts) == pytest.approx(float(expected_l0({"alpha": alpha_N}, PLAIN)), abs=4 * spread)


def test_each_module_has_its_own_noise_and_penalty():
    trainable = gated(LAYOUT, PLAIN, 2)
    moving, frozen = trainable.init(KEY, {"model": PARAMS})
    half = {"w": jnp.ones(LAYOUT.size), "alpha": jnp.zeros(LAYOUT.size)}
    one, two = trainable.combine(frozen, {**moving, "modules": [half, half]}, KEY)["on"]
    same = jnp.mean(jnp.concatenate([jnp.ravel(leaves(one)[p] == leaves(two)[p]) for p in LAYOUT.paths]))
    assert same == pytest.approx(0.5**2 + (1 / 6) ** 2, abs=0.05)  # both 0 or both 1

    def penalty(moving):
        return expected_l0(trainable.combine(frozen, moving)["gates"][1], PLAIN)

    grads = jax.grad(penalty)(moving)["modules"]
    assert float(jnp.abs(grads[0]["alpha"]).max()) == 0 and float(jnp.abs(grads[1]["alpha"]).min()) > 0


# ------------------------------------------------------------------------------------------------ pruning


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("strict", [True, False])
def test_the_budget_holds_and_what_is_kept_is_largest(density, strict):
    value_N = np.round(np.asarray(numbers(5)), 1)  # many ties
    found = sparse(value_N, density, strict=strict)
    kept = found["place"][found["place"] < LAYOUT.size]
    assert len(found["place"]) == round(density * LAYOUT.size) >= len(kept)
    assert (np.diff(found["place"].astype(np.int64)) > 0).all()
    rest = np.delete(np.abs(value_N), kept)
    assert (value_N[kept] != 0).all() and np.abs(value_N[kept]).min() >= rest.max()
    if not strict:
        assert len(kept) == min(round(density * LAYOUT.size), np.count_nonzero(value_N))
    expected = np.where(np.isin(np.arange(LAYOUT.size), kept), value_N, 0)
    np.testing.assert_array_equal(placed(found["value"], **where(LAYOUT, found["place"])), expected)


# ----------------------------------------------------------------------------------------------- training


def train(trainable, parts, steps=12, seed=0):
    """Fine-tune the class by a difference, through the objective every other training uses."""
    optimizer = grouped(module_groups(1, **RATES), OptimizerConfig(schedule="constant", warmup=0.0))
    step = make_step(switched_on(classification(MODEL)), trainable, mean_gradient(), optimizer)
    batches = Batches((Stream(examples(), 32),), 8, seed)
    state, frozen = jax.jit(step.init)(KEY, parts)
    state = set_schedule(state, learning_rate=0.02, total=steps)
    state, metrics = make_run(step)(state, frozen, batches.take(0, steps, steps), steps)
    return step, state, frozen, metrics["loss"]


def test_a_gated_difference_learns_under_any_objective_and_its_core_stays():
    step, state, frozen, loss = train(gated(LAYOUT, PLAIN), {"model": PARAMS}, steps=24)
    assert float(loss[-4:].mean()) < float(loss[:4].mean()) - 0.1
    parts = step.combine(frozen, state.trainable)
    chex.assert_trees_all_equal(parts["model"], PARAMS)  # bytes of the core and of the head
    chex.assert_trees_all_equal(parts["on"][0]["pool"], PARAMS["pool"])


def test_a_fixed_difference_moves_only_its_places_and_has_small_state():
    start = sparse(0.01 * np.asarray(numbers(6)), 0.05)
    padded = {"place": start["place"].copy(), "value": start["value"].copy()}
    padded["place"][-3:] = LAYOUT.size + np.arange(3)  # as where fewer were not zero
    step, state, frozen, loss = train(fixed(LAYOUT), {"model": PARAMS, "modules": [padded]})
    parts = step.combine(frozen, state.trainable)
    chex.assert_trees_all_equal(parts["model"], PARAMS)
    on = np.concatenate([np.ravel(leaves(parts["on"][0])[path]) for path in LAYOUT.paths])
    base = np.concatenate([np.ravel(leaves(PARAMS)[path]) for path in LAYOUT.paths])
    moved = np.flatnonzero(on != base)
    assert set(moved) <= set(padded["place"][:-3].tolist()) and len(moved) > 0.9 * (len(start["place"]) - 3)
    np.testing.assert_array_equal(state.trainable["modules"][0]["value"][-3:], start["value"][-3:])  # no gradient
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) < 2 * len(start["place"]) + 16
    assert float(loss[-1]) < float(loss[0])


def test_an_ensemble_shares_a_difference():
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), PARAMS, toy(2)[1])
    vector_N = numbers(8)
    both = LAYOUT.add(stacked, vector_N)
    for k, own in enumerate((PARAMS, toy(2)[1])):
        chex.assert_trees_all_equal(jax.tree.map(lambda x, k=k: x[k], both), LAYOUT.add(own, vector_N))


def test_a_leaf_without_a_group_is_told():
    with pytest.raises(ValueError, match="score/kernel belongs to none of the groups"):
        grouped(module_groups(1, **RATES), OptimizerConfig()).init({"score": {"kernel": jnp.ones(2)}})
