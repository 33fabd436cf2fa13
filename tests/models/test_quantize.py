"""Quantised weights against the construction of their levels, closed forms and bounds."""

import formula
import jax
import numpy as np
import pytest
from scipy.stats import norm

from jaxforget.errors import UserError
from jaxforget.models.quantize import NF4, absmax_int8, nf4, quantized


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_nf4_levels_are_the_normal_quantiles_of_the_paper():
    """Equal areas of N(0, 1) on both sides of an exact 0, scaled to [-1, 1]: bitsandbytes' create_normal_map."""
    offset = 0.9677083
    right, left = norm.ppf(np.linspace(offset, 0.5, 9)[:-1]), -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([right, [0.0], left]))
    np.testing.assert_allclose(NF4, levels / levels.max(), atol=2e-6)


def test_nf4_takes_the_nearest_level_of_each_block_of_the_file():
    kernel = draw(6, 25)  # (25, 6) in the file: 150 values, so two whole blocks and a short one
    flat, back = kernel.T.reshape(-1).astype(np.float64), np.asarray(nf4(kernel)).T.reshape(-1)
    for at in range(0, 150, 64):
        part, top = flat[at : at + 64], np.abs(flat[at : at + 64]).max()
        nearest = np.asarray(NF4)[np.abs(part[:, None] / top - np.asarray(NF4)[None]).argmin(axis=1)] * top
        np.testing.assert_allclose(back[at : at + 64], nearest, rtol=1e-6, atol=1e-7)


def test_int8_is_within_half_a_step_of_each_output():
    kernel = draw(3, 7, 5)
    top = np.abs(kernel).max(axis=1, keepdims=True)
    back = np.asarray(absmax_int8(kernel))
    assert (np.abs(back - kernel) <= top / 254 * (1 + 1e-5)).all()
    np.testing.assert_allclose(back * 127 / top, np.round(back * 127 / top), atol=1e-4)
    assert np.abs(back - kernel).max() > 0


@pytest.mark.parametrize("function", [absmax_int8, nf4])
def test_twice_is_once_and_layers_are_apart(function):
    kernel = draw(2, 8, 16)
    once = np.asarray(function(kernel))
    np.testing.assert_allclose(function(once), once, rtol=1e-6)
    np.testing.assert_array_equal(once[1], function(kernel[1]))
    np.testing.assert_array_equal(np.abs(once).max(axis=(1, 2)), np.abs(kernel).max(axis=(1, 2)))
    assert not np.asarray(function(np.zeros((4, 4), np.float32))).any()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_only_the_kernels_of_blocks_change(name, bits):
    model, params = formula.model(name)
    back = quantized(model, params, bits)
    pairs = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(back), strict=True)
    for (path, before), after in pairs:
        names = [entry.key for entry in path]
        inside = names[0] in model.config.stacks and names[-1] == "kernel"
        assert np.array_equal(before, after) != inside, names
        assert np.shape(before) == after.shape


def test_other_widths_are_refused():
    model, params = formula.model("llama")
    with pytest.raises(UserError, match="3 bits is unknown; use one of 8, 4"):
        quantized(model, params, 3)
