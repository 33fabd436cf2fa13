"""The residual stream after some of the blocks."""

import dataclasses

import formula
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxforget.models.layers import LowRank, merge

TOKENS = np.random.default_rng(0).integers(0, 31, (2, 9)).astype(np.int32)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_stream(family):
    model, params = formula.model(family)
    model = dataclasses.replace(model, scan_layers=True)
    unrolled = dataclasses.replace(model, scan_layers=False)
    batch = {"tokens": TOKENS, "length": np.int32([9, 5])}
    stream = jax.jit(lambda params: model.stream(params, batch, 1))
    x_BTD = stream(params)
    np.testing.assert_allclose(x_BTD, unrolled.stream(params, batch, 1), rtol=1e-5, atol=1e-5)
    first = {**params, "blocks": jax.tree.map(lambda x: x[:1], params["blocks"])}
    np.testing.assert_array_equal(stream(first), x_BTD)  # later blocks are not read
    assert not np.allclose(x_BTD, unrolled.stream(params, batch, 2), atol=1e-2)

    kernel = params["blocks"]["attn"]["o"]["kernel"]
    a, b = (0.1 * jnp.cos(jnp.arange(2.0 * size * 2).reshape(shape))
            for size, shape in ((kernel.shape[1], (2, kernel.shape[1], 2)), (kernel.shape[2], (2, 2, kernel.shape[2]))))
    blocks = params["blocks"] | {"attn": params["blocks"]["attn"] | {
        "o": params["blocks"]["attn"]["o"] | {"kernel": LowRank(kernel, a, b, 0.5)}}}  # fmt: skip
    adapted = {**params, "blocks": blocks}
    np.testing.assert_allclose(stream(adapted), stream(merge(adapted)), rtol=1e-5, atol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_streams_are_the_hidden_states_of_transformers(family):
    torch = pytest.importorskip("torch")
    model, params = formula.model(family)
    theirs = formula.torch_model(formula.CONFIGS[family])
    with torch.no_grad():
        for key, value in theirs.named_parameters():
            value.copy_(torch.from_numpy(formula.tensor(key, tuple(value.shape))))
        states = theirs(torch.tensor(TOKENS).long(), output_hidden_states=True).hidden_states
    for blocks in (0, 1):  # their last one is behind the norm
        ours = model.stream(params, {"tokens": TOKENS}, blocks)
        np.testing.assert_allclose(ours, states[blocks].numpy(), rtol=1e-4, atol=1e-4)
