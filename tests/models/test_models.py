"""Properties of every family, and golden logits. B batch, T tokens, V vocabulary, K members, L layers."""

import dataclasses
import functools
import json

import formula
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxforget.errors import UserError
from jaxforget.models import FAMILIES, Model, gpt2, llama
from jaxforget.models.layers import ACTIVATIONS, attention
from jaxforget.models.rotary import Rope

NAMES = list(FAMILIES)
TOKENS_BT = jnp.asarray(formula.TOKENS_BT)
# float32 sums of a few dozen terms in another order, on logits of order 1.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

logits_of = jax.jit(lambda model, params, tokens_BT: model.logits(params, tokens_BT), static_argnums=0)


@functools.cache
def tiny(name):
    return formula.model(name)


def losses(model, params, tokens_BT):
    logp_BTV = jax.nn.log_softmax(model.logits(params, tokens_BT)[:, :-1])
    return -jnp.mean(jnp.take_along_axis(logp_BTV, tokens_BT[:, 1:, None], axis=-1)[..., 0], axis=1)


@functools.partial(jax.jit, static_argnums=0)
def value_and_grad(model, params, tokens_BT):
    return jax.value_and_grad(lambda p: jnp.mean(losses(model, p, tokens_BT)))(params)


def assert_trees_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_transformers_on_golden_weights(name):
    model, params = tiny(name)
    golden = np.asarray(json.loads(formula.GOLDEN.read_text())[name])
    logits_BTV = logits_of(model, params, TOKENS_BT)
    assert logits_BTV.dtype == jnp.float32
    # The file keeps five decimals; the rest is float32 rounding.
    np.testing.assert_allclose(logits_BTV[:1, formula.POSITIONS], golden, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_later_tokens_change_nothing_before_them(name):
    model, params = tiny(name)
    base_BTV = logits_of(model, params, TOKENS_BT)
    for t in (1, 6, 11):
        changed_BTV = logits_of(model, params, TOKENS_BT.at[:, t:].set((TOKENS_BT[:, t:] + 3) % 31))
        np.testing.assert_array_equal(changed_BTV[:, :t], base_BTV[:, :t])
        assert not np.array_equal(changed_BTV[:, t], base_BTV[:, t])


@pytest.mark.parametrize("name", NAMES)
def test_right_padding_needs_no_mask(name):
    model, params = tiny(name)
    short_BTV = logits_of(model, params, TOKENS_BT[:, :7])
    np.testing.assert_allclose(logits_of(model, params, TOKENS_BT)[:, :7], short_BTV, **CLOSE)


def test_window_hides_what_lies_further_back():
    config = llama.Config(
        model_type="mistral",
        vocab_size=31,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        sliding_window=3,
    )
    model = Model(config)
    params = model.init(jax.random.key(0))
    base_BTV = logits_of(model, params, TOKENS_BT)
    changed_BTV = logits_of(model, params, TOKENS_BT.at[:, 4].set((TOKENS_BT[:, 4] + 1) % 31))
    same_T = np.all(np.asarray(base_BTV == changed_BTV), axis=(0, 2))
    assert same_T.tolist() == [True] * 4 + [False] * 3 + [True] * 5


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gpt2", {"scan_layers": False}),
        ("llama", {"scan_layers": False, "remat": True}),
        ("llama", {"remat": True}),
    ],
)
def test_scan_unrolled_and_remat_agree(name, change):
    model, params = tiny(name)
    value, grads = value_and_grad(model, params, TOKENS_BT)
    other, other_grads = value_and_grad(dataclasses.replace(model, **change), params, TOKENS_BT)
    np.testing.assert_allclose(other, value, **CLOSE)
    assert_trees_close(other_grads, grads, **CLOSE)


