"""Modules on a model, one and several: exact, in any order, and onto the base itself."""

import chex
import jax
import numpy as np
import pytest
from test_modules import LAYOUT, MODEL, PARAMS, module_of, vector

from jaxforget.debiasing.composition import compose, conflicts, merged, warnings
from jaxforget.debiasing.modules import from_places
from jaxforget.errors import UserError
from jaxforget.models import hub


def test_composition_is_the_same_in_any_order_and_adds_up():
    a, b, c = (module_of(seed, 0.3) for seed in range(3))
    for how in ("sum", "mean", "nonzero_mean"):
        one, two = merged(PARAMS, {"a": a, "b": b, "c": c}, how), merged(PARAMS, {"c": c, "b": b, "a": a}, how)
        chex.assert_trees_all_equal(one, two)
    zero = jax.tree.map(np.zeros_like, PARAMS)
    values = np.stack([vector(merged(zero, {"x": m})) for m in (a, b, c)])
    count = np.maximum((values != 0).sum(0), 1)
    for how, expected in (("sum", values.sum(0)), ("mean", values.sum(0) / 3), ("nonzero_mean", values.sum(0) / count)):
        np.testing.assert_allclose(vector(merged(zero, {"a": a, "b": b, "c": c}, how)), expected, rtol=2e-6, atol=1e-7)
    with pytest.raises(UserError, match="unknown composition 'max'; valid names are sum, mean, nonzero_mean"):
        compose({"a": a}, "max")


def test_off_is_the_base_and_the_head_is_never_touched():
    before = jax.tree.map(np.copy, PARAMS)
    on = merged(PARAMS, {"a": module_of(0)})
    chex.assert_trees_all_equal(PARAMS, before)  # merging does not write into the base
    chex.assert_trees_all_equal((on["pool"], on["score"]), (PARAMS["pool"], PARAMS["score"]))
    assert merged(PARAMS, {}) is PARAMS
    assert np.count_nonzero(vector(on) != vector(PARAMS)) <= module_of(0).nonzeros


def test_strength_scales_what_is_added():
    a, zero = module_of(0), jax.tree.map(np.zeros_like, PARAMS)
    np.testing.assert_array_equal(vector(merged(zero, {"a": a.scaled(0.5)})), 0.5 * vector(merged(zero, {"a": a})))
    chex.assert_trees_all_equal(merged(PARAMS, {"a": a.scaled(0.0)}), PARAMS)


def test_conflicts_by_hand():
    places = [np.asarray([0, 1, 2, 3], np.uint32), np.asarray([2, 3, 9], np.uint32)]
    values = [np.asarray([1, 1, 1, 1.0], np.float32), np.asarray([1, -1, 1.0], np.float32)]
    a, b = (from_places(LAYOUT, p, v, PARAMS, attribute="gender") for p, v in zip(places, values, strict=True))
    assert conflicts({"b": b, "a": a}) == [{"modules": ["a", "b"], "overlap": 2 / 3, "opposite": 0.5}]
    assert warnings({"a": a, "b": b}) == [
        "modules a and b overlap at 66.7% of the smaller one's places, 50% of these with opposite signs",
        "modules a and b both take out gender",
    ]
    apart = from_places(LAYOUT, np.asarray([20], np.uint32), np.ones(1), PARAMS, attribute="age")
    assert warnings({"a": a, "c": apart}) == []


def test_a_merged_model_is_a_hugging_face_directory(tmp_path):
    on = merged(PARAMS, {"a": module_of(0)})
    model, params = hub.load(hub.save(tmp_path / "on", MODEL, on))
    chex.assert_trees_all_equal(params, on)
    assert model.config.head == "classification"
