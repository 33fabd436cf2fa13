"""Which attention runs, and that cuDNN's traces under every transformation we use. It needs no GPU: only tracing.

Shapes: K members, B batch, T tokens, N heads, H head width, V vocabulary.
"""

import dataclasses

import formula
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxforget.models import layers
from jaxforget.models.layers import attention

Q = jnp.ones((3, 1, 6, 4, 8))
KV = jnp.ones((3, 1, 6, 2, 8))


@pytest.fixture
def gpu(monkeypatch):
    """Pretend to be on a recent GPU while tracing."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(layers.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91100)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)


def traced(function, *args) -> str:
    return str(jax.make_jaxpr(function)(*args))


def causal_model(name):
    model, params = formula.model(name)
    return dataclasses.replace(model, dtype="bfloat16"), params


def loss(model, params, tokens_BT):
    logp_BTV = jax.nn.log_softmax(model.logits(params, tokens_BT))
    return -jnp.mean(logp_BTV[:, :-1, 3])


def wide(name):
    """A model whose head width cuDNN takes."""
    raw = {"hidden_size": 32, "num_attention_heads": 4, "n_embd": 32, "n_head": 4, "head_dim": 8}
    config = formula.CONFIGS[name]
    from jaxforget.models import family_of
    from jaxforget.models.model import build

    family = family_of(config["model_type"])
    model = build(family.Config.from_hf({k: raw.get(k, v) for k, v in config.items()}), dtype="bfloat16")
    return model, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), model.shapes())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("remat", ["none", "dots"])
def test_cudnn_traces_under_every_transformation(gpu, name, remat):
    model, params = wide(name)
    model = dataclasses.replace(model, remat=remat)
    tokens_BT = jnp.ones((3, 12), jnp.int32)
    gradient = jax.grad(lambda p, tokens: loss(model, p, tokens))
    assert "dot_product_attention_bwd" in traced(gradient, params, tokens_BT)
    per_example = jax.vmap(lambda p, one_T: gradient(p, one_T[None]), (None, 0))
    params_K = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)
    ensemble = jax.vmap(gradient, (0, None))
    both = jax.vmap(per_example, (0, None))
    for function, args in (
        (per_example, (params, tokens_BT)),
        (ensemble, (params_K, tokens_BT)),
        (jax.vmap(gradient, (0, 0)), (params_K, jnp.stack([tokens_BT] * 2))),
        (both, (params_K, tokens_BT)),
    ):
        assert "dot_product_attention_bwd" in traced(function, *args)


def test_what_cudnn_computes_and_what_not(gpu):
    q_BTNH, kv_BTNH = Q.astype(jnp.bfloat16)[0], KV.astype(jnp.bfloat16)[0]

    def fused(q, k, **settings):
        return "dot_product_attention_fwd" in traced(lambda q, k: attention(q, k, k, **settings), q, k)

    assert fused(q_BTNH, kv_BTNH, causal=True)
    assert fused(q_BTNH, kv_BTNH, causal=False)
    assert fused(q_BTNH, kv_BTNH, causal=True, scale=1.0)
    assert not fused(Q[0], KV[0], causal=True)  # float32
    assert not fused(q_BTNH[:, :1], kv_BTNH, causal=True, mask_BTU=jnp.ones((1, 1, 6), bool))  # a cache
    assert not fused(q_BTNH, kv_BTNH, causal=True, window=3)
    assert not fused(q_BTNH, kv_BTNH, causal=False, mask_BTU=jnp.ones((1, 1, 6), bool))  # padded keys
    assert not fused(q_BTNH, kv_BTNH, causal=False, bias_BNTU=jnp.zeros((1, 4, 6, 6)))
    assert not fused(q_BTNH[:, :5], kv_BTNH[:, :5], causal=True)  # odd length
    assert not fused(q_BTNH[..., :6], kv_BTNH[..., :6], causal=True)  # odd width


def test_a_cpu_never_asks_for_cudnn():
    q_BTNH = Q.astype(jnp.bfloat16)[0]
    assert "dot_product_attention" not in traced(lambda q: attention(q, q, q, causal=True), q_BTNH)


@pytest.mark.parametrize("causal", [True, False])
def test_our_attention_equals_the_library(causal):
    key = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(k, (2, 6, n, 8)) for k, n in zip(key, (4, 2, 2), strict=True))
    expected = jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="xla")
    np.testing.assert_allclose(attention(q, k, v, causal=causal), expected, rtol=1e-5, atol=1e-6)
    bias = jax.random.normal(key[0], (1, 4, 6, 6))
    expected = jax.nn.dot_product_attention(q, k, v, bias=bias, is_causal=causal, implementation="xla")
    np.testing.assert_allclose(attention(q, k, v, causal=causal, bias_BNTU=bias), expected, rtol=1e-5, atol=1e-6)


def test_masks_trace_under_vmap_of_grad():
    def total(q, k, v, mask):
        return jnp.sum(attention(q, k, v, causal=True, mask_BTU=mask))

    mask = jnp.ones((3, 1, 6, 6), bool)
    jax.jit(jax.vmap(jax.grad(total))).lower(Q, KV, KV, mask)
    jax.jit(jax.vmap(jax.grad(lambda q, k, v: total(q, k, v, None)))).lower(Q, KV, KV)