def test_layers_with_different_windows_scan_as_they_unroll():
    raw = formula.CONFIGS["qwen2"] | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    config = llama.Config.from_hf(raw)
    assert config.windows == (None, 4)
    params = tiny("qwen2")[1]
    scanned_BTV = logits_of(Model(config), params, TOKENS_BT)
    np.testing.assert_allclose(logits_of(Model(config, scan_layers=False), params, TOKENS_BT), scanned_BTV, **CLOSE)
    assert not np.allclose(scanned_BTV, logits_of(tiny("qwen2")[0], params, TOKENS_BT))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_vmap_over_members_equals_loop(name):
    model, _ = tiny(name)
    params_K = jax.jit(jax.vmap(model.init))(jax.random.split(jax.random.key(1), 2))
    logits_KBTV = jax.jit(jax.vmap(model.logits, (0, None)))(params_K, TOKENS_BT)
    members = [jax.tree.map(lambda leaf, k=k: leaf[k], params_K) for k in range(2)]
    for params, logits_BTV in zip(members, logits_KBTV, strict=True):
        np.testing.assert_allclose(logits_BTV, logits_of(model, params, TOKENS_BT), **CLOSE)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_per_example_gradients_sum_to_the_gradient_of_the_sum(name):
    model, params = tiny(name)
    gradient = jax.grad(lambda p, tokens_T: losses(model, p, tokens_T[None])[0])
    grads_B = jax.jit(jax.vmap(gradient, (None, 0)))(params, TOKENS_BT)
    _, grads = value_and_grad(model, params, TOKENS_BT)
    assert_trees_close(jax.tree.map(lambda g: jnp.mean(g, axis=0), grads_B), grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_bfloat16_is_close_to_float32(name):
    model, params = tiny(name)
    half = dataclasses.replace(model, dtype="bfloat16")
    logits_BTV = logits_of(half, params, TOKENS_BT)
    assert logits_BTV.dtype == jnp.float32
    reference_BTV = logits_of(model, params, TOKENS_BT)
    # bfloat16 keeps 8 bits: relative errors of 2 ** -9 per operation, about ten operations deep.
    assert np.sqrt(np.mean((logits_BTV - reference_BTV) ** 2)) < 0.03 * np.std(reference_BTV)
    if name == "llama":
        _, grads = value_and_grad(half, params, TOKENS_BT)
        assert all(g.dtype == jnp.float32 and np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_equal_models_share_a_compiled_program():
    one, two = (Model(llama.Config.from_hf(formula.CONFIGS["llama"]), dtype=d) for d in ("float32", jnp.float32))
    assert one == two and hash(one) == hash(two)
    assert one != dataclasses.replace(one, remat=True)
    # What a file says besides the computation takes no part.
    assert one == Model(llama.Config.from_hf(formula.CONFIGS["llama"] | {"bos_token_id": 5}))


@pytest.mark.parametrize("name", NAMES)
def test_init_has_the_standard_deviations_of_hugging_face(name):
    wide = {"n_embd": 64, "hidden_size": 64, "head_dim": 16}
    raw = {key: wide.get(key, value) for key, value in formula.CONFIGS[name].items()}
    model = Model(FAMILIES[name].Config.from_hf(raw))
    params = model.init(jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, model.shapes())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        residual = name == "gpt2" and path in ("blocks/attn/o/kernel", "blocks/mlp/down/kernel")
        if path.endswith(("kernel", "table")):
            # At least 2000 draws: the sample deviation is within 5 % with room to spare.
            np.testing.assert_allclose(np.std(leaf), 0.02 / (2 if residual else 1), rtol=0.08)
        else:
            assert np.all(leaf == (1 if path.endswith("scale") else 0))
    kernel = jax.tree.leaves(params["blocks"]["mlp"])[-1]
    assert not np.array_equal(kernel[0], kernel[1])


def test_flops_follow_the_formula():
    model, _ = tiny("mistral")
    D, F, V, N, N_kv, H = 16, 24, 31, 4, 2, 6
    weights = 2 * (D * (N + 2 * N_kv) * H + N * H * D + 3 * D * F) + D * V
    seen = np.mean([min(t, 5) for t in range(1, 13)])
    assert model.flops_per_token(12) == pytest.approx(2 * weights + 2 * 4 * N * H * seen)
    tied, _ = tiny("gpt2")
    assert tied.flops_per_token(1) == pytest.approx(2 * (2 * 12 * 16 * 16 + 16 * 31) + 2 * 4 * 16)


def test_attention_traces_under_vmap_of_grad():
    def total(q, k, v, mask):
        return jnp.sum(attention(q, k, v, mask_BTU=mask))

    q = jnp.ones((3, 1, 5, 4, 8))
    kv = jnp.ones((3, 1, 5, 2, 8))
    mask = jnp.ones((3, 1, 5, 5), bool)
    jax.jit(jax.vmap(jax.grad(total))).lower(q, kv, kv, mask)
    jax.jit(jax.vmap(jax.grad(lambda q, k, v: total(q, k, v, None)))).lower(q, kv, kv)


def test_every_activation_runs_on_vectors():
    x = jnp.linspace(-3, 3, 7)
    for name, function in ACTIVATIONS.items():
        assert np.isfinite(function(x)).all() and function(x).shape == x.shape, name


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: gpt2.Config.from_hf({"add_cross_attention": True}),
            "add_cross_attention is True; supported: False",
        ),
        (
            lambda: gpt2.Config(activation_function="prelu"),
            "activation_function is 'prelu'; supported: gelu, ",
        ),
        (lambda: gpt2.Config(n_embd=10, n_head=4), "n_embd is 10; it must be a multiple of n_head"),
        (lambda: gpt2.Config.from_hf({"n_embd": "big"}), "n_embd is 'big'; expected int"),
        (lambda: llama.Config(model_type="phi"), "model_type is 'phi'; supported: llama, mistral, qwen2"),
        (
            lambda: llama.Config(num_attention_heads=4, num_key_value_heads=3),
            "must be a multiple of num_key_value",
        ),
        (lambda: llama.Config(head_dim=7), "head_dim is 7"),
        (
            lambda: Rope(rope_type="longrope"),
            "rope_type is 'longrope'; supported: default, linear, dynamic, llama3",
        ),
        (lambda: Rope(rope_type="linear"), "factor is missing; rope type linear needs it"),
        (lambda: Rope.from_hf({"partial_rotary_factor": 0.5}), "partial_rotary_factor is 0.5"),
        (
            lambda: llama.Config(model_type="qwen2", layer_types=["sliding_attention"] * 32),
            "set sliding_window",
        ),
        (lambda: Model(gpt2.Config(), dtype="int8"), "dtype is int8; supported: float32"),
        (lambda: Model(gpt2.Config(), dtype="half"), "dtype is float16; supported: float32"),
        (lambda: Model(gpt2.Config(), dtype="f31"), "dtype is 'f31'; supported: float32"),
        (
            lambda: tiny("gpt2")[0].logits(tiny("gpt2")[1], jnp.zeros((1, 33), int)),
            "length is 33; this model has 32",
        ),
    ],
)
def test_unsupported_settings_name_field_value_and_choices(build, message):
    with pytest.raises(UserError) as error:
        build()
    assert message in str(error.value)


def test_rope_reads_old_and_new_spellings():
    yarn = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}
    old = Rope.from_hf({"rope_theta": 500.0, "rope_scaling": yarn})
    new = Rope.from_hf({"rope_parameters": yarn | {"rope_type": "yarn", "rope_theta": 500.0}})
    assert old == new == Rope.from_hf(old.to_hf())
    assert Rope.from_hf({"rope_scaling": None}) == Rope()
    with pytest.warns(UserWarning, match="ignores beta_fast"):
        Rope.from_hf({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 3}})
